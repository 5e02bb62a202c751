// s^-beta on vectors. For *_isa.cpp files.
//
// 0 gives infinity, infinity 0, and what is negative or NaN gives NaN (the C library's power knows
// better for integer beta). Errors are a few ulp.
#pragma once

#include "cpu/math.h"
#include "local_response_norm/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {

template <class T>
NNARCH_INLINE Vec<T> square_root(Vec<T> x) {
#if defined(NNARCH_ISA_avx512)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_sqrt_ps((__m512)x);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_sqrt_pd((__m512d)x);
#elif defined(NNARCH_ISA_avx2)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_sqrt_ps((__m256)x);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
#else
  for (int i = 0; i < kLanes<T>; ++i)
    x[i] = static_cast<T>(sizeof(T) == 4 ? __builtin_sqrtf(static_cast<float>(x[i]))
                                         : __builtin_sqrt(x[i]));
#endif
  return x;
}

// 1/√x to eleven bits at least.
NNARCH_INLINE Vec<float> rough_rsqrt(Vec<float> x) {
#if defined(NNARCH_ISA_avx512)
  return (Vec<float>)_mm512_rsqrt14_ps((__m512)x);
#elif defined(NNARCH_ISA_avx2)
  return (Vec<float>)_mm256_rsqrt_ps((__m256)x);
#else
  return 1.0f / square_root<float>(x);
#endif
}

// A guess and a correction by a series take 12 instructions without a division or a root, which
// would cost 27 cycles a vector of 16.
NNARCH_INLINE Vec<float> power_minus_three_quarters(Vec<float> s) {
  const Vec<float> root = rough_rsqrt(s);
  const Vec<float> guess = root * (root * rough_rsqrt(root));
  const Vec<float> u = (s * guess) * guess;  // about s^(-1/2): no product leaves the range
  const Vec<float> h = 1.0f - u * (u * s);   // guess = s^(-3/4) · (1 - h)^(1/4)
  const Vec<float> p = guess + guess * h * (h * 0.15625f + 0.25f);
  return p == p ? p : root;  // the guess itself where s is 0 or infinite
}

NNARCH_INLINE Vec<float> power_minus_half(Vec<float> s) {
  const Vec<float> guess = rough_rsqrt(s);
  const Vec<float> h = 1.0f - (s * guess) * guess;
  const Vec<float> p = guess + guess * h * (h * 0.375f + 0.5f);
  return p == p ? p : guess;
}

NNARCH_INLINE Vec<double> power_minus_half(Vec<double> s) { return 1.0 / square_root<double>(s); }
NNARCH_INLINE Vec<double> power_minus_three_quarters(Vec<double> s) {
  const Vec<double> root = power_minus_half(s);
  return root * square_root<double>(root);
}

// log(x) to 11 digits, for x >= 0: what a float's power needs.
NNARCH_INLINE Vec<double> log_for_float(Vec<double> x) {
  typedef Bits<double>::V B;
  static constexpr double c[] = {2.0, 2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11, 2.0 / 13};
  const Vec<double> zero{}, infinity = zero + __builtin_huge_val();
  const B bits = (B)x, offset = bits - (B)broadcast<double>(0.70710678118654752440);
  const B exponent = (B)((offset >> 52) << 52);  // of x / m with m from √½ to √2
  const Vec<double> m = (Vec<double>)(bits - exponent);
  // The exponent as a number: 2^52 + its low bits, of which it has twelve, two's complement.
  const B biased = ((exponent >> 52) + 1024) & 4095;
  const Vec<double> n = (Vec<double>)(biased | (B)broadcast<double>(0x1p52)) - (0x1p52 + 1024);
  const Vec<double> z = (m - 1.0) / (m + 1.0);
  const Vec<double> log = n * 0.69314718055994530942 + z * polynomial<double>(z * z, c);
  return x == zero ? -infinity : (x < infinity ? log : x);  // NaN stays
}

template <int half>
NNARCH_INLINE Vec<double> power_of_half(Vec<float> s, double exponent) {
  constexpr int lanes = kLanes<double>;
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Half part;
  __builtin_memcpy(&part, reinterpret_cast<const char*>(&s) + half * sizeof(part), sizeof(part));
  static_assert(lanes * sizeof(float) == sizeof(part));
  const Vec<double> wide = __builtin_convertvector(part, Vec<double>);
  const Vec<double> nan = (Vec<double>{}) + __builtin_nan("");
  return wide < 0.0 ? nan : exp<double>(log_for_float(wide) * exponent);
}

NNARCH_INLINE Vec<float> power_of_any(Vec<float> s, double exponent) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  const Half halves[] = {__builtin_convertvector(power_of_half<0>(s, exponent), Half),
                         __builtin_convertvector(power_of_half<1>(s, exponent), Half)};
  Vec<float> p;
  __builtin_memcpy(&p, halves, sizeof(p));
  return p;
}

template <class T>
NNARCH_NOINLINE Vec<T> power_of_library(Vec<T> s, double exponent) {
  for (int i = 0; i < kLanes<T>; ++i)
    s[i] = static_cast<T>(
        sizeof(T) == 4 ? __builtin_powf(static_cast<float>(s[i]), static_cast<float>(exponent))
                       : __builtin_pow(s[i], exponent));
  return s;
}

template <class T, Power power>
NNARCH_INLINE Vec<T> inverse_power(Vec<T> s, double beta) {
  if constexpr (power == Power::three_quarters) return power_minus_three_quarters(s);
  if constexpr (power == Power::half) return power_minus_half(s);
  if constexpr (power == Power::any && sizeof(T) == 4) return power_of_any(s, -beta);
  return power_of_library<T>(s, -beta);
}

// A power as a type, and one switch outside the loops.
template <Power value>
struct PowerIs {
  static constexpr Power power = value;
};

template <class F>
NNARCH_INLINE void with_power(Power power, const F& f) {
  switch (power) {
    case Power::three_quarters:
      return f(PowerIs<Power::three_quarters>{});
    case Power::half:
      return f(PowerIs<Power::half>{});
    case Power::any:
      return f(PowerIs<Power::any>{});
    case Power::library:
      return f(PowerIs<Power::library>{});
  }
}

}  // namespace nnarch::NNARCH_ISA
