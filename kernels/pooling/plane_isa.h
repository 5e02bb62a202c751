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

// row[j] = `taps` rows of the plane combined, `step` elements apart. The last vector overlaps its
// neighbour where there is one.
template <class T, class Acc, int taps>
NNARCH_INLINE void reduce_rows(const T* p, int64_t step, int64_t width, T* row) {
  constexpr int64_t lane = kLanes<T>;
  const auto at = [&](int64_t j) {
    return reduce<Acc, taps>([&](int t) { return load(p + j + t * step); }).result();
  };
  if (width < lane) {
    const Acc acc = reduce<Acc, taps>([&](int t) { return load_n(p + t * step, width); });
    return store_n(row, acc.result(), width);
  }
  int64_t j = 0;
  for (; j + lane <= width; j += lane) store(row + j, at(j));
  if (j < width) store(row + width - lane, at(width - lane));
}

template <class T, class Acc>
NNARCH_INLINE void reduce_window_rows(const T* plane, const Axis& h, int64_t out_row, int64_t width,
                                      T* row) {
  const int64_t start = h.start[out_row], step = h.step * width;
  const int64_t taps = (h.end[out_row] - start + h.step - 1) / h.step;
  const T* p = plane + start * width;
  with_taps(taps, [&](auto k) {
    constexpr int known = decltype(k)::is;
    if constexpr (known > 0) return reduce_rows<T, Acc, known>(p, step, width, row);
    for (int64_t j = 0; j < width; j += kLanes<T>) {
      Acc acc;
      for (int64_t t = 0; t < taps; ++t) acc.take(load_n(p + t * step + j, width - j));
      store_n(row + j, acc.result(), width - j);
    }
  });
}

// The windows that begin at p, p + stride, …: a vector of them. kernel is 0 where only w knows it.
template <class T, class Acc, int kernel, int stride>
NNARCH_INLINE Vec<T> reduce_along(const T* p, const Axis& w) {
  constexpr int64_t lane = kLanes<T>;
  const auto every_other = [&](int64_t at) { return evens<T>(load(p + at), load(p + at + lane)); };
  if constexpr (stride == 1 && kernel > 0) {
    return reduce<Acc, kernel>([&](int t) { return load(p + t * w.step); }).result();
  } else if constexpr (kernel == 2 || kernel == 3) {  // side by side
    const Vec<T> a = load(p), b = load(p + lane);
    Acc acc(evens<T>(a, b), odds<T>(a, b));
    if constexpr (kernel == 3) acc.take(every_other(2));
    return in_order<T>(acc.result());
  } else {
    Acc acc;
    for (int64_t t = 0; t < w.kernel; ++t)
      acc.take(stride == 1 ? load(p + t * w.step) : every_other(t * w.step));
    return stride == 1 ? acc.result() : in_order<T>(acc.result());
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
  const auto at = [&](int64_t j) {
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

// Output rows [from, to) of planes that follow each other.
template <class T, class Acc, int kernel, int stride>
NNARCH_INLINE void pool_planes(const T* x, int64_t planes, const Axis& h, const Axis& w,
                               int64_t from, int64_t to, T* y, const PlaneBuffer<T>& buffer) {
  const int64_t pitch = row_pitch(w);
  // Windows that cover all of a row without overlapping: rows are one long row.
  const bool flat = stride == kernel && kernel > 1 && pitch == w.outputs * stride &&
                    w.inputs == pitch && buffer.same_scale;
  for (int64_t p = 0; p < planes; ++p, x += h.inputs * w.inputs, y += h.outputs * w.outputs)
    for (int64_t i = from; i < to; i += buffer.rows) {
      const int64_t n = to - i < buffer.rows ? to - i : buffer.rows;
      for (int64_t r = 0; r < n; ++r)
        reduce_window_rows<T, Acc>(x, h, i + r, w.inputs, buffer.values + r * pitch + w.padding);
      const int64_t space = (to - i - n) * w.outputs;
      T* out = y + i * w.outputs;
      if (flat) {
        const Scales<T> scales{nullptr, buffer.row_scales[i]};
        reduce_row<T, Acc, kernel, stride>(buffer.values, w, n * w.outputs, space, scales, out);
        continue;
      }
      for (int64_t r = 0; r < n; ++r) {
        const Scales<T> scales{buffer.column_scales, buffer.row_scales[i + r]};
        reduce_row<T, Acc, kernel, stride>(buffer.values + r * pitch, w, w.outputs,
                                           space + (n - 1 - r) * w.outputs, scales,
                                           out + r * w.outputs);
      }
    }
}

template <class T, class Acc>
NNARCH_INLINE void pool_planes(const T* x, int64_t planes, const Axis& h, const Axis& w,
                               int64_t from, int64_t to, T* y, const PlaneBuffer<T>& buffer) {
  const int64_t size = plane_buffer_size(w, buffer.rows);
  for (int64_t i = 0; i < size; ++i) buffer.values[i] = Acc::kIdentity;
  const bool neighbours = w.step == 1 && w.kernel <= 3;
  with_taps(neighbours ? w.kernel : 0, [&](auto k) {
    constexpr int kernel = decltype(k)::is;
    if (w.stride == 1)
      pool_planes<T, Acc, kernel, 1>(x, planes, h, w, from, to, y, buffer);
    else
      pool_planes<T, Acc, kernel, 2>(x, planes, h, w, from, to, y, buffer);
  });
}

template <class T>
void average_planes(const T* x, int64_t planes, const Axis& h, const Axis& w, int64_t from,
                    int64_t to, T* y, const PlaneBuffer<T>& buffer) {
  pool_planes<T, Sum<T>>(x, planes, h, w, from, to, y, buffer);
}

}  // namespace nnarch::NNARCH_ISA
