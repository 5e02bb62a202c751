// How the values of a window combine: by maximum or by sum. For *_isa.cpp.
#pragma once

#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {

// The machine's maximum: x where it is larger, else `best`. What it makes of NaN differs.
template <class T>
NNARCH_INLINE Vec<T> larger(Vec<T> x, Vec<T> best) {
#if defined(NNARCH_ISA_avx512)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_max_ps((__m512)x, (__m512)best);
  else
    return (Vec<T>)_mm512_max_pd((__m512d)x, (__m512d)best);
#elif defined(NNARCH_ISA_avx2)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_max_ps((__m256)x, (__m256)best);
  else
    return (Vec<T>)_mm256_max_pd((__m256d)x, (__m256d)best);
#else
  return x > best ? x : best;
#endif
}

// Whether a NaN was seen among many vectors. Next to the machine's maximum a comparison for every
// two inputs is cheap, where a maximum that keeps NaN takes four instructions a tap.
template <class T>
class NaNWatch {
 public:
#if defined(NNARCH_ISA_avx512)
  NNARCH_INLINE void see(Vec<T> a, Vec<T> b) {
    // Not as a masked comparison, whose latency would be that of the chain.
    if constexpr (sizeof(T) == 4)
      none_ = _kand_mask16(none_, _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_ORD_Q));
    else
      none_ = _kand_mask16(none_, _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_ORD_Q));
  }
  NNARCH_INLINE void merge(const NaNWatch& other) { none_ = _kand_mask16(none_, other.none_); }
  NNARCH_INLINE bool any() const {
    const unsigned all = (1u << kLanes<T>)-1u;
    return (none_ & all) != all;
  }

 private:
  __mmask16 none_ = static_cast<__mmask16>(~0u);  // not in these lanes
#else
  NNARCH_INLINE void see(Vec<T> a, Vec<T> b) {
#if defined(NNARCH_ISA_avx2)
    if constexpr (sizeof(T) == 4)
      seen_ |= (Lanes)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q);
    else
      seen_ |= (Lanes)_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_UNORD_Q);
#else
    seen_ |= (a != a) | (b != b);
#endif
  }
  NNARCH_INLINE void merge(const NaNWatch& other) { seen_ |= other.seen_; }
  NNARCH_INLINE bool any() const {
    bool found = false;
    for (int i = 0; i < kLanes<T>; ++i) found |= seen_[i] != 0;
    return found;
  }

 private:
  using Lanes = decltype(Vec<T>{} != Vec<T>{});
  Lanes seen_{};
#endif
};

struct NoWatch {
  template <class V>
  NNARCH_INLINE void see(V, V) {}
  NNARCH_INLINE void merge(NoWatch) {}
  NNARCH_INLINE bool any() const { return false; }
};

// A running maximum of numbers. Where its watch has seen a NaN, the result is void.
template <class T>
struct Maximum {
  using Watch = NaNWatch<T>;
  static constexpr T kIdentity = -static_cast<T>(__builtin_huge_val());
  Vec<T> value = broadcast(kIdentity);

  Maximum() = default;
  NNARCH_INLINE explicit Maximum(Vec<T> a) : value(a) {}
  NNARCH_INLINE void take(Vec<T> a) { value = larger<T>(a, value); }
  static NNARCH_INLINE Vec<T> join(Vec<T> a, Vec<T> b) { return larger<T>(a, b); }
  static NNARCH_INLINE Vec<T> scaled(Vec<T> v, Vec<T>) { return v; }
};

// The same, in which a NaN wins.
template <class T>
struct ExactMaximum {
  using Watch = NoWatch;
  static constexpr T kIdentity = Maximum<T>::kIdentity;
  Vec<T> value = broadcast(kIdentity);

  ExactMaximum() = default;
  NNARCH_INLINE explicit ExactMaximum(Vec<T> a) : value(a) {}
  NNARCH_INLINE void take(Vec<T> a) { value = max<T>(value, a); }
  static NNARCH_INLINE Vec<T> scaled(Vec<T> v, Vec<T>) { return v; }
};

template <class T>
struct Sum {
  using Watch = NoWatch;
  static constexpr T kIdentity = 0;
  Vec<T> value{};

  Sum() = default;
  NNARCH_INLINE explicit Sum(Vec<T> a) : value(a) {}
  NNARCH_INLINE void take(Vec<T> a) { value += a; }
  static NNARCH_INLINE Vec<T> join(Vec<T> a, Vec<T> b) { return a + b; }
  static NNARCH_INLINE Vec<T> scaled(Vec<T> v, Vec<T> scale) { return v * scale; }
};

// load(row, column) of KH x KW taps combined. The watch sees those of the first S rows and columns:
// the others are seen as taps of the next windows.
template <class Acc, int KH, int KW, int S, class F>
NNARCH_INLINE auto reduce(typename Acc::Watch& watch, const F& load) {
  Acc acc(load(0, 0));
  for (int i = 0; i < KH; ++i)
    for (int j = 0; j < KW; ++j)
      if (i + j > 0) acc.take(load(i, j));
  constexpr int rows = S < KH ? S : KH, columns = S < KW ? S : KW;
  // In pairs, along the longer side.
  if constexpr (columns > 1) {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; j += 2)
        watch.see(load(i, j), load(i, j + 1 < columns ? j + 1 : j));
  } else {
    for (int i = 0; i < rows; i += 2) watch.see(load(i, 0), load(i + 1 < rows ? i + 1 : i, 0));
  }
  return acc.value;
}

// Calls f(Count<n>{}) for 1 to 3, f(Count<0>{}) for others: common windows unroll their taps.
template <class F>
NNARCH_INLINE auto with_taps(int64_t n, const F& f) {
  if (n == 2) return f(Count<2>{});
  if (n == 3) return f(Count<3>{});
  if (n == 1) return f(Count<1>{});
  return f(Count<0>{});
}

}  // namespace nnarch::NNARCH_ISA
