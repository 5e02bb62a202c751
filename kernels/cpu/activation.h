// Activation functions on vectors, with first and second derivatives. For *_isa.cpp files.
//
// The derivatives are functions of `saved`: the output y where the kind allows it (relu, relu6,
// leaky_relu, hardsigmoid, tanh, sigmoid), the input z otherwise (hardswish, silu, gelu,
// gelu_tanh). What happens at corners and on NaN is what torch does.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/math.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {

// tanh's argument in gelu_tanh, √(2/π)·(z + 0.044715·z³), and its derivative. Past |z| = 10 tanh
// is 1 to the last bit; the clamp keeps infinity times zero out of the derivatives.
template <class T>
struct GeluTanh {
  Vec<T> z, tanh, slope;
  NNARCH_INLINE explicit GeluTanh(Vec<T> x)
      : z(clamp<T>(x, broadcast<T>(T(-10)), broadcast<T>(T(10)))) {
    constexpr T k = T(0.79788456080286535588), cubic = T(0.044715);
    const Vec<T> square = z * z;
    tanh = NNARCH_ISA::tanh<T>(z * k * (square * cubic + T(1)));
    slope = (square * (3 * cubic) + T(1)) * k;
  }
};

// y = act(z)
template <class T, int64_t code>
NNARCH_INLINE Vec<T> activate_as(Vec<T> z, T alpha) {
  const Vec<T> zero{}, six = zero + T(6);
  if constexpr (code == kRelu) return z < zero ? zero : z;
  if constexpr (code == kRelu6) return clamp<T>(z, zero, six);
  if constexpr (code == kLeakyRelu) return z > zero ? z : z * alpha;
  if constexpr (code == kHardswish) return z * clamp<T>(z + T(3), zero, six) * T(1.0 / 6);
  if constexpr (code == kHardsigmoid) return clamp<T>(z + T(3), zero, six) * T(1.0 / 6);
  if constexpr (code == kSilu) return z * one_over_one_plus<T>(exp<T>(-z));
  if constexpr (code == kGelu) return gelu(z);
  if constexpr (code == kGeluTanh) {  // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u))
    constexpr T k = T(-2 * 0.79788456080286535588);
    return z * one_over_one_plus<T>(exp<T>((z * z * T(0.044715) + T(1)) * (z * k)));
  }
  if constexpr (code == kTanh) return tanh<T>(z);
  if constexpr (code == kSigmoid) return sigmoid<T>(z);
  return z;
}

// dy/dz
template <class T, int64_t code>
NNARCH_INLINE Vec<T> activate_grad_as(Vec<T> saved, T alpha) {
  const Vec<T> zero{}, one = zero + T(1);
  if constexpr (code == kRelu) return saved <= zero ? zero : one;
  if constexpr (code == kRelu6) return ((saved <= zero) | (saved >= zero + T(6))) ? zero : one;
  if constexpr (code == kLeakyRelu) return saved > zero ? one : zero + alpha;
  if constexpr (code == kHardswish) {
    const Vec<T> rising = saved < zero + T(3) ? saved * T(1.0 / 3) + T(0.5) : one;
    return saved <= zero - T(3) ? zero : rising;
  }
  if constexpr (code == kHardsigmoid)
    return ((saved > zero) & (saved < one)) ? zero + T(1.0 / 6) : zero;
  if constexpr (code == kSilu) {
    const Vec<T> s = one_over_one_plus<T>(exp<T>(-saved));
    return s * (saved * (one - s) + one);
  }
  if constexpr (code == kGelu) {
    const Normal<T> n = normal(saved);
    return n.cdf + saved * n.density;
  }
  if constexpr (code == kGeluTanh) {
    const GeluTanh<T> g(saved);
    return ((one - g.tanh * g.tanh) * g.z * g.slope + g.tanh + one) * T(0.5);
  }
  if constexpr (code == kTanh) return one - saved * saved;
  if constexpr (code == kSigmoid) return saved * (one - saved);
  return one;
}

// d(dy/dz)/d(saved)
template <class T, int64_t code>
NNARCH_INLINE Vec<T> activate_grad_grad_as(Vec<T> saved, T) {
  const Vec<T> zero{}, one = zero + T(1);
  if constexpr (code == kHardswish)
    return ((saved > zero - T(3)) & (saved < zero + T(3))) ? zero + T(1.0 / 3) : zero;
  if constexpr (code == kSilu) {
    const Vec<T> s = sigmoid<T>(saved);
    return s * (one - s) * (saved * (one - s * T(2)) + T(2));
  }
  if constexpr (code == kGelu) {
    const Vec<T> z = clamp<T>(saved, zero - T(40), zero + T(40));  // the density is 0 beyond
    return normal(z).density * (T(2) - z * z);
  }
  if constexpr (code == kGeluTanh) {
    const GeluTanh<T> g(saved);
    constexpr T curve = T(0.79788456080286535588 * 6 * 0.044715);  // of tanh's argument
    const Vec<T> bend = g.slope * T(2) + g.z * (g.z * curve);
    return (one - g.tanh * g.tanh) * (bend * T(0.5) - g.z * g.tanh * g.slope * g.slope);
  }
  if constexpr (code == kTanh) return saved * T(-2);
  if constexpr (code == kSigmoid) return one - saved * T(2);
  return zero;
}

// An activation code as a type.
template <int64_t value>
struct Code {
  static constexpr int64_t code = value;
};

// Calls f(Code<code>{}): one switch outside a loop instead of one per vector.
template <class F>
NNARCH_INLINE auto with_activation(int64_t code, const F& f) {
  switch (code) {
    case kRelu:
      return f(Code<kRelu>{});
    case kRelu6:
      return f(Code<kRelu6>{});
    case kLeakyRelu:
      return f(Code<kLeakyRelu>{});
    case kHardswish:
      return f(Code<kHardswish>{});
    case kHardsigmoid:
      return f(Code<kHardsigmoid>{});
    case kSilu:
      return f(Code<kSilu>{});
    case kGelu:
      return f(Code<kGelu>{});
    case kGeluTanh:
      return f(Code<kGeluTanh>{});
    case kTanh:
      return f(Code<kTanh>{});
    case kSigmoid:
      return f(Code<kSigmoid>{});
    default:
      return f(Code<kNone>{});
  }
}

// The same with the code known at run time, for single vectors.
template <class T>
NNARCH_NOINLINE inline Vec<T> activate_smooth(Vec<T> z, int64_t code, T alpha) {
  return with_activation(code, [&](auto c) { return activate_as<T, c.code>(z, alpha); });
}
template <class T>
NNARCH_INLINE Vec<T> activate(Vec<T> z, int64_t code, T alpha) {
  if (code == kNone) return z;
  if (code == kRelu) return activate_as<T, kRelu>(z, alpha);
  return activate_smooth<T>(z, code, alpha);
}
template <class T>
NNARCH_INLINE Vec<T> activate_grad(Vec<T> saved, int64_t code, T alpha) {
  return with_activation(code, [&](auto c) { return activate_grad_as<T, c.code>(saved, alpha); });
}
template <class T>
NNARCH_INLINE Vec<T> activate_grad_grad(Vec<T> saved, int64_t code, T alpha) {
  return with_activation(code,
                         [&](auto c) { return activate_grad_grad_as<T, c.code>(saved, alpha); });
}

}  // namespace nnarch::NNARCH_ISA
