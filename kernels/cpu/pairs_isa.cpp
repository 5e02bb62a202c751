// Register tiles of bfloat16 pairs: 14 rows by two vectors, as for floats (gemm_tile_isa.h).
#include "cpu/pairs.h"

#include "cpu/gemm_step_isa.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {

#if defined(NNARCH_ISA_avx512)

namespace {

// Beyond the flags of the set: run only where the CPU says that it has them.
#define NNARCH_PAIRS __attribute__((target("avx512bf16")))

constexpr int kPairRows = 14, kPairColumns = 32;

struct PairRows : EvenRows<uint16_t> {
  using EvenRows::EvenRows;
  template <int I>
  NNARCH_INLINE __m512i pair() const {
    int bits;
    __builtin_memcpy(&bits, row<I>(), sizeof bits);
    return _mm512_set1_epi32(bits);
  }
  template <int I>
  NNARCH_INLINE __m512i last() const {
    return _mm512_set1_epi32(*row<I>());
  }
  NNARCH_INLINE void next_pair() {
    p0 += 4, p5 += 4, p10 += 4;
    pin();
  }
};

NNARCH_PAIRS inline __attribute__((always_inline)) Vec<float> add_pairs(Vec<float> sum, __m512bh x,
                                                                        __m512bh b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, x, b);
}

template <bool Both, int... I>
NNARCH_PAIRS inline __attribute__((always_inline)) void tile_of(Indices<I...>, const PairsBlock& p,
                                                                int64_t row, const uint16_t* b,
                                                                int64_t column) {
  constexpr int count = sizeof...(I);
  Vec<float> left[count] = {(static_cast<void>(I), Vec<float>{})...};
  Vec<float> right[count] = {(static_cast<void>(I), Vec<float>{})...};
  PairRows rows(p.a + row * p.a_step, p.a_step);
  for (int64_t k = p.depth / 2; k > 0; --k) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b);
    const __m512bh b1 = Both ? (__m512bh)_mm512_loadu_si512(b + kPairColumns) : b0;
    __m512bh x;
    ((x = (__m512bh)rows.template pair<I>(), left[I] = add_pairs(left[I], x, b0),
      right[I] = Both ? add_pairs(right[I], x, b1) : right[I]),
     ...);
    b += 2 * kPairColumns;
    rows.next_pair();
  }
  if (p.depth % 2) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b);
    const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + kPairColumns);
    __m512bh x;
    ((x = (__m512bh)rows.template last<I>(), left[I] = add_pairs(left[I], x, b0),
      right[I] = add_pairs(right[I], x, b1)),
     ...);
  }
  const int64_t n = p.n - column;
  const auto m0 = static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1u);
  const auto m1 = static_cast<__mmask16>(n >= 32 ? 0xffff : n > 16 ? (1u << (n - 16)) - 1u : 0);
  if (p.y) {
    const int64_t none[count] = {};
    apply_epilogue<float>(Indices<I...>{}, p.epilogue.from_channel(column), none, n, left, right);
    uint16_t* y = p.y + row * p.y_step + column;
    ((_mm256_mask_storeu_epi16(y + I * p.y_step, m0, (__m256i)_mm512_cvtneps_pbh((__m512)left[I])),
      _mm256_mask_storeu_epi16(y + I * p.y_step + 16, m1,
                               (__m256i)_mm512_cvtneps_pbh((__m512)right[I]))),
     ...);
    return;
  }
  float* c = p.c + row * p.c_step + column;
  ((_mm512_mask_storeu_ps(c + I * p.c_step, m0, (__m512)left[I]),
    _mm512_mask_storeu_ps(c + I * p.c_step + 16, m1, (__m512)right[I])),
   ...);
}

template <bool Both, int Rows>
NNARCH_PAIRS NNARCH_NOINLINE void tile(const PairsBlock& p, int64_t row, const uint16_t* b,
                                       int64_t column) {
  tile_of<Both>(MakeIndices<Rows>{}, p, row, b, column);
}

