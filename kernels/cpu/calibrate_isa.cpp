#include "cpu/calibrate.h"

#include <stdlib.h>
#include <time.h>

#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {
namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Makes the compiler produce `v`, every time.
NNARCH_INLINE void consume(Vec<float> v) { asm volatile("" : : "m"(v) : "memory"); }

template <int... I>
NNARCH_NOINLINE void multiply_add(Indices<I...>, int64_t steps) {
  Vec<float> acc[sizeof...(I)] = {(broadcast(0.5f + I))...};
  Vec<float> a = broadcast(0.999f), b = broadcast(0.001f);
  for (int64_t step = 0; step < steps; ++step) {
    ((acc[I] = acc[I] * a + b), ...);
  }
  (consume(acc[I]), ...);
}

}  // namespace

double measure_flops() {
  constexpr int chains = 12;
  const int64_t steps = 200000;
  double best = 0;
  for (int repeat = 0; repeat < 20; ++repeat) {
    const double started = now();
    multiply_add(MakeIndices<chains>{}, steps);
    const double rate = 2.0 * kLanes<float> * chains * steps / (now() - started);
    best = rate > best ? rate : best;
  }
  return best;
}

double measure_read_bandwidth(int64_t bytes) {
  // In four streams: one gets 17 GB/s of memory where four get 24 (Zen 3).
  const int64_t quarter = bytes / 256 * 16, count = 4 * quarter;  // floats, whole lines
  if (count == 0) return 0;
  float* buffer = static_cast<float*>(aligned_alloc(4096, (count * 4 + 4095) / 4096 * 4096));
  if (buffer == nullptr) return 0;
  for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<float>(i & 7);
  const int64_t passes = 1 + (int64_t{64} << 20) / bytes;
  double best = 0;
  for (int repeat = 0; repeat < 10; ++repeat) {
    const double started = now();
    for (int64_t pass = 0; pass < passes; ++pass) {
      Vec<float> s0{}, s1{}, s2{}, s3{};
      constexpr int w = kLanes<float>;
      for (int64_t i = 0; i < quarter; i += w) {
        s0 += load(buffer + i), s1 += load(buffer + quarter + i);
        s2 += load(buffer + 2 * quarter + i), s3 += load(buffer + 3 * quarter + i);
      }
      consume(s0 + s1 + (s2 + s3));
    }
    const double rate = 4.0 * static_cast<double>(count * passes) / (now() - started);
    best = rate > best ? rate : best;
  }
  free(buffer);
  return best;
}

}  // namespace nnarch::NNARCH_ISA
