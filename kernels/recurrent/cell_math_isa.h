// tanh and sigmoid for cells: in float32 a quotient of polynomials, as accurate as exp and cheaper.
#pragma once

#include "cpu/math.h"

namespace nnarch::NNARCH_ISA {
namespace {

#if defined(NNARCH_ISA_generic)
// Without FMA the quotient below rounds beyond 1.
NNARCH_INLINE Vec<float> cell_tanh(Vec<float> x) { return tanh<float>(x); }
NNARCH_INLINE Vec<float> cell_sigmoid(Vec<float> x) { return cell_tanh(x * 0.5f) * 0.5f + 0.5f; }
#else
// z·P(z²)/Q(z²), a minimax fit up to where tanh rounds to 1, off by 2^-25 there; P and Q begin with
// 1, so that small arguments come out right.
struct CellTanh {
  static constexpr float p[] = {1.0f, 0.133826891f, 0.00349745968f, 2.06358503e-05f,
                                1.33843204e-08f};
  static constexpr float q[] = {1.0f, 0.467160103f, 0.0258843689f, 0.000328852041f,
                                7.79026318e-07f};
  // The last argument before one whose result rounds beyond 1: there, and so from there on, it
  // is 1.
  static constexpr float most = 8.15449047f;
};
NNARCH_INLINE Vec<float> cell_tanh(Vec<float> x) {
  using K = CellTanh;
  const Vec<float> z = clamp<float>(x, broadcast<float>(-K::most), broadcast<float>(K::most));
  const Vec<float> square = z * z;
  return z * polynomial<float>(square, K::p) / polynomial<float>(square, K::q);
}
// σ(x) = ½ + ½·tanh(x/2), with the halves in the coefficients.
NNARCH_INLINE Vec<float> cell_sigmoid(Vec<float> x) {
  using K = CellTanh;
  static constexpr float p[] = {K::p[0] / 4, K::p[1] / 16, K::p[2] / 64, K::p[3] / 256,
                                K::p[4] / 1024};
  static constexpr float q[] = {K::q[0], K::q[1] / 4, K::q[2] / 16, K::q[3] / 64, K::q[4] / 256};
  constexpr float most = 2 * K::most;
  const Vec<float> z = clamp<float>(x, broadcast<float>(-most), broadcast<float>(most));
  const Vec<float> square = z * z;
  return z * polynomial<float>(square, p) / polynomial<float>(square, q) + 0.5f;
}
#endif

NNARCH_INLINE Vec<double> cell_tanh(Vec<double> x) { return tanh<double>(x); }
NNARCH_INLINE Vec<double> cell_sigmoid(Vec<double> x) { return sigmoid<double>(x); }

}  // namespace
}  // namespace nnarch::NNARCH_ISA
