// The input gradient at stride 2 of planes (NCHW): quads (cpu_quad.h) with vectors along the rows.
//
// A vector holds neighbouring quads. Its four sums, of even and odd rows and columns of dx, come
// from the same few loads of grad; even and odd columns are interleaved and written in one piece.
#include "depthwise/cpu_plane.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <int S>
inline constexpr int kReach = (S + 1) / 2;

// The products of a vector of grad, row and column J and I back, with its four taps.
template <class T, int S, int J, int I>
NNARCH_INLINE void use_vector(Vec<T> g, const Vec<T>* weight, Vec<T>* sum) {
  constexpr int tap = 2 * J * S + 2 * I;
  sum[0] += g * weight[tap];
  if constexpr (2 * I + 1 < S) sum[1] += g * weight[tap + 1];
  if constexpr (2 * J + 1 < S) sum[2] += g * weight[tap + S];
  if constexpr (2 * I + 1 < S && 2 * J + 1 < S) sum[3] += g * weight[tap + S + 1];
}

template <class T, int S, bool INSIDE, int J, int... I>
NNARCH_INLINE void use_row(const T* row, int64_t at, const RowMask<T>* mask, const Vec<T>* weight,
                           Vec<T>* sum, Indices<I...>) {
  if (row == nullptr) return;
  (use_vector<T, S, J, I>(load_in_row<INSIDE>(row + at - I, mask[I]), weight, sum), ...);
}

template <class T, int S, bool INSIDE, int... J>
NNARCH_INLINE void use_rows(const T* const* rows, int64_t at, const RowMask<T>* mask,
                            const Vec<T>* weight, Vec<T>* sum, Indices<J...>) {
  (use_row<T, S, INSIDE, J>(rows[J], at, mask, weight, sum, MakeIndices<kReach<S>>{}), ...);
}

// One half of even[0], odd[0], even[1], odd[1], …
template <int HIGH, class V, int... I>
NNARCH_INLINE V interleave(V even, V odd, Indices<I...>) {
  constexpr int lanes = sizeof...(I);
  return __builtin_shufflevector(even, odd, (HIGH * lanes / 2 + I / 2 + I % 2 * lanes)...);
}

template <bool INSIDE, class T>
NNARCH_INLINE void write_row(T* y, int64_t column, int64_t width, Vec<T> even, Vec<T> odd) {
  constexpr int w = kLanes<T>;
  const Vec<T> low = interleave<0>(even, odd, MakeIndices<w>{});
  const Vec<T> high = interleave<1>(even, odd, MakeIndices<w>{});
  store_in_row<INSIDE>(y + column, low, lanes_in_row<T>(column, width));
  store_in_row<INSIDE>(y + column + w, high, lanes_in_row<T>(column + w, width));
}

// The quads from column `at` on, in one row of them; y: its two rows of dx, null outside the image.
template <class T, int S, bool INSIDE>
NNARCH_INLINE void block(const DepthwisePlane<T>& a, const T* const* rows, T* const* y,
                         const Vec<T>* weight, int64_t at) {
  RowMask<T> mask[kReach<S>] = {};
  if constexpr (!INSIDE)
    for (int i = 0; i < kReach<S>; ++i) mask[i] = lanes_in_row<T>(at - i, a.w);
  Vec<T> sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = Vec<T>{};
  use_rows<T, S, INSIDE>(rows, at, mask, weight, sum, MakeIndices<kReach<S>>{});
  const int64_t column = 2 * at + a.column;
  if (y[0]) write_row<INSIDE>(y[0], column, a.ow, sum[0], sum[1]);
  if (y[1]) write_row<INSIDE>(y[1], column, a.ow, sum[2], sum[3]);
}

template <class T, int S>
NNARCH_INLINE void quad_rows(const DepthwisePlane<T>& a, const Vec<T>* weight) {
  constexpr int reach = kReach<S>;
  constexpr int64_t w = kLanes<T>;
  const int64_t top = -a.row, left = -a.column;
  for (int64_t row = top / 2; 2 * row - top < a.oh; ++row) {
    const T* rows[reach];
    T* y[2];
    for (int64_t j = 0; j < reach; ++j)
      rows[j] = row - j >= 0 && row - j < a.h ? a.x + (row - j) * a.w : nullptr;
    for (int64_t r = 0; r < 2; ++r) {
      const int64_t oy = 2 * row + r - top;
      y[r] = oy < 0 || oy >= a.oh ? nullptr : a.y + oy * a.ow;
    }
    for (int64_t at = left / 2; 2 * at - left < a.ow; at += w) {
      const bool inside =
          at >= reach - 1 && at + w <= a.w && 2 * at >= left && 2 * (at + w) - left <= a.ow;
      if (inside)
        block<T, S, true>(a, rows, y, weight, at);
      else
        block<T, S, false>(a, rows, y, weight, at);
    }
  }
}

template <class T, int S>
void plane(const DepthwisePlane<T>& a) {
  Vec<T> weight[S * S];
  for (int i = 0; i < S * S; ++i) weight[i] = broadcast(a.weight[i * kDepthwiseBlock]);
  if constexpr (kHoldsWeights<S>) {
    Vec<T> held[S * S];
    hold<T>(weight, held, MakeIndices<S * S>{});
    quad_rows<T, S>(a, held);
  } else {
    quad_rows<T, S>(a, weight);
  }
}

template <class T>
void run(const DepthwisePlane<T>& a) {
  if (a.s == 3) return plane<T, 3>(a);
  if (a.s == 5) return plane<T, 5>(a);
  plane<T, 7>(a);
}

}  // namespace

template <>
DepthwisePlaneRun<float> depthwise_plane_quads_run<float>() {
  return run<float>;
}
template <>
DepthwisePlaneRun<double> depthwise_plane_quads_run<double>() {
  return run<double>;
}

}  // namespace nnarch::NNARCH_ISA
