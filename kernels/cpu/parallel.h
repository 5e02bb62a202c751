// Work sharing over torch's own thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <exception>

#ifdef NNARCH_X86
#include <immintrin.h>
#endif

namespace nnarch {

// Flushes denormals to zero on this thread for a scope: one denormal costs a hundred cycles.
class FlushDenormals {
 public:
#ifdef NNARCH_X86
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// Calls f(task) for every task in [0, tasks). Tasks are cut by the shape of the problem, never by
// the number of threads, and each writes its own part of the output: results are the same, bit for
// bit, for any number of threads.
template <class F>
void parallel_tasks(int64_t tasks, const F& f) {
  if (tasks <= 0) return;
  if (tasks == 1) {
    FlushDenormals guard;
    f(int64_t{0});
    return;
  }
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    FlushDenormals guard;
    for (int64_t task = begin; task < end; ++task) f(task);
  });
}

// Calls f(begin, end) for ranges that together are [0, count), one for each thread: for work that
// gives the same bits however it is cut.
template <class F>
void parallel_ranges(int64_t count, const F& f) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    FlushDenormals guard;
    f(begin, end);
  });
}

}  // namespace nnarch
