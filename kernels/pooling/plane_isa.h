// Pooling of planes (NCHW): the rows of every window are first reduced to one row, along which
// vectors lie, and that row then to outputs. Every other position is dropped for stride 2.
//
// Some rows are reduced before any is read again: what has just been stored cannot be loaded at
// another offset for about 20 cycles. Small planes follow each other under one set of buffers.
#pragma once

#include "cpu/simd.h"
#include "pooling/cpu_kernels.h"
#include "pooling/reduce_isa.h"

namespace nnarch::NNARCH_ISA {

template <class V, int... I>
NNARCH_INLINE V even_elements(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}
template <class V, int... I>
NNARCH_INLINE V odd_elements(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// Elements 0, 2, 4, … of a followed by b, in an order of this set's own, and the same for 1, 3, 5,
// …; in_order() brings results into the usual order. AVX2 crosses its halves once instead of for
// every operand.
template <class T>
NNARCH_INLINE Vec<T> evens(Vec<T> a, Vec<T> b) {
#if defined(NNARCH_ISA_avx2)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  else
    return (Vec<T>)_mm256_unpacklo_pd((__m256d)a, (__m256d)b);
#else
  return even_elements(a, b, MakeIndices<kLanes<T>>{});
#endif
}
template <class T>
NNARCH_INLINE Vec<T> odds(Vec<T> a, Vec<T> b) {
#if defined(NNARCH_ISA_avx2)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xDD);
  else
    return (Vec<T>)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
#else
  return odd_elements(a, b, MakeIndices<kLanes<T>>{});
#endif
}
template <class T>
NNARCH_INLINE Vec<T> in_order(Vec<T> v) {
#if defined(NNARCH_ISA_avx2)
  return (Vec<T>)_mm256_permute4x64_pd((__m256d)v, 0xD8);
#else
  return v;
#endif
}

// row[j] = `taps` rows of the plane combined, `step` elements apart. `beyond`: whether a vector may
// read and write past the ends of both. Otherwise the last one overlaps its neighbour, if any.
template <class T, class Acc, int taps, int S>
NNARCH_INLINE void reduce_rows(const T* p, int64_t step, int64_t width, bool beyond,
                               typename Acc::Watch& watch, T* row) {
  constexpr int64_t lane = kLanes<T>;
  const auto at = [&](int64_t j) NNARCH_INLINE_LAMBDA {
    return reduce<Acc, taps, 1, S>(
        watch, [&](int t, int) NNARCH_INLINE_LAMBDA { return load(p + j + t * step); });
  };
  int64_t j = 0;
  if (beyond) {
    for (; j < width; j += lane) store(row + j, at(j));
    return;
  }
  for (; j + lane <= width; j += lane) store(row + j, at(j));
  if (j == width) return;
  if (width >= lane) return store(row + width - lane, at(width - lane));
  const auto masked = [&](int t, int) NNARCH_INLINE_LAMBDA { return load_n(p + t * step, width); };
  store_n(row, reduce<Acc, taps, 1, S>(watch, masked), width);
}

// The same for any window.
template <class T, class Acc>
NNARCH_NOINLINE typename Acc::Watch reduce_any_rows(const T* plane, const Axis& h, int64_t out_row,
                                                    int64_t width, T* row) {
  typename Acc::Watch watch;
  const int64_t start = h.start[out_row], end = h.end[out_row], step = h.step * width;
  const T* p = plane + start * width;
  if (h.step == 1 && end - start == 2) {
    reduce_rows<T, Acc, 2, 2>(p, step, width, false, watch, row);
    return watch;
  }
  for (int64_t j = 0; j < width; j += kLanes<T>) {
    Acc acc;
    const T* tap = p + j;
    for (int64_t i = start; i < end; i += h.step, tap += step) {
      const Vec<T> v = load_n(tap, width - j);
      acc.take(v);
      watch.see(v, v);
    }
    store_n(row + j, acc.value, width - j);
  }
  return watch;
}

// Output rows [from, to) of windows with `kernel` rows, into rows of a buffer. The first S rows of
// a window are in no later one. Windows cut short by the border, and all of an unknown kernel
// (0), take the general way.
template <class T, class Acc, int kernel, int S>
NNARCH_INLINE void reduce_window_rows(const T* plane, const Axis& h, int64_t width, int64_t from,
                                      int64_t to, bool beyond, typename Acc::Watch& watch, T* row,
                                      int64_t pitch) {
  for (int64_t i = from; i < to; ++i, row += pitch) {
    const int64_t start = h.start[i];
    if (kernel == 0 || h.end[i] - start != kernel) {
      watch.merge(reduce_any_rows<T, Acc>(plane, h, i, width, row));
      continue;
    }
    constexpr int taps = kernel > 0 ? kernel : 1;
    const T* p = plane + start * width;
    if (S == kernel || i + 1 < to)
      reduce_rows<T, Acc, taps, S>(p, width, width, beyond, watch, row);
    else
      reduce_rows<T, Acc, taps, taps>(p, width, width, beyond, watch, row);
  }
}

// The windows that begin at p, p + stride, …: a vector of them. kernel is 0 where only w knows it.
template <class T, class Acc, int kernel, int stride>
NNARCH_INLINE Vec<T> reduce_along(const T* p, const Axis& w) {
  constexpr int64_t lane = kLanes<T>;
  const auto every_other = [&](int64_t at) NNARCH_INLINE_LAMBDA {
    return evens<T>(load(p + at), load(p + at + lane));
  };
  if constexpr (stride == 1 && kernel > 0) {
    Acc acc(load(p));
    for (int t = 1; t < kernel; ++t) acc.take(load(p + t * w.step));
    return acc.value;
  } else if constexpr (kernel == 2 || kernel == 3) {  // side by side
    const Vec<T> a = load(p), b = load(p + lane);
    Acc acc(evens<T>(a, b));
    acc.take(odds<T>(a, b));
    if constexpr (kernel == 3) acc.take(every_other(2));
    return in_order<T>(acc.value);
  } else {
    Acc acc;
    for (int64_t t = 0; t < w.kernel; ++t)
      acc.take(stride == 1 ? load(p + t * w.step) : every_other(t * w.step));
    return stride == 1 ? acc.value : in_order<T>(acc.value);
  }
}

// What averages are multiplied by: one factor for all, or one for each column and one for the row.
template <class T>
struct Scales {
  const T* columns;
  T factor;

  NNARCH_INLINE Vec<T> at(int64_t j) const {
    const Vec<T> f = broadcast(factor);
    return columns ? load(columns + j) * f : f;
  }
};

// y[j] = the elements of the row in window j combined. There is `space` behind y + outputs that
// later rows will fill: a vector may reach into it.
template <class T, class Acc, int kernel, int stride>
NNARCH_INLINE void reduce_row(const T* row, const Axis& w, int64_t outputs, int64_t space,
                              const Scales<T>& scales, T* y) {
  constexpr int64_t lane = kLanes<T>;
  const auto at = [&](int64_t j) NNARCH_INLINE_LAMBDA {
    return Acc::scaled(reduce_along<T, Acc, kernel, stride>(row + stride * j, w), scales.at(j));
  };
  int64_t j = 0;
  for (; j + lane <= outputs; j += lane) store(y + j, at(j));
  if (j == outputs) return;
  if (outputs - j + space >= lane)
    store(y + j, at(j));
  else if (outputs >= lane)
    store(y + outputs - lane, at(outputs - lane));
  else
    store_n(y + j, at(j), outputs - j);
}

// Output rows [from, to) of planes that follow each other. Returns whether a NaN was seen, for
// which Acc may not be made.
template <class T, class Acc, int kernel, int stride>
NNARCH_NOINLINE bool pool_planes(const T* x, int64_t planes, const Axis& h, const Axis& w,
                                 int64_t from, int64_t to, T* y, const PlaneBuffer<T>& buffer) {
  typename Acc::Watch watch;
  const int64_t pitch = row_pitch(w), in = h.inputs * w.inputs, out = h.outputs * w.outputs;
  // Windows that cover all of a row without overlapping: rows are one long row.
  const bool flat = stride == kernel && kernel > 1 && pitch == w.outputs * stride &&
                    w.inputs == pitch && buffer.same_scale;
  // Whole vectors write beyond a narrow row, over the next one, which comes after it; not where
  // windows reach beyond the row and find nothing there.
  const bool narrow = w.inputs < kLanes<T> && pitch == w.inputs;
  // A buffer holds some rows of a plane, or all rows of some planes.
  const int64_t rows = to - from, width = w.outputs;
  const int64_t together = buffer.rows >= rows ? buffer.rows / rows : 1;
  for (int64_t p = 0; p < planes; p += together) {
    const int64_t few = planes - p < together ? planes - p : together;
    // Behind the last plane may be the end of memory.
    const int64_t safe = narrow ? planes - p - 1 - kLanes<T> / in : 0;
    for (int64_t i = from; i < to; i += buffer.rows) {
      const int64_t n = to - i < buffer.rows ? to - i : buffer.rows;
      T* row = buffer.values + w.padding;
      for (int64_t k = 0; k < few; ++k, row += n * pitch)
        reduce_window_rows<T, Acc, kernel, kernel == 0 ? 0 : stride>(
            x + (p + k) * in, h, w.inputs, i, i + n, k < safe, watch, row, pitch);
      T* to_rows = y + p * out + i * width;  // of planes that are complete where few > 1
      int64_t space = few > 1 ? (planes - p - few) * out : (to - i - n) * width;
      if (flat) {
        const Scales<T> scales{nullptr, buffer.row_scales[i]};
        reduce_row<T, Acc, kernel, stride>(buffer.values, w, few * n * width, space, scales,
                                           to_rows);
        continue;
      }
      space += few * n * width;
      for (int64_t k = 0; k < few; ++k)
        for (int64_t r = 0; r < n; ++r, to_rows += width) {
          const Scales<T> scales{buffer.column_scales, buffer.row_scales[i + r]};
          space -= width;
          reduce_row<T, Acc, kernel, stride>(buffer.values + (k * n + r) * pitch, w, width, space,
                                             scales, to_rows);
        }
    }
  }
  return watch.any();
}

template <class T, class Acc>
NNARCH_INLINE bool pool_planes(const T* x, int64_t planes, const Axis& h, const Axis& w,
                               int64_t from, int64_t to, T* y, const PlaneBuffer<T>& buffer) {
  const int64_t size = plane_buffer_size(w, buffer.rows);
  for (int64_t i = 0; i < size; ++i) buffer.values[i] = Acc::kIdentity;
  const auto run = w.stride == 1 ? pool_planes<T, Acc, 0, 1> : pool_planes<T, Acc, 0, 2>;
  return run(x, planes, h, w, from, to, y, buffer);
}

// The common windows are unrolled: 3x3 and 2x2, at the same distance in both axes.
template <class T, class Acc>
NNARCH_INLINE bool pool_common_planes(const T* x, int64_t planes, const Axis& h, const Axis& w,
                                      int64_t from, int64_t to, T* y,
                                      const PlaneBuffer<T>& buffer) {
  auto run = pool_planes<T, Acc, 0, 1>;
  const bool square = h.kernel == w.kernel && h.stride == w.stride && h.step == 1 && w.step == 1;
  if (!square || w.kernel < 2 || w.kernel > 3)
    return pool_planes<T, Acc>(x, planes, h, w, from, to, y, buffer);
  if (w.kernel == 3)
    run = w.stride == 1 ? pool_planes<T, Acc, 3, 1> : pool_planes<T, Acc, 3, 2>;
  else
    run = w.stride == 1 ? pool_planes<T, Acc, 2, 1> : pool_planes<T, Acc, 2, 2>;
  const int64_t size = plane_buffer_size(w, buffer.rows);
  for (int64_t i = 0; i < size; ++i) buffer.values[i] = Acc::kIdentity;
  return run(x, planes, h, w, from, to, y, buffer);
}

template <class T>
void average_planes(const T* x, int64_t planes, const Axis& h, const Axis& w, int64_t from,
                    int64_t to, T* y, const PlaneBuffer<T>& buffer) {
  pool_common_planes<T, Sum<T>>(x, planes, h, w, from, to, y, buffer);
}

}  // namespace nnarch::NNARCH_ISA
