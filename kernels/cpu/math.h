// exp, tanh, sigmoid and the normal distribution on vectors. For *_isa.cpp files.
//
// Errors are a few ulp (tests/kernels/test_activation.py holds the bounds); that of the normal
// distribution grows with z² in its tail. Infinities and NaN give what the C functions give. The
// polynomials are minimax fits.
#pragma once

#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {

// The bits of a vector, unsigned so that >> is a logical shift.
template <class T>
struct Bits;
template <>
struct Bits<float> {
  typedef uint32_t V __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Bits<double> {
  typedef uint64_t V __attribute__((vector_size(kVectorBytes)));
};

template <class T>
NNARCH_INLINE Vec<T> abs(Vec<T> x) {
  typedef typename Bits<T>::V B;
  return (Vec<T>)((B)x & ~(B)broadcast<T>(T(-0.0)));
}

// The magnitude of x with the sign of `sign`.
template <class T>
NNARCH_INLINE Vec<T> copy_sign(Vec<T> x, Vec<T> sign) {
  typedef typename Bits<T>::V B;
  const B mask = (B)broadcast<T>(T(-0.0));
  return (Vec<T>)(((B)x & ~mask) | ((B)sign & mask));
}

// c[0] + c[1]·x + … + c[N-1]·x^(N-1)
template <class T, int N>
NNARCH_INLINE Vec<T> polynomial(Vec<T> x, const T (&c)[N]) {
  Vec<T> p = broadcast<T>(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) p = p * x + c[i];
  return p;
}

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float round = 12582912.0f;  // adding it leaves the integer in the low bits
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float low = -104.0f, high = 89.0f;  // exp is 0 and infinite beyond
  static constexpr int exponent_bias = 127, mantissa_bits = 23;
  // (exp(r) - 1 - r) / r² for |r| <= ln(2)/2
  static constexpr float c[] = {5.0000000939e-1f, 1.6666519329e-1f, 4.1666208153e-2f,
                                8.3688505008e-3f, 1.3950385816e-3f};
};

template <>
struct ExpConstants<double> {
  static constexpr double round = 6755399441055744.0;
  static constexpr double ln2_high = 0x1.62e42fefa3800p-1, ln2_low = 0x1.ef35793c76730p-45;
  static constexpr double low = -746.0, high = 710.0;
  static constexpr int exponent_bias = 1023, mantissa_bits = 52;
  static constexpr double c[] = {
      4.9999999999999981336e-1, 1.6666666666666717417e-1, 4.1666666666687526697e-2,
      8.3333333332964946954e-3, 1.3888888881426573046e-3, 1.9841269938559311088e-4,
      2.4801598994052976430e-5, 2.7557198768040811875e-6, 2.7548930068957605877e-7,
      2.5123089255866885685e-8, 2.3149843703041689330e-9};
};

// x = n·ln(2) + r. `expm1_r` is exp(r) - 1; 2^n is the product of `scale` and `scale2`, so that
// results next to overflow and underflow come out right.
template <class T>
struct ExpParts {
  Vec<T> expm1_r, scale, scale2;
};

template <class T>
NNARCH_INLINE ExpParts<T> exp_parts(Vec<T> x) {
  typedef typename Bits<T>::V B;
  using K = ExpConstants<T>;
  x = clamp<T>(x, broadcast<T>(K::low), broadcast<T>(K::high));
  const Vec<T> shifted = x * T(1.44269504088896340736) + K::round;
  const Vec<T> n = shifted - K::round;
  const Vec<T> r = (x - n * K::ln2_high) - n * K::ln2_low;
  constexpr int offset = 2048;  // keeps the halved exponent positive
  const B exponent = (B)shifted - (B)broadcast<T>(K::round);
  const B half = ((exponent + offset) >> 1) - offset / 2;
  return {polynomial<T>(r, K::c) * r * r + r,
          (Vec<T>)((half + K::exponent_bias) << K::mantissa_bits),
          (Vec<T>)((exponent - half + K::exponent_bias) << K::mantissa_bits)};
}

template <class T>
NNARCH_INLINE Vec<T> exp(Vec<T> x) {
#if defined(NNARCH_ISA_avx512)
  if constexpr (sizeof(T) == 4) {  // one instruction scales by 2^n, to zero and infinity as well
    using K = ExpConstants<T>;
    x = clamp<T>(x, broadcast<T>(K::low), broadcast<T>(K::high));
    const Vec<T> n = x * T(1.44269504088896340736) + K::round - K::round;
    const Vec<T> r = (x - n * K::ln2_high) - n * K::ln2_low;
    const Vec<T> p = polynomial<T>(r, K::c) * r * r + r + T(1);
    return (Vec<T>)_mm512_scalef_ps((__m512)p, (__m512)n);
  }
#endif
  const ExpParts<T> parts = exp_parts<T>(x);
  return (parts.expm1_r + T(1)) * parts.scale * parts.scale2;
}

