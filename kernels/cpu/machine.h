// What the choice of an algorithm may ask about this machine, and about the user's wishes.
#pragma once

#include <cstdint>

namespace nnarch {

// Bytes of the second- and last-level caches as the operating system reports them, or what most
// machines have at least.
int64_t l2_bytes();
int64_t l3_bytes();

// Whether a core reads the last-level cache at no more than half of what it multiplies with: 20 to
// 30 GB/s over the mesh of Intel's servers, where others have 60 and more. By the maker's name, not
// by the clock: a choice must not change from one run to the next.
bool far_l3();

// Whether AVX-512's gathers beat loads and inserts one by one: Intel's since Sapphire Rapids, whose
// inserts share one port. AMD's take 1.7 times as long, and so do earlier ones of Intel's, which
// were slowed down against an attack.
bool fast_gathers();

// What reading `bytes` of weights once costs beside products, in the time of an FMA on vectors of
// `lanes` floats.
double read_cost(double bytes, double lanes);

// What nnarch.set_precision chose: may an algorithm that multiplies less round more?
enum class Precision : int64_t { highest, high, medium };
Precision precision();

}  // namespace nnarch
