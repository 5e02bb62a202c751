// What a neuron makes of its input. For *_isa.cpp files.
#pragma once

#include "cpu/activation.h"

namespace nnarch::NNARCH_ISA {

// tanh in float as x·p(x²)/q(x²), the approximation of Eigen's ptanh: as accurate as the one over
// exp in cpu/math.h and half its work, which a batch of reservoirs feels (a fifth of its time).
NNARCH_INLINE Vec<float> rational_tanh(Vec<float> value) {
  static constexpr float p[] = {
      4.89352455891786e-03f,  6.37261928875436e-04f, 1.48572235717979e-05f, 5.12229709037114e-08f,
      -8.60467152213735e-11f, 2.00018790482477e-13f, -2.76076847742355e-16f};
  static constexpr float q[] = {4.89352518554385e-03f, 2.26843463243900e-03f, 1.18534705686654e-04f,
                                1.19825839466702e-06f};
  const Vec<float> one = broadcast<float>(1.0f), edge = broadcast<float>(7.90531110763549805f);
  const Vec<float> x = clamp<float>(value, -edge, edge), square = x * x;
  // reciprocal() is good to an ulp for every normal number, and q lies between 0.0048 and 0.6.
  const Vec<float> y = x * polynomial<float>(square, p) * reciprocal(polynomial<float>(square, q));
  const Vec<float> bounded = clamp<float>(y, -one, one);
  return abs<float>(value) < 0.0004f ? value : bounded;
}

template <class T, int code>
NNARCH_INLINE Vec<T> respond(Vec<T> z) {
  if constexpr (code == kTanh && sizeof(T) == 4)
    return rational_tanh(z);
  else
    return activate_as<T, code>(z, T(0));
}

// Calls f with the activation's code as a constant.
template <class F>
NNARCH_INLINE void with_response(int activation, const F& f) {
  if (activation == kTanh) return f(Code<kTanh>{});
  if (activation == kSigmoid) return f(Code<kSigmoid>{});
  if (activation == kRelu) return f(Code<kRelu>{});
  return f(Code<kNone>{});
}

}  // namespace nnarch::NNARCH_ISA
