// The roofline of one core: peak FMA rate and read bandwidth.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

NNARCH_PER_ISA(
    // float32 operations per second (an FMA is two).
    double measure_flops();
    // Bytes per second of reading a buffer of `bytes` again and again.
    double measure_read_bandwidth(int64_t bytes);)

}  // namespace nnarch
