// A strip: P neighbouring output pixels of one row in P accumulators, vector after vector of a
// block of channels.
//
// A kernel row costs S loads of weights and (P - 1)·STRIDE + S loads of pixels for P·S
// multiply-adds: at P = 8 and S = 3, 13 loads for 24, where a cycle has two of each. A pixel is
// loaded once and used for every output that it reaches.
#pragma once

#include "cpu/epilogue_isa.h"
#include "cpu/simd.h"
#include "depthwise/cpu_kernels.h"
#include "depthwise/cpu_tile.h"

namespace nnarch::NNARCH_ISA {

#ifndef DW_LOC
#define DW_LOC 3
#endif
template <class T>
struct Strip {
  const T* const* rows;  // the kernel rows that lie in the image; vectors may be read whole
  int64_t row_count;
  int64_t x;                       // where in these rows the strip's first column in the image is
  int64_t pixel;                   // distance of neighbouring pixels in them
  int64_t s, stride_w, dilation_w;  // for kernels of any width
  const T* weight;                 // at the first of these rows
  int64_t weight_block;            // from one block of channels to the next
  T* y;
  int64_t y_pixel;
  const T* residual;  // laid out as y, or null
  int64_t channels;
  const T* ahead;   // the input that the strip below will be the first to read, or null
  int64_t ahead_pixel;
  const T* y_ahead;
  const Epilogue<T>* epilogue;  // scale and shift are read in whole vectors
};

template <class T>
NNARCH_INLINE const T* weight_of(const Strip<T>& a, int64_t k) {
  const auto i = static_cast<uint64_t>(k);
  constexpr uint64_t block = kDepthwiseBlock;
  return a.weight + i / block * static_cast<uint64_t>(a.weight_block) + i % block;
}

template <class T, int P>
NNARCH_INLINE void start(const Epilogue<T>& e, int64_t k, Vec<T> (&acc)[P]) {
  const Vec<T> value = e.shift && !e.scale ? load(e.shift + k) : Vec<T>{};
  for (int p = 0; p < P; ++p) acc[p] = value;
}

template <class T>
NNARCH_INLINE void add_pixel(Vec<T>& sum, const T*& p, int64_t pixel, int64_t n) {
  sum += load_n(p, n);
  p += pixel;
  keep_pointer(p);
}
template <class T, int... I>
NNARCH_INLINE void add_residual(const T* p, int64_t pixel, int64_t n, Vec<T>* acc,
                                Indices<I...>) {
  (add_pixel<T>(acc[I], p, pixel, n), ...);
}

template <class T>
NNARCH_INLINE void write_pixel(T*& p, Vec<T> value, int64_t pixel, int64_t n) {
  store_n(p, value, n);
  p += pixel;
  keep_pointer(p);
}
template <class T, int... I>
NNARCH_INLINE void write(T* p, int64_t pixel, int64_t n, const Vec<T>* acc, Indices<I...>) {
  if (n >= kLanes<T>)
    (write_pixel<T>(p, acc[I], pixel, kLanes<T>), ...);
  else
    (write_pixel<T>(p, acc[I], pixel, n), ...);
}

// Scale, shift, residual and the activations that are a clamp; the others run over stored values.
template <class T, int... I>
NNARCH_INLINE void finish(const Strip<T>& a, int64_t k, Vec<T>* acc, Indices<I...> indices) {
  const Epilogue<T>& e = *a.epilogue;
  const int64_t n = a.channels - k;
  if (e.scale) {
    const Vec<T> scale = load(e.scale + k), shift = e.shift ? load(e.shift + k) : Vec<T>{};
    ((acc[I] = acc[I] * scale + shift), ...);
  }
  if (a.residual) add_residual(a.residual + k, a.y_pixel, n, acc, indices);
  if (e.activation == kRelu || e.activation == kRelu6) {
    const ClampBounds<T> bounds(e.activation);
    ((acc[I] = clamp<T>(acc[I], bounds.low, bounds.high)), ...);
  }
  write(a.y + k, a.y_pixel, n, acc, indices);
}

template <bool DO, class V>
NNARCH_INLINE void add_product(V& sum, V x, V weight) {
  if constexpr (DO) sum += x * weight;
}

// The multiply-adds of input column I of the strip.
template <class T, int S, int STRIDE, int P, int I, int... J>
NNARCH_INLINE void use_pixel(Vec<T> x, const Vec<T>* weight, Vec<T>* acc, Indices<J...>) {
  (add_product<(I - J) % STRIDE == 0 && I >= J && (I - J) / STRIDE < P>(
       acc[I >= J && (I - J) / STRIDE < P ? (I - J) / STRIDE : 0], x, weight[J]),
   ...);
}

template <class T, int S, int STRIDE, int P, bool PRESENT, int I>
NNARCH_INLINE void use_column(const T*& x, int64_t pixel, const Vec<T>* weight, Vec<T>* acc) {
  if constexpr (PRESENT) {
    Vec<T> value = load(x);
    keep_in_register(value);  // one load, not one in each multiply-add
    use_pixel<T, S, STRIDE, P, I>(value, weight, acc, MakeIndices<S>{});
    x += pixel;
    keep_pointer(x);  // one running pointer, not a register for every multiple of `pixel`
  }
}

// The columns of the strip but the LEFT first and RIGHT last, which lie outside the image.
template <class T, int S, int STRIDE, int P, int LEFT, int RIGHT, int... I>
NNARCH_INLINE void kernel_row(const T* x, int64_t pixel, const Vec<T>* weight, Vec<T>* acc,
                              Indices<I...>) {
  constexpr int columns = sizeof...(I);
  (use_column<T, S, STRIDE, P, (I >= LEFT && I < columns - RIGHT), I>(x, pixel, weight, acc), ...);
}

template <class T, int... I>
NNARCH_INLINE void prefetch_pixels(const T* x, int64_t pixel, Indices<I...>) {
  ((__builtin_prefetch(x, 0, DW_LOC), (void)I, x += pixel), ...);
}
template <class T, int... I>
NNARCH_INLINE void prefetchw_pixels(const T* x, int64_t pixel, Indices<I...>) {
  ((__builtin_prefetch(x, 1, DW_LOC), (void)I, x += pixel), ...);
}

// Kernels of width S without dilation.
template <class T, int S, int STRIDE, int P, int LEFT, int RIGHT>
void strip_fixed(const Strip<T>& a) {
  for (int64_t k = 0; k < a.channels; k += kLanes<T>) {
    const T* w = weight_of(a, k);
    Vec<T> acc[P];
    start<T, P>(*a.epilogue, k, acc);
    if (a.ahead && k % (64 / sizeof(T)) == 0) {
      prefetch_pixels(a.ahead + k, a.pixel, MakeIndices<P * STRIDE>{});
      if (STRIDE == 2) prefetch_pixels(a.ahead + a.ahead_pixel + k, a.pixel, MakeIndices<P * STRIDE>{});
    }
    if (a.y_ahead && k % (64 / sizeof(T)) == 0) prefetchw_pixels(a.y_ahead + k, a.y_pixel, MakeIndices<P>{});
    for (int64_t r = 0; r < a.row_count; ++r, w += S * kDepthwiseBlock) {
      Vec<T> weight[S];
      for (int s = 0; s < S; ++s) weight[s] = load(w + s * kDepthwiseBlock);
      kernel_row<T, S, STRIDE, P, LEFT, RIGHT>(a.rows[r] + a.x + k, a.pixel, weight, acc,
                                               MakeIndices<(P - 1) * STRIDE + S>{});
    }
    finish(a, k, acc, MakeIndices<P>{});
  }
}

template <class T>
NNARCH_INLINE void use_tap(Vec<T>& sum, const T*& x, int64_t step, Vec<T> weight) {
  sum += load(x) * weight;
  x += step;
  keep_pointer(x);
}
template <class T, int... I>
NNARCH_INLINE void kernel_tap(const T* x, int64_t step, Vec<T> weight, Vec<T>* acc,
                              Indices<I...>) {
  (use_tap<T>(acc[I], x, step, weight), ...);
}

// Kernels of any width, stride and dilation: a load for every multiply-add.
template <class T, int P>
void strip_general(const Strip<T>& a) {
  const int64_t step = a.stride_w * a.pixel, tap = a.dilation_w * a.pixel;
  for (int64_t k = 0; k < a.channels; k += kLanes<T>) {
    const T* w = weight_of(a, k);
    Vec<T> acc[P];
    start<T, P>(*a.epilogue, k, acc);
    for (int64_t r = 0; r < a.row_count; ++r)
      for (int64_t s = 0; s < a.s; ++s, w += kDepthwiseBlock)
        kernel_tap<T>(a.rows[r] + a.x + k + s * tap, step, load(w), acc, MakeIndices<P>{});
    finish(a, k, acc, MakeIndices<P>{});
  }
}

}  // namespace nnarch::NNARCH_ISA