typedef void (*Tile)(const PairsBlock&, int64_t, const uint16_t*, int64_t);

template <bool Both, int... I>
Tile tile_with(Indices<I...>, int64_t rows) {
  static constexpr Tile tiles[] = {tile<Both, I + 1>...};
  return tiles[rows - 1];
}

void run(const PairsBlock& p) {
  const int64_t panel = (p.depth + 1) / 2 * 2 * kPairColumns;
  const int64_t tiles = (p.m + kPairRows - 1) / kPairRows;
  for (int64_t column = 0; column < p.n; column += kPairColumns) {
    const uint16_t* b = p.b + column / kPairColumns * panel;
    const bool both = p.n - column > kPairColumns / 2;
    for (int64_t t = 0; t < tiles; ++t) {  // of even heights
      const int64_t from = p.m * t / tiles, rows = p.m * (t + 1) / tiles - from;
      const MakeIndices<kPairRows> all{};
      (both ? tile_with<true>(all, rows) : tile_with<false>(all, rows))(p, from, b, column);
    }
  }
}

// A row of weights past `Rows` rows of x, in `Chains` independent sums for each.
template <int Rows, int Chains, int... I>
NNARCH_PAIRS inline __attribute__((always_inline)) void dot_rows(Indices<I...>, const uint16_t* x,
                                                                 int64_t x_step, const uint16_t* w,
                                                                 int64_t depth, float* y,
                                                                 int64_t y_step) {
  constexpr int lanes = 32;
  Vec<float> sum[Rows * Chains] = {(static_cast<void>(I), Vec<float>{})...};
  int64_t k = 0;
  for (; k + lanes * Chains <= depth; k += lanes * Chains)
    ((sum[I] = add_pairs(
          sum[I], (__m512bh)_mm512_loadu_si512(x + I / Chains * x_step + k + I % Chains * lanes),
          (__m512bh)_mm512_loadu_si512(w + k + I % Chains * lanes))),
     ...);
  for (; k < depth; k += lanes) {
    const __mmask32 mask = depth - k < lanes ? (1u << (depth - k)) - 1u : ~0u;
    const __m512bh b = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + k);
    for (int r = 0; r < Rows; ++r)
      sum[r * Chains] = add_pairs(sum[r * Chains],
                                  (__m512bh)_mm512_maskz_loadu_epi16(mask, x + r * x_step + k), b);
  }
  for (int r = 0; r < Rows; ++r) {
    Vec<float> total = sum[r * Chains];
    for (int i = 1; i < Chains; ++i) total += sum[r * Chains + i];
    y[r * y_step] = horizontal_sum<float>(total);
  }
}

template <int Rows, int Chains>
NNARCH_PAIRS NNARCH_NOINLINE void rows_by_weights(const uint16_t* x, int64_t x_step,
                                                  const uint16_t* w, int64_t w_step, int64_t depth,
                                                  int64_t n, float* y, int64_t y_step) {
  for (int64_t j = 0; j < n; ++j)
    dot_rows<Rows, Chains>(MakeIndices<Rows * Chains>{}, x, x_step, w + j * w_step, depth, y + j,
                           y_step);
}

void few_rows(const uint16_t* x, int64_t x_step, int64_t m, const uint16_t* w, int64_t w_step,
              int64_t depth, int64_t n, float* y, int64_t y_step) {
  constexpr decltype(&rows_by_weights<1, 8>) of[] = {rows_by_weights<1, 8>, rows_by_weights<2, 4>,
                                                     rows_by_weights<3, 4>, rows_by_weights<4, 4>};
  of[m - 1](x, x_step, w, w_step, depth, n, y, y_step);
}

constexpr PairsTable kPairs = {kPairColumns, run, few_rows};

}  // namespace

const PairsTable* pairs_table() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has ? &kPairs : nullptr;
}

#else

const PairsTable* pairs_table() { return nullptr; }

#endif

}  // namespace nnarch::NNARCH_ISA