// 1 / x for 1 <= x <= 2^127, off by one unit in the last place at most; 0 from 2^126 on.
NNARCH_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(NNARCH_ISA_avx512)
  const Vec<float> guess = (Vec<float>)_mm512_rcp14_ps((__m512)x);  // a third of a division's time
  return guess + guess * (1.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// 1 / (1 + e) for e from 0 to infinity. What is below the smallest normal number is 0 here: the
// kernels flush denormals.
template <class T>
NNARCH_INLINE Vec<T> one_over_one_plus(Vec<T> e) {
#if defined(NNARCH_ISA_avx512)
  if constexpr (sizeof(T) == 4) {  // infinity times 0 would be NaN
    const Vec<T> most = broadcast<T>(0x1p127f);
    return reciprocal((Vec<T>)_mm512_min_ps((__m512)most, (__m512)(e + T(1))));
  }
#endif
  return T(1) / (e + T(1));
}

template <class T>
NNARCH_INLINE Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (exp<T>(-x) + T(1));
}

// tanh(x) = e / (e + 2) with e = exp(2|x|) - 1, which has no cancellation anywhere.
template <class T>
NNARCH_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> saturated = broadcast<T>(T(20));  // tanh(20) rounds to 1 in both types
  const Vec<T> magnitude = clamp<T>(abs<T>(x), Vec<T>{}, saturated);
  const ExpParts<T> parts = exp_parts<T>(magnitude * T(2));
  const Vec<T> power = parts.scale * parts.scale2;
  const Vec<T> e = parts.expm1_r * power + (power - T(1));
  return copy_sign<T>(e / (e + T(2)), x);
}

// The normal distribution: the probability below z, and the density at z.
template <class T>
struct Normal {
  Vec<T> cdf, density;
};

// With u = 1 / (1 + 0.3|z|), the tail beyond |z| is exp(-z²/2)·u·q(1 - u) for every z.
NNARCH_INLINE Normal<float> normal(Vec<float> z) {
  static constexpr float q[] = {
      5.0e-1f,         -8.298071803e-1f, 6.181452075e-1f, -8.102032911e-2f, -1.39728453e-1f,
      2.334788924e-2f, 1.015319512e-2f,  7.112317929e-2f, -7.313970824e-2f, 2.061283529e-2f};
  const Vec<float> slope = clamp<float>(abs<float>(z), Vec<float>{}, Vec<float>{} + 20.0f) * 0.3f;
  const Vec<float> u = reciprocal(slope + 1.0f);
  const Vec<float> bell = exp<float>(z * z * -0.5f);
  const Vec<float> tail = bell * u * polynomial<float>(slope * u, q);
  return {z < 0.0f ? tail : 1.0f - tail, bell * 0.398942280f};
}

// Doubles are for checking gradients: erfc of the C library, lane by lane.
NNARCH_INLINE Normal<double> normal(Vec<double> z) {
  Vec<double> cdf;
  for (int i = 0; i < kLanes<double>; ++i)
    cdf[i] = 0.5 * __builtin_erfc(-0.70710678118654752440 * z[i]);
  return {cdf, exp<double>(z * z * -0.5) * 0.39894228040143267794};
}

// z·Φ(z), GELU, half the work of the above: Φ(z) - 1/2 is z times a rational function of z², within
// 5e-9, up to |z| = 5.4, where it reaches 1/2. Like torch's, and unlike `normal`, the result is not
// accurate relative to itself where z is far below zero and Φ a difference of equals.
NNARCH_INLINE Vec<float> gelu(Vec<float> z) {
  static constexpr float p[] = {3.98942232e-1f, 3.33719850e-2f,  4.650835879e-3f,
                                1.64319179e-4f, 6.360000953e-6f, 2.338691196e-8f};
  static constexpr float q[] = {
      1.0f, 2.50317246e-1f, 2.837854624e-2f, 1.858967124e-3f, 7.239937258e-5f, 1.216594796e-6f};
  const Vec<float> square = clamp<float>(z * z, Vec<float>{}, Vec<float>{} + 29.16f);
  const Vec<float> above =
      z * (polynomial<float>(square, p) * reciprocal(polynomial<float>(square, q)));
  const Vec<float> half = Vec<float>{} + 0.5f;
  return z * (clamp<float>(above, -half, half) + half);
}
NNARCH_INLINE Vec<double> gelu(Vec<double> z) { return z * normal(z).cdf; }

}  // namespace nnarch::NNARCH_ISA
