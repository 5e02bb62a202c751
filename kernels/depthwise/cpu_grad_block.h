// The weight gradient in registers: P pixels of grad against R kernel rows of S taps.
//
// A pixel of x is loaded once and meets every tap that it belongs to: 22 loads for 36 multiply-adds
// of a 3×3 kernel, where tap after tap took 40. The sums stay in registers over the blocks of a
// run of pixels.
#pragma once

#include "depthwise/cpu_strip.h"

namespace nnarch::NNARCH_ISA {

// Some pixels of one row of grad against some kernel rows of x.
template <class T>
struct GradRow {
  const T* const* rows;  // of x
  int64_t x;             // where in them the first column of the first pixel is
  int64_t x_pixel;
  const T* g;
  int64_t g_pixel;
  int64_t n;         // pixels of g
  int64_t channels;  // whole vectors
  T* partial;        // at the first of the kernel rows
  int64_t block;     // from one block of channels to the next
};

template <class T>
NNARCH_INLINE T* partial_of(const GradRow<T>& a, int64_t k) {
  return a.partial + k / kDepthwiseBlock * a.block + k % kDepthwiseBlock;
}

// Column I of x with every tap: tap J meets pixel (I - J) / STRIDE.
template <class T, int STRIDE, int P, int I, int... J>
NNARCH_INLINE void use_taps(Vec<T> x, const Vec<T>* g, Vec<T>* sum, Indices<J...>) {
  (add_product < (I - J) % STRIDE == 0 && I >= J &&
       (I - J) / STRIDE<P>(sum[J], x, g[I >= J && (I - J) / STRIDE < P ? (I - J) / STRIDE : 0]),
   ...);
}

template <class T, int S, int STRIDE, int P, bool PRESENT, int LEFT, int I>
NNARCH_INLINE void grad_column(const T*& x, const Steps& pixel, const Vec<T>* g, Vec<T>* sum) {
  if constexpr (PRESENT) {
    Vec<T> value = load(step<I - LEFT>(x, pixel));
    keep_in_register(value);
    use_taps<T, STRIDE, P, I>(value, g, sum, MakeIndices<S>{});
  }
}

template <class T, int S, int STRIDE, int P, int LEFT, int RIGHT, int... I>
NNARCH_INLINE void grad_row(const T* x, const Steps& pixel, const Vec<T>* g, Vec<T>* sum,
                            Indices<I...>) {
  constexpr int columns = sizeof...(I);
  (grad_column<T, S, STRIDE, P, (I >= LEFT && I < columns - RIGHT), LEFT, I>(x, pixel, g, sum),
   ...);
}

template <class T, int P, int... I>
NNARCH_INLINE void load_grad(const T* p, const Steps& pixel, Vec<T>* g, Indices<I...>) {
  ((g[I] = load(step<I>(p, pixel))), ...);
}

// a.n / P blocks, in kernel rows Q. The first LEFT columns and the last RIGHT lie outside the
// image; there is more than one block only where both are 0.
template <class T, int S, int STRIDE, int P, int LEFT, int RIGHT, int... Q>
NNARCH_INLINE void grad_blocks(const GradRow<T>& a, Indices<Q...>) {
  constexpr int taps = sizeof...(Q) * S;
  const Steps x_pixel(a.x_pixel), g_pixel(a.g_pixel);
  for (int64_t k = 0; k < a.channels; k += kLanes<T>) {
    T* partial = partial_of(a, k);
    Vec<T> sum[taps];
    for (int i = 0; i < taps; ++i) sum[i] = load(partial + i * kDepthwiseBlock);
    const T* g_at = a.g + k;
    int64_t at = a.x + k;
    for (int64_t p = 0; p + P <= a.n; p += P, g_at += P * a.g_pixel, at += P * STRIDE * a.x_pixel) {
      Vec<T> g[P];
      load_grad<T, P>(g_at, g_pixel, g, MakeIndices<P>{});
      (grad_row<T, S, STRIDE, P, LEFT, RIGHT>(a.rows[Q] + at, x_pixel, g, sum + Q * S,
                                              MakeIndices<(P - 1) * STRIDE + S>{}),
       ...);
    }
    for (int i = 0; i < taps; ++i) store(partial + i * kDepthwiseBlock, sum[i]);
  }
}

// Kernel rows whose sums fit the registers beside P pixels of grad and one of x.
template <int S>
inline constexpr int kGradRows = kVectorBytes == 64 || S == 3 ? 3
                                 : S == 5                     ? 2
                                                              : 1;

template <class T, int S, int STRIDE, int P, int LEFT, int RIGHT>
void grad_all_rows(const GradRow<T>& given, int64_t count) {
  constexpr int most = kGradRows<S>;
  GradRow<T> a = given;
  while (count > 0) {
    const int64_t done = count < most ? count : most;
    if (done == 1) grad_blocks<T, S, STRIDE, P, LEFT, RIGHT>(a, MakeIndices<1>{});
    if constexpr (most >= 2)
      if (done == 2) grad_blocks<T, S, STRIDE, P, LEFT, RIGHT>(a, MakeIndices<2>{});
    if constexpr (most >= 3)
      if (done == 3) grad_blocks<T, S, STRIDE, P, LEFT, RIGHT>(a, MakeIndices<3>{});
    a.rows += done;
    a.partial += done * S * kDepthwiseBlock;
    count -= done;
  }
}

// The code for one kernel width and stride. Null: there is none.
template <class T>
struct GradCode {
  using Fn = void (*)(const GradRow<T>&, int64_t);
  Fn inside, left, right, single;  // `single`: the pixels that make no block, one after the other
};
template <class T, int S, int STRIDE>
inline constexpr GradCode<T> kGrad = {grad_all_rows<T, S, STRIDE, kGradPixels, 0, 0>,
                                      grad_all_rows<T, S, STRIDE, kGradPixels, S / 2, 0>,
                                      grad_all_rows<T, S, STRIDE, kGradPixels, 0, S / 2>,
                                      grad_all_rows<T, S, STRIDE, 1, 0, 0>};

template <class T>
const GradCode<T>* grad_code(int64_t s, int64_t stride) {
  if (s == 3) return stride == 1 ? &kGrad<T, 3, 1> : stride == 2 ? &kGrad<T, 3, 2> : nullptr;
  if (s == 5) return stride == 1 ? &kGrad<T, 5, 1> : stride == 2 ? &kGrad<T, 5, 2> : nullptr;
  if (s == 7) return stride == 1 ? &kGrad<T, 7, 1> : stride == 2 ? &kGrad<T, 7, 2> : nullptr;
  return nullptr;
}

}  // namespace nnarch::NNARCH_ISA
