// Half types converted run by run, and dot products with rows of half-type weights.
#include "cpu/epilogue_isa.h"
#include "cpu/half_kernels.h"
#include "cpu/simd.h"
#include "cpu/stored_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

constexpr int64_t kFloats = kLanes<float>;

template <class S>
void widen_run(const uint16_t* bits, float* to, int64_t n) {
  const S* from = reinterpret_cast<const S*>(bits);
  int64_t i = 0;
  for (; i + 4 * kFloats <= n; i += 4 * kFloats) {
    const Vec<float> a = load_as(from + i), b = load_as(from + i + kFloats),
                     c = load_as(from + i + 2 * kFloats), d = load_as(from + i + 3 * kFloats);
    store(to + i, a), store(to + i + kFloats, b);
    store(to + i + 2 * kFloats, c), store(to + i + 3 * kFloats, d);
  }
  for (; i < n; i += kFloats) {
    const int64_t left = n - i < kFloats ? n - i : kFloats;
    store_n(to + i, load_as(from + i, left), left);
  }
}

template <class S>
void narrow_run(const float* from, uint16_t* bits, int64_t n) {
  S* to = reinterpret_cast<S*>(bits);
  int64_t i = 0;
  for (; i + 4 * kFloats <= n; i += 4 * kFloats) {
    const Vec<float> a = load(from + i), b = load(from + i + kFloats),
                     c = load(from + i + 2 * kFloats), d = load(from + i + 3 * kFloats);
    store_as(to + i, a), store_as(to + i + kFloats, b);
    store_as(to + i + 2 * kFloats, c), store_as(to + i + 3 * kFloats, d);
  }
  for (; i < n; i += kFloats) {
    const int64_t left = n - i < kFloats ? n - i : kFloats;
    store_as(to + i, load_n(from + i, left), left);
  }
}

// As dot_rows of gemm_isa.cpp: one row of weights past a few rows of x, in independent sums.
template <class S, int Chains, int... I>
NNARCH_INLINE void dot_rows(Indices<I...>, const float* x, int64_t x_stride, const S* w,
                            int64_t depth, float* y, int64_t y_stride) {
  constexpr int64_t step = kFloats * Chains, rows = sizeof...(I) / Chains;
  const float* at[sizeof...(I)] = {(x + I / Chains * x_stride + I % Chains * kFloats)...};
  Vec<float> sum[sizeof...(I)] = {(static_cast<void>(I), Vec<float>{})...};
  int64_t k = 0;
  for (; k + step <= depth; k += step)
    ((sum[I] += load(at[I] + k) * load_as(w + k + I % Chains * kFloats)), ...);
  for (; k < depth; k += kFloats) {
    const int64_t left = depth - k < kFloats ? depth - k : kFloats;
    for (int64_t r = 0; r < rows; ++r)
      sum[r * Chains] += load_n(at[r * Chains] + k, left) * load_as(w + k, left);
  }
  for (int64_t r = 0; r < rows; ++r) {
    Vec<float> total = sum[r * Chains];
    for (int i = 1; i < Chains; ++i) total += sum[r * Chains + i];
    y[r * y_stride] = horizontal_sum<float>(total);
  }
}

template <class S, int Rows, int Chains>
NNARCH_NOINLINE void rows_by_weights(const float* x, int64_t x_stride, const S* w, int64_t w_stride,
                                     int64_t depth, int64_t n, float* y, int64_t y_stride) {
  for (int64_t j = 0; j < n; ++j)
    dot_rows<S, Chains>(MakeIndices<Rows * Chains>{}, x, x_stride, w + j * w_stride, depth, y + j,
                        y_stride);
}

template <class S>
void few_rows(const float* x, int64_t x_stride, int64_t m, const uint16_t* bits, int64_t w_stride,
              int64_t depth, int64_t n, float* y, int64_t y_stride,
              const Epilogue<float>& epilogue) {
  const S* w = reinterpret_cast<const S*>(bits);
  for (int64_t r = 0; r < m; r += 4) {
    constexpr decltype(&rows_by_weights<S, 1, 8>) of[] = {
        rows_by_weights<S, 1, 8>, rows_by_weights<S, 2, 4>, rows_by_weights<S, 3, 2>,
        rows_by_weights<S, 4, 2>};
    const int64_t count = m - r < 4 ? m - r : 4;
    of[count - 1](x + r * x_stride, x_stride, w, w_stride, depth, n, y + r * y_stride, y_stride);
  }
  for (int64_t r = 0; r < m; ++r) finish_row<float>(epilogue, r * y_stride, n, y + r * y_stride);
}

void finish(const Epilogue<float>& epilogue, int64_t offset, int64_t n, float* y) {
  finish_row<float>(epilogue, offset, n, y);
}

template <class S>
constexpr HalfTable kTable = {widen_run<S>, narrow_run<S>, few_rows<S>, finish};

}  // namespace

const HalfTable& half_table(bool bfloat16) { return bfloat16 ? kTable<BFloat16> : kTable<Float16>; }

}  // namespace nnarch::NNARCH_ISA
