// The product for few rows: every weight is read once, several panels at a time, each in cache
// order; the bandwidth of reading them is the floor.
#include "recurrent/few_rows_isa.h"
#include "cpu/simd.h"
#include "recurrent/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {
namespace {

// One chain of 512 additions a sum cost 1.6 times torch's error: chains of this length are added.
constexpr int64_t kChain = 256;

// Vector v of row k in panel `b`.
NNARCH_INLINE Vec<float> weights(const float* b) { return load(b); }
NNARCH_INLINE Vec<double> weights(const double* b) { return load(b); }
NNARCH_INLINE Vec<float> weights(const uint16_t* b) { return load_bfloat16(b); }

template <class T, class W, int R, int P, int... I>
NNARCH_INLINE void rows_by_panels(Indices<I...>, const FewRows<T, W>& p, const T* a, const W* b,
                                  T* c, const T* start) {
  constexpr int64_t w = kLanes<T>, nr = 2 * w;
  constexpr int vectors = 2 * P;  // of a row; sum I is vector I % vectors of row I / vectors
  const int64_t panel = p.depth * nr;
  for (int64_t k = 0; k < p.depth || k == 0; k += kChain) {
    const int64_t count = p.depth - k < kChain ? p.depth - k : kChain;
    Vec<T> sum[sizeof...(I)] = {(static_cast<void>(I), Vec<T>{})...};
    const T* at = a + k;
    const W* from = b + k * nr;
#pragma GCC unroll 2
    for (int64_t i = 0; i < count; ++i, ++at, from += nr) {
      Vec<T> x[R];
      for (int r = 0; r < R; ++r) x[r] = broadcast(at[r * p.a_step]);
      ((sum[I] += x[I / vectors] * weights(from + I % vectors / 2 * panel + I % 2 * w)), ...);
    }
    const bool first = k == 0;
    ((sum[I] += first ? (start ? load(start + I % vectors * w) : Vec<T>{})
                      : load(c + I / vectors * p.c_step + I % vectors * w),
      store(c + I / vectors * p.c_step + I % vectors * w, sum[I])),
     ...);
  }
}

template <class T, class W, int R, int P>
NNARCH_NOINLINE void panels_of(const FewRows<T, W>& p, const T* a, const W* b, T* c,
                               const T* start) {
  rows_by_panels<T, W, R, P>(MakeIndices<2 * R * P>{}, p, a, b, c, start);
}

// Panels at a time: as many as there are registers for the sums.
template <class T, class W, int R>
NNARCH_INLINE void all_panels(const FewRows<T, W>& p) {
  constexpr int64_t nr = 2 * kLanes<T>;
  constexpr int most = kFewSums / (2 * R) < 4 ? kFewSums / (2 * R) : 4;
  int64_t j = 0;
  const auto at = [&](auto panels) NNARCH_INLINE_LAMBDA {
    panels_of<T, W, R, decltype(panels)::count>(p, p.a, p.b + j * p.depth * nr, p.c + j * nr,
                                                p.start ? p.start + j * nr : nullptr);
  };
  for (; j + most <= p.panels; j += most) at(Count<most>{});
  if constexpr (most > 2)
    if (p.panels - j == 3) return at(Count<3>{});
  if constexpr (most > 1)
    if (p.panels - j >= 2) at(Count<2>{}), j += 2;
  if (j < p.panels) at(Count<1>{});
}

}  // namespace

template <class T, class W>
void few_rows(const FewRows<T, W>& p) {
  if (p.rows == 1) return all_panels<T, W, 1>(p);
  if (p.rows == 2) return all_panels<T, W, 2>(p);
  if (p.rows == 3) return all_panels<T, W, 3>(p);
  all_panels<T, W, 4>(p);
}

template void few_rows<float, float>(const FewRows<float, float>&);
template void few_rows<double, double>(const FewRows<double, double>&);
template void few_rows<float, uint16_t>(const FewRows<float, uint16_t>&);

void to_bfloat16(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, from + i, 4);
    const bool nan = from[i] != from[i];
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);  // to the nearest, ties to even
    to[i] = static_cast<uint16_t>(nan ? 0x7fc0 : rounded >> 16);
  }
}

void from_bfloat16(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    __builtin_memcpy(to + i, &bits, 4);
  }
}

}  // namespace nnarch::NNARCH_ISA
