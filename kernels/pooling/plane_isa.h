// Pooling of planes (NCHW): the rows of a window are first reduced to one row, along which vectors
// lie, and that row then to outputs. Every other position of a vector is dropped for stride 2.
#pragma once

#include "cpu/simd.h"
#include "cpu/wide.h"
#include "pooling/best_isa.h"
#include "pooling/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {

// Elements 0, 2, 4, … of a followed by b.
template <class V, int... I>
NNARCH_INLINE V even_elements(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}

// How values combine: by maximum or by sum.
template <class T>
struct Maximum {
  static NNARCH_INLINE Vec<T> identity() { return lowest<T>(); }
  static NNARCH_INLINE Vec<T> combine(Vec<T> a, Vec<T> b) { return max<T>(a, b); }
};
template <class T>
struct Sum {
  static NNARCH_INLINE Vec<T> identity() { return Vec<T>{}; }
  static NNARCH_INLINE Vec<T> combine(Vec<T> a, Vec<T> b) { return a + b; }
};

// `taps` vectors, `step` elements apart, combined.
template <class T, class Op, int taps>
NNARCH_INLINE Vec<T> reduce_taps(const T* p, int64_t step) {
  Vec<T> v = load(p);
  for (int t = 1; t < taps; ++t) v = Op::combine(v, load(p + t * step));
  return v;
}

template <class T, class Op, int taps>
NNARCH_INLINE void reduce_some_rows(const T* p, int64_t step, int64_t width, T* row) {
  constexpr int64_t lane = kLanes<T>;
  int64_t j = 0;
  for (; j + lane <= width; j += lane) store(row + j, reduce_taps<T, Op, taps>(p + j, step));
  if (const int64_t n = width - j; n > 0) {
    Vec<T> v = load_n(p + j, n);
    for (int t = 1; t < taps; ++t) v = Op::combine(v, load_n(p + j + t * step, n));
    store_n(row + j, v, n);
  }
}

// row[j] = the window's rows of `plane` combined.
template <class T, class Op>
NNARCH_INLINE void reduce_rows_of_window(const T* plane, const Axis& h, int64_t out_row,
                                         int64_t width, T* row) {
  const int64_t start = h.start[out_row], step = h.step * width;
  const int64_t taps = (h.end[out_row] - start + h.step - 1) / h.step;
  const T* p = plane + start * width;
  if (taps == 1) return reduce_some_rows<T, Op, 1>(p, step, width, row);
  if (taps == 2) return reduce_some_rows<T, Op, 2>(p, step, width, row);
  if (taps == 3) return reduce_some_rows<T, Op, 3>(p, step, width, row);
  for (int64_t j = 0; j < width; j += kLanes<T>) {
    Vec<T> v = Op::identity();
    for (int64_t t = 0; t < taps; ++t) v = Op::combine(v, load_n(p + t * step + j, width - j));
    store_n(row + j, v, width - j);
  }
}

// The combination of `kernel` elements from p on, for a vector of neighbouring p.
template <class T, class Op, int kernel>
NNARCH_INLINE Vec<T> reduce_along(const T* p, const Axis& w) {
  if constexpr (kernel > 0) return reduce_taps<T, Op, kernel>(p, w.step);
  Vec<T> v = load(p);
  for (int64_t t = 1; t < w.kernel; ++t) v = Op::combine(v, load(p + t * w.step));
  return v;
}

// y[j] = the row's elements in window j combined.
template <class T, class Op, int kernel>
NNARCH_INLINE void reduce_row(const T* row, const Axis& w, T* y) {
  constexpr int64_t lane = kLanes<T>;
  if (w.stride == 1) {
    for (int64_t j = 0; j < w.outputs; j += lane)
      store_n(y + j, reduce_along<T, Op, kernel>(row + j, w), w.outputs - j);
    return;
  }
  for (int64_t j = 0; j < w.outputs; j += lane) {
    const Vec<T> a = reduce_along<T, Op, kernel>(row + 2 * j, w);
    const Vec<T> b = reduce_along<T, Op, kernel>(row + 2 * j + lane, w);
    store_n(y + j, even_elements(a, b, MakeIndices<kLanes<T>>{}), w.outputs - j);
  }
}

template <class T, class Op>
NNARCH_INLINE void fill_identity(const Axis& w, T* row) {
  const int64_t size = row_buffer_size(w);
  const T identity = Op::identity()[0];
  for (int64_t i = 0; i < size; ++i) row[i] = identity;
}

// Calls f(Code for the kernel width): the common widths unroll their taps.
template <int value>
struct Taps {
  static constexpr int taps = value;
};
template <class F>
NNARCH_INLINE void with_taps(const Axis& w, const F& f) {
  if (w.kernel == 2) return f(Taps<2>{});
  if (w.kernel == 3) return f(Taps<3>{});
  f(Taps<0>{});
}

template <class T, class Op>
NNARCH_INLINE void pool_plane(const T* plane, const Axis& h, const Axis& w, int64_t from,
                              int64_t to, T* y, T* row) {
  fill_identity<T, Op>(w, row);
  with_taps(w, [&](auto k) {
    for (int64_t i = from; i < to; ++i) {
      reduce_rows_of_window<T, Op>(plane, h, i, w.inputs, row + w.padding);
      reduce_row<T, Op, decltype(k)::taps>(row, w, y + i * w.outputs);
    }
  });
}

template <class T>
void average_plane(const T* plane, const Axis& h, const Axis& w, int64_t from, int64_t to, T* y,
                   const T* column_counts, T* row) {
  pool_plane<T, Sum<T>>(plane, h, w, from, to, y, row);
  for (int64_t i = from; i < to; ++i) {
    const T rows = static_cast<T>(h.count[i]);
    T* out = y + i * w.outputs;
    for (int64_t j = 0; j < w.outputs; j += kLanes<T>) {
      const int64_t n = w.outputs - j;
      store_n(out + j, load_n(out + j, n) / (load_n(column_counts + j, n) * rows), n);
    }
  }
}

template <class T>
NNARCH_INLINE double sum_plane(const T* plane, int64_t pixels) {
  constexpr int64_t w = kLanes<T>;
  Wide<T> total;
  int64_t i = 0;
  for (; i + kBurst * w <= pixels; i += kBurst * w) {
    Vec<T> sum{};
    for (int r = 0; r < kBurst; ++r) sum += load(plane + i + r * w);
    total.add(sum);
  }
  Vec<T> rest{};
  for (; i + w <= pixels; i += w) rest += load(plane + i);
  if (i < pixels) rest += load_n(plane + i, pixels - i);
  total.add(rest);
  return total.total();
}

template <class T>
void mean_planes(const T* x, int64_t planes, int64_t pixels, T* y) {
  const double scale = 1.0 / static_cast<double>(pixels);
  for (int64_t p = 0; p < planes; ++p)
    y[p] = static_cast<T>(sum_plane<T>(x + p * pixels, pixels) * scale);
}

}  // namespace nnarch::NNARCH_ISA
