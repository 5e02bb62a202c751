// What the choice of an algorithm may ask about this machine, and about the user's wishes.
#pragma once

#include <cstdint>

namespace nnarch {

// Bytes of the second- and last-level caches as the operating system reports them, or what most
// machines have at least.
int64_t l2_bytes();
int64_t l3_bytes();

// What nnarch.set_precision chose: may an algorithm that multiplies less round more?
enum class Precision : int64_t { highest, high, medium };
Precision precision();

}  // namespace nnarch
