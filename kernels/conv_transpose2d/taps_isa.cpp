// Products of taps added to their outputs.
#include "conv_transpose2d/cpu_kernels.h"
#include "cpu/epilogue_isa.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
NNARCH_INLINE void add_run(const T* z, int64_t run, T* sums) {
  constexpr int64_t w = kLanes<T>;
  int64_t j = 0;
  for (; j + w <= run; j += w) store(sums + j, load(sums + j) + load(z + j));
  if (j < run) store_n(sums + j, load_n(sums + j, run - j) + load_n(z + j, run - j), run - j);
}

// Neighbouring runs overlap where the kernel is wider than the stride. Only those that do not are
// added one after the other: reading what was just written in another place stalls.
template <class T>
void add_runs(const T* z, int64_t z_step, int64_t count, int64_t run, int64_t sum_step, T* sums) {
  const int64_t ways = (run + sum_step - 1) / sum_step;
  for (int64_t way = 0; way < ways; ++way)
    for (int64_t i = way; i < count; i += ways) add_run(z + i * z_step, run, sums + i * sum_step);
}

template <class T>
void finish(const Epilogue<T>& e, int64_t offset, int64_t n, T* y) {
  finish_row<T>(e, offset, n, y);
}

template <class T>
const TransposedTable<T>& table() {
  static constexpr TransposedTable<T> entries = {add_runs<T>, finish<T>};
  return entries;
}

}  // namespace

template <>
const TransposedTable<float>& transposed_table<float>() {
  return table<float>();
}
template <>
const TransposedTable<double>& transposed_table<double>() {
  return table<double>();
}

}  // namespace nnarch::NNARCH_ISA
