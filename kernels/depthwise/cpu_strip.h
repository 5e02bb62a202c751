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

template <class T>
struct Strip {
  const T* const* rows;  // the kernel rows that lie in the image; vectors may be read whole
  int64_t row_count;
  int64_t x;             // where in these rows the strip's first column in the image is
  int64_t pixel;         // distance of the pixels under neighbouring taps
  int64_t s, stride;     // for kernels of any width; in such pixels
  const T* weight;       // at the first of these rows
  int64_t weight_block;  // from one block of channels to the next
  T* y;
  int64_t y_pixel, y_row;
  const T* residual;  // or null
  int64_t residual_pixel, residual_row;
  int64_t channels;
  const Epilogue<T>* epilogue;  // scale and shift are read in whole vectors
  int64_t strips;               // of a block (see cpu_block.h): so many strips in a row
  bool stream;                  // of a block: whole lines of y, written past the caches
  T* lines;                     // where such lines are gathered from smaller vectors, or null
  const T* ahead;               // of a block: the first input row that the next block adds, or null
  int64_t ahead_row;
};

// Whether blocks take a last vector of channels that is not whole, by masked loads: 120 channels of
// 28×28, 5×5, N 8, took 842 µs through a tile, 355 in place. Where vectors are narrower, the usual
// numbers of channels are multiples of them.
template <class T>
inline constexpr bool kMaskedTails = kVectorBytes == 64 && sizeof(T) == 4;

// Distances of 1, 2 and 3 pixels: with these, a pointer that moves every fourth pixel reaches all.
struct Steps {
  int64_t one, two, three;
  explicit Steps(int64_t pixel) : one(pixel), two(2 * pixel), three(3 * pixel) {}
};

// Where pixel I is, for I = 0, 1, 2 … in order. The compiler would otherwise want a register for
// every multiple of the distance, and spill them.
template <int I, class T>
NNARCH_INLINE T* step(T*& p, const Steps& pixel) {
  if constexpr (I > 0 && I % 4 == 0) {
    p += 2 * pixel.two;
    keep_pointer(p);
  }
  if constexpr (I % 4 == 0) return p;
  if constexpr (I % 4 == 1) return p + pixel.one;
  if constexpr (I % 4 == 2) return p + pixel.two;
  return p + pixel.three;
}

template <class Args>
NNARCH_INLINE auto weight_of(const Args& a, int64_t k) {
  const auto i = static_cast<uint64_t>(k);
  constexpr uint64_t block = kDepthwiseBlock;
  return a.weight + i / block * static_cast<uint64_t>(a.weight_block) + i % block;
}

template <class T, int P>
NNARCH_INLINE void start(const Epilogue<T>& e, int64_t k, Vec<T> (&acc)[P]) {
  const Vec<T> value = e.shift && !e.scale ? load(e.shift + k) : Vec<T>{};
  for (int p = 0; p < P; ++p) acc[p] = value;
}

template <class T, int... I>
NNARCH_INLINE void add_residual(const T* p, const Steps& pixel, int64_t n, Vec<T>* acc,
                                Indices<I...>) {
  ((acc[I] += load_n(step<I>(p, pixel), n)), ...);
}

template <class T, int... I>
NNARCH_INLINE void write(T* p, const Steps& pixel, int64_t n, const Vec<T>* acc, Indices<I...>) {
  if (n >= kLanes<T>)
    (store(step<I>(p, pixel), acc[I]), ...);
  else
    (store_n(step<I>(p, pixel), acc[I], n), ...);
}

template <class T, int... I>
NNARCH_INLINE void write_past_caches(T* p, const Steps& pixel, const Vec<T>* acc, Indices<I...>) {
  (stream(step<I>(p, pixel), acc[I]), ...);
}

// Scale, shift, residual and the activations that are a clamp; the others run over stored values.
// `row` counts the output rows of a block.
template <class T, int... I>
NNARCH_INLINE void finish(const Strip<T>& a, int64_t k, int64_t row, Vec<T>* acc,
                          Indices<I...> indices) {
  const Epilogue<T>& e = *a.epilogue;
  const int64_t n = a.channels - k;
  const Steps y_pixel(a.y_pixel);
  if (e.scale) {
    const Vec<T> scale = load(e.scale + k), shift = e.shift ? load(e.shift + k) : Vec<T>{};
    ((acc[I] = acc[I] * scale + shift), ...);
  }
  if (a.residual)
    add_residual(a.residual + row * a.residual_row + k, Steps(a.residual_pixel), n, acc, indices);
  if (e.activation == kRelu) {
    ((acc[I] = at_least<T>(acc[I], Vec<T>{})), ...);
  } else if (e.activation == kRelu6) {
    const ClampBounds<T> bounds(e.activation);
    ((acc[I] = clamp<T>(acc[I], bounds.low, bounds.high)), ...);
  }
  T* y = a.y + row * a.y_row + k;
  if (a.stream)
    write_past_caches(y, y_pixel, acc, indices);
  else
    write(y, y_pixel, n, acc, indices);
}

