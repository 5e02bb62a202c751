// Products of taps added to their outputs.
#include "conv_transpose2d/cpu_kernels.h"
#include "cpu/epilogue_isa.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {
namespace {

// What the runs over place i bring, with `step` from run to run: the run that begins there its
// first elements, the one before it those from `step` on, and so on.
template <class T>
struct Overlap {
  const T* z;
  int64_t z_step, count, run, step, ways;

  // The places [begin, end), each for itself.
  NNARCH_NOINLINE void edge(int64_t begin, int64_t end, const T* from, T* to) const {
    constexpr int64_t w = kLanes<T>;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i < count ? 0 : i - count + 1, last = i < ways - 1 ? i + 1 : ways;
      const int64_t reach = run - first * step, n = reach < step ? reach : step;
      for (int64_t j = 0; j < n; j += w) {
        const int64_t lanes = n - j < w ? n - j : w;
        Vec<T> sum = load_n(from + i * step + j, lanes);
        for (int64_t k = first; k < last; ++k) {
          const int64_t at = k * step + j, left = run - at < lanes ? run - at : lanes;
          if (left > 0) sum += load_n(z + (i - k) * z_step + at, left);
        }
        store_n(to + i * step + j, sum, lanes);
      }
    }
  }

  // The places [begin, end), which all runs reach, in whole vectors: what is written past a place
  // is written again by the next one.
  template <int Ways>
  NNARCH_INLINE void inside(int64_t begin, int64_t end, const T* from, T* to) const {
    constexpr int64_t w = kLanes<T>;
    const int64_t rest = run - (Ways - 1) * step;
    for (int64_t i = begin; i < end; ++i) {
      const T* at = z + i * z_step;
      for (int64_t j = 0; j < step; j += w) {
        Vec<T> sum = load(from + i * step + j);
        for (int k = 0; k < Ways - 1; ++k) sum += load(at - k * (z_step - step) + j);
        if (j < rest)
          sum += load_n(at - (Ways - 1) * (z_step - step) + j, rest - j < w ? rest - j : w);
        store(to + i * step + j, sum);
      }
    }
  }
};

// From one buffer to another: a vector that is loaded beside the one just stored would wait until
// the store is done (40 cycles a place on Zen 4, whatever the masks say).
template <class T>
void add_runs(const T* z, int64_t z_step, int64_t count, int64_t run, int64_t step, const T* from,
              T* to) {
  constexpr int64_t w = kLanes<T>;
  const int64_t ways = (run + step - 1) / step, places = count + ways - 1;
  const Overlap<T> all{z, z_step, count, run, step, ways};
  const int64_t wide = (step + w - 1) / w * w, reach = (count - 1) * step + run;
  int64_t begin = ways - 1, end = reach < wide ? 0 : (reach - wide) / step + 1;
  end = end < count ? end : count;
  if (ways > 4 || from == to || end <= begin) return all.edge(0, places, from, to);
  all.edge(0, begin, from, to);
  if (ways == 1) all.template inside<1>(begin, end, from, to);
  if (ways == 2) all.template inside<2>(begin, end, from, to);
  if (ways == 3) all.template inside<3>(begin, end, from, to);
  if (ways == 4) all.template inside<4>(begin, end, from, to);
  all.edge(end, places, from, to);
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
