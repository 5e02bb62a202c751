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

// The lanes in which a NaN was seen. One comparison looks at two vectors: next to the maximum
// itself that is half an instruction for a tap, where a maximum that keeps NaN takes four.
template <class T>
class NaNs {
 public:
#if defined(NNARCH_ISA_avx512)
  NNARCH_INLINE NaNs(Vec<T> a, Vec<T> b) : none_(static_cast<__mmask16>(~0)) { see(a, b); }
  NNARCH_INLINE void see(Vec<T> a, Vec<T> b) {
    if constexpr (sizeof(T) == 4)
      none_ = _mm512_mask_cmp_ps_mask(none_, (__m512)a, (__m512)b, _CMP_ORD_Q);
    else
      none_ = _mm512_mask_cmp_pd_mask(static_cast<__mmask8>(none_), (__m512d)a, (__m512d)b,
                                      _CMP_ORD_Q);
  }
  NNARCH_INLINE void merge(const NaNs& other) { none_ = _kand_mask16(none_, other.none_); }
  NNARCH_INLINE bool any() const {
    return none_ != static_cast<__mmask16>((1u << kLanes<T>)-1u);
  }
  NNARCH_INLINE Vec<T> mark(Vec<T> v) const {
    const Vec<T> nan = broadcast<T>(static_cast<T>(__builtin_nan("")));
    if constexpr (sizeof(T) == 4)
      return (Vec<T>)_mm512_mask_blend_ps(none_, (__m512)nan, (__m512)v);
    else
      return (Vec<T>)_mm512_mask_blend_pd(static_cast<__mmask8>(none_), (__m512d)nan, (__m512d)v);
  }

 private:
  __mmask16 none_;  // not in these lanes
#else
  NNARCH_INLINE NaNs(Vec<T> a, Vec<T> b) : seen_(look(a, b)) {}
  NNARCH_INLINE void see(Vec<T> a, Vec<T> b) { seen_ |= look(a, b); }
  NNARCH_INLINE void merge(const NaNs& other) { seen_ |= other.seen_; }
  NNARCH_INLINE bool any() const {
    bool found = false;
    for (int i = 0; i < kLanes<T>; ++i) found |= seen_[i] != 0;
    return found;
  }
  // All bits set are a NaN.
  NNARCH_INLINE Vec<T> mark(Vec<T> v) const { return (Vec<T>)((Lanes)v | seen_); }

 private:
  using Lanes = decltype(Vec<T>{} != Vec<T>{});
  static NNARCH_INLINE Lanes look(Vec<T> a, Vec<T> b) {
#if defined(NNARCH_ISA_avx2)
    if constexpr (sizeof(T) == 4)
      return (Lanes)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q);
    else
      return (Lanes)_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_UNORD_Q);
#else
    return (a != a) | (b != b);
#endif
  }
  Lanes seen_;
#endif
};

// A running maximum, in which a NaN wins.
template <class T>
struct Maximum {
  Vec<T> value;
  NaNs<T> nans;

  static constexpr T kIdentity = -static_cast<T>(__builtin_huge_val());
  NNARCH_INLINE Maximum() : Maximum(broadcast(kIdentity)) {}
  NNARCH_INLINE explicit Maximum(Vec<T> a) : value(a), nans(a, a) {}
  NNARCH_INLINE Maximum(Vec<T> a, Vec<T> b) : value(larger<T>(b, a)), nans(a, b) {}
  NNARCH_INLINE void take(Vec<T> a) { take(a, a); }
  NNARCH_INLINE void take(Vec<T> a, Vec<T> b) {
    value = larger<T>(b, larger<T>(a, value));
    nans.see(a, b);
  }
  NNARCH_INLINE Vec<T> result() const { return nans.mark(value); }
  static NNARCH_INLINE Vec<T> scaled(Vec<T> v, Vec<T>) { return v; }
};

template <class T>
struct Sum {
  Vec<T> value;

  static constexpr T kIdentity = 0;
  NNARCH_INLINE Sum() : value{} {}
  NNARCH_INLINE explicit Sum(Vec<T> a) : value(a) {}
  NNARCH_INLINE Sum(Vec<T> a, Vec<T> b) : value(a + b) {}
  NNARCH_INLINE void take(Vec<T> a) { value += a; }
  NNARCH_INLINE void take(Vec<T> a, Vec<T> b) { value += a + b; }
  NNARCH_INLINE Vec<T> result() const { return value; }
  static NNARCH_INLINE Vec<T> scaled(Vec<T> v, Vec<T> scale) { return v * scale; }
};

// load(0), load(1), … combined, two at a time.
template <class Acc, int taps, class F>
NNARCH_INLINE Acc reduce(const F& load) {
  if constexpr (taps == 1) {
    return Acc(load(0));
  } else if constexpr (taps % 2 == 1) {
    Acc acc(load(0));
    for (int t = 1; t < taps; t += 2) acc.take(load(t), load(t + 1));
    return acc;
  } else {
    Acc acc(load(0), load(1));
    for (int t = 2; t < taps; t += 2) acc.take(load(t), load(t + 1));
    return acc;
  }
}

// A number known to the compiler, as an argument.
template <int value>
struct Code {
  static constexpr int is = value;
};

// Calls f(Code<n>{}) for 1 to 3, f(Code<0>{}) for others: common windows unroll their taps.
template <class F>
NNARCH_INLINE auto with_taps(int64_t n, const F& f) {
  if (n == 2) return f(Code<2>{});
  if (n == 3) return f(Code<3>{});
  if (n == 1) return f(Code<1>{});
  return f(Code<0>{});
}

}  // namespace nnarch::NNARCH_ISA
