// The weight gradient of planes (NCHW): vectors along the rows, a vector of sums for every tap.
//
// As in plane_isa.cpp, a vector of x serves all rows of grad that it meets; so many kernel rows at
// a time that their sums stay in registers.
#include "cpu/wide.h"
#include "depthwise/cpu_kernels.h"
#include "depthwise/cpu_row.h"

namespace nnarch::NNARCH_ISA {
namespace {

// Kernel rows at a time, and rows of grad in a block.
template <int S>
inline constexpr int kTapRows = kVectorBytes == 64 ? (S == 7 ? 3 : S)
                                : S == 3           ? 3
                                : S == 5           ? 2
                                                   : 1;
template <int S, int STRIDE>
inline constexpr int kGradRows = S == 5 || STRIDE == 2 ? 2 : 4;

template <class T, int S, int K, int K_COUNT, int... C>
NNARCH_INLINE void use_taps(const Vec<T>* value, Vec<T> g, Vec<T>* sum, Indices<C...>) {
  if constexpr (K >= 0 && K < K_COUNT) ((sum[K * S + C] += value[C] * g), ...);
}

// Input row I of a block against grad rows R; a null one lies outside the image.
template <class T, int S, int STRIDE, int K_COUNT, bool INSIDE, int I, int... R>
NNARCH_INLINE void use_row(const T* row, int64_t at, const RowMask<T>* mask, const Vec<T>* g,
                           Vec<T>* sum, Indices<R...>) {
  if (row == nullptr) return;
  Vec<T> value[S];
  load_taps<STRIDE, INSIDE, S>(row + at, mask, value, MakeIndices<S>{});
  (use_taps<T, S, I - R * STRIDE, K_COUNT>(value, g[R], sum, MakeIndices<S>{}), ...);
}

template <class T, int S, int STRIDE, int K_COUNT, bool INSIDE, class Rows, int... I>
NNARCH_INLINE void use_rows(const T* const* rows, int64_t at, const RowMask<T>* mask,
                            const Vec<T>* g, Vec<T>* sum, Rows grads, Indices<I...>) {
  (use_row<T, S, STRIDE, K_COUNT, INSIDE, I>(rows[I], at, mask, g, sum, grads), ...);
}

// Rows oy, … of grad; `row`: of x, the one that kernel row 0 of this group meets for output 0.
template <class T, int S, int STRIDE, int K_COUNT, int ROWS>
NNARCH_INLINE void block_row(const DepthwisePlaneGrad<T>& a, const T* x, const T* g, int64_t row,
                             int64_t oy, Vec<T>* sum) {
  constexpr int reach = (ROWS - 1) * STRIDE + K_COUNT, w = kLanes<T>;
  constexpr int span = STRIDE == 1 ? w + S - 1 : 2 * w + S - 1;
  const T* rows[reach];
  for (int i = 0; i < reach; ++i) {
    const int64_t iy = oy * STRIDE + row + i;
    rows[i] = iy >= 0 && iy < a.h ? x + iy * a.w : nullptr;
  }
  for (int64_t ox = 0; ox < a.ow; ox += w) {
    const int64_t first = ox * STRIDE + a.column, n = a.ow - ox;
    Vec<T> grad[ROWS];
    for (int r = 0; r < ROWS; ++r) grad[r] = load_n(g + (oy + r) * a.ow + ox, n < w ? n : w);
    RowMask<T> mask[S + 1] = {};
    if (first >= 0 && first + span <= a.w && n >= w) {
      use_rows<T, S, STRIDE, K_COUNT, true>(rows, first, mask, grad, sum, MakeIndices<ROWS>{},
                                            MakeIndices<reach>{});
    } else {
      make_masks<STRIDE, S, T>(first, a.w, n < w ? n : w, mask);
      use_rows<T, S, STRIDE, K_COUNT, false>(rows, first, mask, grad, sum, MakeIndices<ROWS>{},
                                             MakeIndices<reach>{});
    }
  }
}

// Kernel rows k_first, … of one image. Sums are named one by one: in a loop, they would stay in
// memory.
template <class T, int S, int STRIDE, int K_COUNT, int... I>
NNARCH_NOINLINE void add_plane(const DepthwisePlaneGrad<T>& a, const T* x, const T* g,
                               int64_t k_first, Indices<I...>) {
  constexpr int rows = kGradRows<S, STRIDE>;
  Vec<T> sum[K_COUNT * S];
  ((sum[I] = Vec<T>{}), ...);
  const int64_t row = a.row + k_first;
  int64_t oy = 0;
  for (; oy + rows <= a.oh; oy += rows)
    block_row<T, S, STRIDE, K_COUNT, rows>(a, x, g, row, oy, sum);
  for (; oy < a.oh; ++oy) block_row<T, S, STRIDE, K_COUNT, 1>(a, x, g, row, oy, sum);
  T* dw = a.dw + k_first * S;
  ((dw[I] += horizontal_sum<T>(sum[I])), ...);
}

template <class T>
double sum_of_plane(const T* g, int64_t n) {
  Wide<T> sum;
  int64_t i = 0;
  for (; i + kBurst * kLanes<T> <= n; i += kBurst * kLanes<T>) {
    Vec<T> part = load(g + i);
    for (int j = 1; j < kBurst; ++j) part += load(g + i + j * kLanes<T>);
    sum.add(part);
  }
  for (; i < n; i += kLanes<T>) sum.add(load_n(g + i, n - i));
  return sum.total();
}

template <class T, int S, int STRIDE>
void channel(const DepthwisePlaneGrad<T>& a) {
  constexpr int most = kTapRows<S>, rest = S % most;
  for (int i = 0; i < S * S; ++i) a.dw[i] = 0;
  double db = 0;
  for (int64_t n = 0; n < a.images; ++n) {
    const T* x = a.x + n * a.x_image;
    const T* g = a.g + n * a.g_image;
    for (int64_t k = 0; k + most <= S; k += most)
      add_plane<T, S, STRIDE, most>(a, x, g, k, MakeIndices<most * S>{});
    if constexpr (rest > 0)
      add_plane<T, S, STRIDE, rest>(a, x, g, S - rest, MakeIndices<rest * S>{});
    if (a.db) db += sum_of_plane(g, a.oh * a.ow);
  }
  if (a.db) *a.db = static_cast<T>(db);
}

template <class T>
void run(const DepthwisePlaneGrad<T>& a) {
  const bool one = a.stride == 1;
  if (a.s == 3) return one ? channel<T, 3, 1>(a) : channel<T, 3, 2>(a);
  if (a.s == 5) return one ? channel<T, 5, 1>(a) : channel<T, 5, 2>(a);
  return one ? channel<T, 7, 1>(a) : channel<T, 7, 2>(a);
}

}  // namespace

template <>
DepthwisePlaneGradRun<float> depthwise_plane_grad_run<float>() {
  return run<float>;
}
template <>
DepthwisePlaneGradRun<double> depthwise_plane_grad_run<double>() {
  return run<double>;
}

}  // namespace nnarch::NNARCH_ISA
