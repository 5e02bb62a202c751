// What softmax needs on vectors: powers of two, the logarithm of a sum. For *_isa.cpp files.
//
// A weight is 2^(unit · (score - maximum)) with a unit of log2(e) and what is left of the scale: it
// is multiplied behind the subtraction, where it rounds least. The polynomial is off by 1.3 ulp at
// most and exactly 1 at 0; a score of -infinity gives exactly 0.
#pragma once

#include "cpu/math.h"

namespace nnarch::NNARCH_ISA {

inline constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

template <class T>
inline constexpr T kInfinity = static_cast<T>(__builtin_huge_val());

template <class T>
struct Exp2Constants;
template <>
struct Exp2Constants<float> {
  // Adding it leaves the integer part plus the exponent's bias in the low bits.
  static constexpr float round = 12582912.0f + 127.0f, low = -127.0f;
  static constexpr int mantissa_bits = 23;
  static constexpr float c[] = {1.0f,         0.693147f,    0.24022242f,
                                0.055507336f, 0.009671513f, 0.0013264726f};
};
template <>
struct Exp2Constants<double> {
  static constexpr double round = 6755399441055744.0 + 1023.0, low = -1023.0;
  static constexpr int mantissa_bits = 52;
  static constexpr double c[] = {1.0,
                                 6.9314718055994530942e-1,
                                 2.4022650695910071233e-1,
                                 5.5504108664821579953e-2,
                                 9.6181291076284771619e-3,
                                 1.3333558146428443423e-3,
                                 1.5403530393381609954e-4,
                                 1.5252733804059840280e-5,
                                 1.3215486790144309488e-6,
                                 1.0178086009239699727e-7,
                                 7.0549116208011233299e-9,
                                 4.4455382718708114976e-10,
                                 2.5678435993488205141e-11,
                                 1.3691488853904128881e-12};
};

// 2^(unit · x) for unit > 0 and x <= 0 (and for products up to 126). 0 for -infinity, NaN for NaN.
template <class T>
class Power {
 public:
  explicit NNARCH_INLINE Power(T unit)
      : unit_(broadcast(unit)), low_(broadcast(Exp2Constants<T>::low / unit)) {}

  NNARCH_INLINE Vec<T> operator()(Vec<T> x) const {
    using K = Exp2Constants<T>;
#if defined(NNARCH_ISA_avx512)
    // x minus its nearest integer, which is 0 for infinities: nothing to clamp.
    x *= unit_;
    if constexpr (sizeof(T) == 4) {
      const Vec<T> r = (Vec<T>)_mm512_reduce_ps((__m512)x, _MM_FROUND_NO_EXC);
      return (Vec<T>)_mm512_scalef_ps((__m512)polynomial<T>(r, K::c), (__m512)(x - r));
    } else {
      const Vec<T> r = (Vec<T>)_mm512_reduce_pd((__m512d)x, _MM_FROUND_NO_EXC);
      return (Vec<T>)_mm512_scalef_pd((__m512d)polynomial<T>(r, K::c), (__m512d)(x - r));
    }
#else
    typedef typename Bits<T>::V B;
    x = at_least<T>(x, low_);
    const Vec<T> shifted = x * unit_ + K::round;
    const Vec<T> r = x * unit_ - (shifted - K::round);
    return polynomial<T>(r, K::c) * (Vec<T>)((B)shifted << K::mantissa_bits);
#endif
  }

 private:
  Vec<T> unit_, low_;
};

template <class T>
NNARCH_INLINE Vec<T> exp2(Vec<T> x) {
  return Power<T>(T(1))(x);
}

// The distance of two positive numbers' bits, as a number.
NNARCH_INLINE Vec<float> bits_apart(Vec<float> a, Vec<float> b) {
  typedef int32_t Signed __attribute__((vector_size(kVectorBytes)));
  return __builtin_convertvector((Signed)a - (Signed)b, Vec<float>);
}
NNARCH_INLINE Vec<double> bits_apart(Vec<double> a, Vec<double> b) {
  typedef int64_t Signed __attribute__((vector_size(kVectorBytes)));
  return __builtin_convertvector((Signed)a - (Signed)b, Vec<double>);
}

// log2(x) for x = 0 (-infinity) and from 2^-100 up; NaN for NaN.
template <class T>
NNARCH_INLINE Vec<T> log2(Vec<T> x) {
  // The bits of a number are its logarithm already, within 0.09; what is missing is that of
  // x·2^-guess, which is close to 1: 2·atanh(z) with z = (e - 1) / (e + 1).
  constexpr T unit = sizeof(T) == 4 ? T(0x1p-23) : T(0x1p-52);
  const Vec<T> guess = bits_apart(x, broadcast<T>(T(1))) * unit;
  const Vec<T> e = x * exp2<T>(-guess);
  const Vec<T> z = (e - T(1)) / (e + T(1)), zz = z * z;
  static constexpr T c[] = {T(1), T(1.0 / 3), T(1.0 / 5), T(1.0 / 7), T(1.0 / 9), T(1.0 / 11)};
  const Vec<T> y = guess + z * polynomial<T>(zz, c) * T(2 * kLog2E);
  return x == T(0) ? broadcast<T>(-kInfinity<T>) : y;
}

}  // namespace nnarch::NNARCH_ISA