template <bool DO, class V>
NNARCH_INLINE void add_product(V& sum, V x, V weight) {
  if constexpr (DO) sum += x * weight;
}

// The multiply-adds of input column I of the strip.
template <class T, int S, int STRIDE, int P, int I, int... J>
NNARCH_INLINE void use_pixel(Vec<T> x, const Vec<T>* weight, Vec<T>* acc, Indices<J...>) {
  (add_product < (I - J) % STRIDE == 0 && I >= J &&
       (I - J) /
           STRIDE<P>(acc[I >= J && (I - J) / STRIDE < P ? (I - J) / STRIDE : 0], x, weight[J]),
   ...);
}

template <class T, int S, int STRIDE, int P, bool PRESENT, int LEFT, int I>
NNARCH_INLINE void use_column(const T*& x, const Steps& pixel, const Vec<T>* weight, Vec<T>* acc) {
  if constexpr (PRESENT) {
    Vec<T> value = load(step<I - LEFT>(x, pixel));
    keep_in_register(value);  // one load, not one in each multiply-add
    use_pixel<T, S, STRIDE, P, I>(value, weight, acc, MakeIndices<S>{});
  }
}

// The columns of the strip but the LEFT first and RIGHT last, which lie outside the image.
template <class T, int S, int STRIDE, int P, int LEFT, int RIGHT, int... I>
NNARCH_INLINE void kernel_row(const T* x, const Steps& pixel, const Vec<T>* weight, Vec<T>* acc,
                              Indices<I...>) {
  constexpr int columns = sizeof...(I);
  (use_column<T, S, STRIDE, P, (I >= LEFT && I < columns - RIGHT), LEFT, I>(x, pixel, weight, acc),
   ...);
}

// Kernels of width S.
template <class T, int S, int STRIDE, int P, int LEFT, int RIGHT>
void strip_fixed(const Strip<T>& a) {
  const Steps pixel(a.pixel);
  for (int64_t k = 0; k < a.channels; k += kLanes<T>) {
    const T* w = weight_of(a, k);
    Vec<T> acc[P];
    start<T, P>(*a.epilogue, k, acc);
    for (int64_t r = 0; r < a.row_count; ++r, w += S * kDepthwiseBlock) {
      Vec<T> weight[S];
      for (int s = 0; s < S; ++s) weight[s] = load(w + s * kDepthwiseBlock);
      kernel_row<T, S, STRIDE, P, LEFT, RIGHT>(a.rows[r] + a.x + k, pixel, weight, acc,
                                               MakeIndices<(P - 1) * STRIDE + S>{});
    }
    finish(a, k, 0, acc, MakeIndices<P>{});
  }
}

template <class T, int... I>
NNARCH_INLINE void kernel_tap(const T* x, const Steps& pixel, Vec<T> weight, Vec<T>* acc,
                              Indices<I...>) {
  ((acc[I] += load(step<I>(x, pixel)) * weight), ...);
}

// Kernels of any width and stride: a load for every multiply-add.
template <class T, int P>
void strip_general(const Strip<T>& a) {
  const Steps pixel(a.stride * a.pixel);
  for (int64_t k = 0; k < a.channels; k += kLanes<T>) {
    const T* w = weight_of(a, k);
    Vec<T> acc[P];
    start<T, P>(*a.epilogue, k, acc);
    for (int64_t r = 0; r < a.row_count; ++r)
      for (int64_t s = 0; s < a.s; ++s, w += kDepthwiseBlock)
        kernel_tap<T>(a.rows[r] + a.x + k + s * a.pixel, pixel, load(w), acc, MakeIndices<P>{});
    finish(a, k, 0, acc, MakeIndices<P>{});
  }
}

}  // namespace nnarch::NNARCH_ISA
