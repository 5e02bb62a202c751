// Maximum pooling of planes with the positions of the maxima: as plane_isa.h, in pairs.
#pragma once

#include "pooling/best_isa.h"
#include "pooling/plane_isa.h"

namespace nnarch::NNARCH_ISA {

template <class T>
struct RowBuffer {
  T* values;
  typename LaneIndex<T>::Type* positions;
};

template <class T>
NNARCH_INLINE Lanes<T> load_positions(const typename LaneIndex<T>::Type* p) {
  return *reinterpret_cast<const typename LaneVectors<T>::Unaligned*>(p);
}
template <class T>
NNARCH_INLINE void store_positions(typename LaneIndex<T>::Type* p, Lanes<T> v, int64_t n) {
  if (n >= kLanes<T>)
    *reinterpret_cast<typename LaneVectors<T>::Unaligned*>(p) = v;
  else
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

template <class T>
NNARCH_INLINE Lanes<T> counting() {
  Lanes<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i;
  return v;
}

template <class T>
NNARCH_INLINE void best_of_rows(const T* plane, const Axis& h, int64_t out_row, int64_t width,
                                T* values, typename LaneIndex<T>::Type* positions) {
  for (int64_t j = 0; j < width; j += kLanes<T>) {
    const int64_t n = width - j;
    Best<T> best;
    for (int64_t i = h.start[out_row]; i < h.end[out_row]; i += h.step)
      best.take_later(load_n(plane + i * width + j, n), counting<T>() + lanes<T>(i * width + j));
    store_n(values + j, best.value, n);
    store_positions<T>(positions + j, best.position, n);
  }
}

template <class T, int kernel>
NNARCH_INLINE Best<T> best_along(const RowBuffer<T>& row, int64_t at, const Axis& w) {
  Best<T> best;
  best.value = load(row.values + at);
  best.position = load_positions<T>(row.positions + at);
  const int64_t taps = kernel ? kernel : w.kernel;
  for (int64_t t = 1; t < taps; ++t)
    best.take(load(row.values + at + t * w.step),
              load_positions<T>(row.positions + at + t * w.step));
  return best;
}

template <class T, int kernel>
NNARCH_INLINE void best_of_row(const RowBuffer<T>& row, const Axis& w, T* y, int64_t* indices) {
  constexpr int64_t lane = kLanes<T>;
  constexpr MakeIndices<kLanes<T>> all{};
  for (int64_t j = 0; j < w.outputs; j += lane) {
    Best<T> best = best_along<T, kernel>(row, w.stride * j, w);
    if (w.stride == 2) {
      const Best<T> next = best_along<T, kernel>(row, 2 * j + lane, w);
      best.value = even_elements(best.value, next.value, all);
      best.position = even_elements(best.position, next.position, all);
    }
    store_n(y + j, best.value, w.outputs - j);
    store_indices<T>(indices + j, best.position, w.outputs - j);
  }
}

template <class T>
NNARCH_INLINE void max_plane_indices(const T* plane, const Axis& h, const Axis& w, int64_t from,
                                     int64_t to, T* y, int64_t* indices, const RowBuffer<T>& row) {
  with_taps(w.kernel, [&](auto k) {
    for (int64_t i = from; i < to; ++i) {
      best_of_rows<T>(plane, h, i, w.inputs, row.values + w.padding, row.positions + w.padding);
      best_of_row<T, decltype(k)::count>(row, w, y + i * w.outputs, indices + i * w.outputs);
    }
  });
}

template <class T>
void max_planes(const T* x, int64_t planes, const Axis& h, const Axis& w, int64_t from, int64_t to,
                T* y, int64_t* indices, const PlaneBuffer<T>& buffer) {
  if (!indices) {
    if (pool_common_planes<T, Maximum<T>>(x, planes, h, w, from, to, y, buffer))
      pool_planes<T, ExactMaximum<T>>(x, planes, h, w, from, to, y, buffer);
    return;
  }
  for (int64_t i = 0; i < plane_buffer_size(w, 1); ++i) {
    buffer.values[i] = Maximum<T>::kIdentity;
    buffer.positions[i] = static_cast<typename LaneIndex<T>::Type>(nowhere<T>());
  }
  const int64_t in = h.inputs * w.inputs, out = h.outputs * w.outputs;
  for (int64_t p = 0; p < planes; ++p)
    max_plane_indices<T>(x + p * in, h, w, from, to, y + p * out, indices + p * out,
                         {buffer.values, buffer.positions});
}

}  // namespace nnarch::NNARCH_ISA
