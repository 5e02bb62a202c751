// Planes (NCHW) as one long row: for images narrower than a vector, and for dilation.
//
// Where the output is as wide as the input, a tap is one distance in memory for all pixels: output
// i meets x[i + shift]. Vectors then run over the ends of rows, and which lanes of a tap lie inside
// the image is looked up (FlatTaps in cpu_flat.h). Seven by seven pixels are 4 vectors and not 7.
#include "cpu/wide.h"
#include "depthwise/cpu_plane.h"

namespace nnarch::NNARCH_ISA {
namespace {

// The lanes of p whose bit is set; the other lanes are zero and their memory is not touched.
template <class T>
NNARCH_INLINE Vec<T> load_lanes(const T* p, unsigned bits) {
#if defined(NNARCH_ISA_avx512)
  return load_in_row<false>(p, RowMask<T>{bits});
#elif defined(NNARCH_ISA_avx2)
  if constexpr (sizeof(T) == 4) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
    return load_in_row<false>(p, RowMask<T>{_mm256_cmpeq_epi32(_mm256_and_si256(all, bit), bit)});
  } else {
    const __m256i bit = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i all = _mm256_set1_epi64x(bits);
    return load_in_row<false>(p, RowMask<T>{_mm256_cmpeq_epi64(_mm256_and_si256(all, bit), bit)});
  }
#else
  Vec<T> v{};
  for (int i = 0; i < kLanes<T>; ++i)
    if (bits >> i & 1) v[i] = p[i];
  return v;
#endif
}

template <class T, int... I>
NNARCH_INLINE Vec<T> use_taps(const T* x, const int64_t* shift, const uint16_t* lanes,
                              const Vec<T>* weight, Indices<I...>) {
  Vec<T> sum[2] = {};  // a single sum would wait for itself
  ((sum[I % 2] += load_lanes(x + shift[I], lanes[I]) * weight[I]), ...);
  return sum[0] + sum[1];
}

template <class T, int S>
NNARCH_INLINE void vectors(const DepthwisePlane<T>& a, const Vec<T>* weight) {
  const int64_t count = a.oh * a.ow;
  const uint16_t* lanes = a.flat.lanes;
  for (int64_t i = 0; i < count; i += kLanes<T>, lanes += S * S) {
    const int64_t n = count - i < kLanes<T> ? count - i : kLanes<T>;
    finish(a.epilogue, use_taps(a.x + i, a.flat.shift, lanes, weight, MakeIndices<S * S>{}), i, n,
           a.y);
  }
}

template <class T, int S>
void plane(const DepthwisePlane<T>& a) {
  Vec<T> weight[S * S];
  for (int i = 0; i < S * S; ++i) weight[i] = broadcast(a.weight[i * kDepthwiseBlock]);
  if constexpr (kHoldsWeights<S>) {
    Vec<T> held[S * S];
    hold<T>(weight, held, MakeIndices<S * S>{});
    vectors<T, S>(a, held);
  } else {
    vectors<T, S>(a, weight);
  }
  activate_plane(a);
}

template <class T>
void run(const DepthwisePlane<T>& a) {
  if (a.s == 3) return plane<T, 3>(a);
  if (a.s == 5) return plane<T, 5>(a);
  plane<T, 7>(a);
}

template <class T, int... I>
NNARCH_INLINE void add_taps(const T* x, const FlatTaps& taps, const uint16_t* lanes, Vec<T> g,
                            Vec<T>* sum, Indices<I...>) {
  ((sum[I] += load_lanes(x + taps.shift[I], lanes[I]) * g), ...);
}

// Sums are named one by one: in a loop, they would stay in memory.
template <class T, int... I>
void channel(const DepthwisePlaneGrad<T>& a, Indices<I...> taps) {
  constexpr int64_t w = kLanes<T>;
  const int64_t count = a.oh * a.ow;
  Vec<T> sum[sizeof...(I)];
  ((sum[I] = Vec<T>{}), ...);
  Wide<T> total;
  for (int64_t n = 0; n < a.images; ++n) {
    const T* x = a.x + n * a.x_image;
    const T* grad = a.g + n * a.g_image;
    const uint16_t* lanes = a.flat.lanes;
    for (int64_t i = 0; i < count; i += w, lanes += sizeof...(I)) {
      const Vec<T> g = load_n(grad + i, count - i);
      add_taps(x + i, a.flat, lanes, g, sum, taps);
      if (a.db) total.add(g);
    }
  }
  ((a.dw[I] = horizontal_sum<T>(sum[I])), ...);
  if (a.db) *a.db = static_cast<T>(total.total());
}

template <class T>
void run_grad(const DepthwisePlaneGrad<T>& a) {
  if (a.s == 3) return channel<T>(a, MakeIndices<9>{});
  channel<T>(a, MakeIndices<25>{});
}

}  // namespace

template <>
DepthwisePlaneRun<float> depthwise_plane_flat_run<float>() {
  return run<float>;
}
template <>
DepthwisePlaneRun<double> depthwise_plane_flat_run<double>() {
  return run<double>;
}
template <>
DepthwisePlaneGradRun<float> depthwise_plane_flat_grad_run<float>() {
  return run_grad<float>;
}
template <>
DepthwisePlaneGradRun<double> depthwise_plane_flat_grad_run<double>() {
  return run_grad<double>;
}

}  // namespace nnarch::NNARCH_ISA
