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

template <bool Both, int... I>
NNARCH_PAIRS inline __attribute__((always_inline)) void tile_of(Indices<I...>, const PairsBlock& p,
                                                                int64_t row, const uint16_t* b,
                                                                int64_t column) {
  constexpr int count = sizeof...(I);
  __m512 left[count] = {(static_cast<void>(I), _mm512_setzero_ps())...};
  __m512 right[count] = {(static_cast<void>(I), _mm512_setzero_ps())...};
  PairRows rows(p.a + row * p.a_step, p.a_step);
  for (int64_t k = p.depth / 2; k > 0; --k) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b);
    const __m512bh b1 = Both ? (__m512bh)_mm512_loadu_si512(b + kPairColumns) : b0;
    __m512bh x;
    ((x = (__m512bh)rows.template pair<I>(), left[I] = _mm512_dpbf16_ps(left[I], x, b0),
      right[I] = Both ? _mm512_dpbf16_ps(right[I], x, b1) : right[I]),
     ...);
    b += 2 * kPairColumns;
    rows.next_pair();
  }
  if (p.depth % 2) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b);
    const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + kPairColumns);
    __m512bh x;
    ((x = (__m512bh)rows.template last<I>(), left[I] = _mm512_dpbf16_ps(left[I], x, b0),
      right[I] = _mm512_dpbf16_ps(right[I], x, b1)),
     ...);
  }
  float* c = p.c + row * p.c_step + column;
  const int64_t n = p.n - column;
  if (n >= kPairColumns) {
    ((_mm512_storeu_ps(c + I * p.c_step, left[I]),
      _mm512_storeu_ps(c + I * p.c_step + 16, right[I])),
     ...);
    return;
  }
  const auto m0 = static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1u);
  const auto m1 = static_cast<__mmask16>(n > 16 ? (1u << (n - 16)) - 1u : 0);
  ((_mm512_mask_storeu_ps(c + I * p.c_step, m0, left[I]),
    _mm512_mask_storeu_ps(c + I * p.c_step + 16, m1, right[I])),
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

constexpr PairsTable kPairs = {kPairColumns, run};

}  // namespace

const PairsTable* pairs_table() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has ? &kPairs : nullptr;
}

#else

const PairsTable* pairs_table() { return nullptr; }

#endif

}  // namespace nnarch::NNARCH_ISA
