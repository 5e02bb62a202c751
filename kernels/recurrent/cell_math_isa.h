// tanh and sigmoid for cells: in float32 a quotient of polynomials, as accurate as exp and cheaper.
#pragma once

#include "cpu/math.h"

namespace nnarch::NNARCH_ISA {
namespace {

#if defined(NNARCH_ISA_generic)
// Without FMA the quotient below rounds beyond 1.
NNARCH_INLINE Vec<float> cell_tanh(Vec<float> x) { return tanh<float>(x); }
NNARCH_INLINE Vec<float> cell_sigmoid(Vec<float> x) { return cell_tanh(x * 0.5f) * 0.5f + 0.5f; }
template <int N>
NNARCH_INLINE void cell_tanh(Vec<float> (&x)[N]) {
  for (int n = 0; n < N; ++n) x[n] = cell_tanh(x[n]);
}
template <int N>
NNARCH_INLINE void cell_sigmoid(Vec<float> (&x)[N]) {
  for (int n = 0; n < N; ++n) x[n] = cell_sigmoid(x[n]);
}
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
// z·P(z²), in z, and Q(z²) of N vectors side by side: one after the other, each waits for its own
// chain.
template <int N>
NNARCH_INLINE void quotient_parts(Vec<float> (&z)[N], Vec<float> (&below)[N], const float (&p)[5],
                                  const float (&q)[5], float most) {
  Vec<float> square[N], above[N];
  for (int n = 0; n < N; ++n) {
    z[n] = clamp<float>(z[n], broadcast<float>(-most), broadcast<float>(most));
    square[n] = z[n] * z[n];
    above[n] = broadcast<float>(p[4]), below[n] = broadcast<float>(q[4]);
  }
  for (int i = 3; i >= 0; --i)
    for (int n = 0; n < N; ++n)
      above[n] = above[n] * square[n] + p[i], below[n] = below[n] * square[n] + q[i];
  for (int n = 0; n < N; ++n) z[n] *= above[n];
}
template <int N>
NNARCH_INLINE void quotients(Vec<float> (&z)[N], const float (&p)[5], const float (&q)[5],
                             float most) {
  Vec<float> below[N];
  quotient_parts<N>(z, below, p, q, most);
  for (int n = 0; n < N; ++n) z[n] /= below[n];
}
template <int N>
NNARCH_INLINE void cell_tanh(Vec<float> (&x)[N]) {
  quotients<N>(x, CellTanh::p, CellTanh::q, CellTanh::most);
}
#if defined(NNARCH_ISA_avx512)
// 2^(i/32)
alignas(64) inline constexpr float kPowers[] = {
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f,
    1.1637249f,  1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f,
    1.35425556f, 1.38390994f, 1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f,
    1.5759809f,  1.61049032f, 1.64575553f, 1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f,
    1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};
// x = 2^t, t = -x·log2(e): the power of t's whole part by one instruction, that of the 32nds from a
// table, that of the rest, below 1/32, by a polynomial; right to 1e-7, for infinities as well. 11
// multiplications of the quotient above become 4, and nothing bounds x.
template <int N>
NNARCH_INLINE void cell_exp_minus(Vec<float> (&x)[N]) {
  constexpr int down = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC, rest_of_32nds = 5 << 4 | down;
  constexpr float last_bit_32nd = 0x1.8p18f;  // adding it leaves the 32nds in the lowest bits
  const __m512 low = _mm512_load_ps(kPowers), high = _mm512_load_ps(kPowers + 16);
  for (int n = 0; n < N; ++n) {
    const Vec<float> t = x[n] * -1.44269504f;
    const Vec<float> rest = (Vec<float>)_mm512_reduce_ps((__m512)t, rest_of_32nds);
    const __m512 index = _mm512_add_round_ps((__m512)t, _mm512_set1_ps(last_bit_32nd), down);
    const auto power = (Vec<float>)_mm512_permutex2var_ps(low, _mm512_castps_si512(index), high);
    const Vec<float> more = (rest * 0.242794544f + 0.693119824f) * rest;
    x[n] = (Vec<float>)_mm512_scalef_ps((__m512)(power * more + power), (__m512)t);
  }
}
template <int N>
NNARCH_INLINE void cell_sigmoid(Vec<float> (&x)[N]) {
  cell_exp_minus<N>(x);
  for (int n = 0; n < N; ++n) x[n] = 1.0f / (x[n] + 1.0f);
}
// As below. The factors share a division, which takes as long as two multiplications.
template <bool Each, int N>
NNARCH_INLINE void sigmoid_times_tanh(Vec<float> (&s)[N], Vec<float> (&t)[N],
                                      Vec<float> (&product)[N]) {
  Vec<float> below[N];
  cell_exp_minus<N>(s);
  quotient_parts<N>(t, below, CellTanh::p, CellTanh::q, CellTanh::most);
  for (int n = 0; n < N; ++n) {
    product[n] = t[n] / (below[n] + below[n] * s[n]);
    if constexpr (Each) s[n] = one_over_one_plus<float>(s[n]), t[n] /= below[n];
  }
}
#else
// σ(x) = ½ + ½·tanh(x/2), with the halves in the coefficients.
template <int N>
NNARCH_INLINE void cell_sigmoid(Vec<float> (&x)[N]) {
  using K = CellTanh;
  static constexpr float p[] = {K::p[0] / 4, K::p[1] / 16, K::p[2] / 64, K::p[3] / 256,
                                K::p[4] / 1024};
  static constexpr float q[] = {K::q[0], K::q[1] / 4, K::q[2] / 16, K::q[3] / 64, K::q[4] / 256};
  quotients<N>(x, p, q, 2 * K::most);
  for (int n = 0; n < N; ++n) x[n] += 0.5f;
}
#endif
NNARCH_INLINE Vec<float> cell_tanh(Vec<float> x) {
  Vec<float> one[] = {x};
  cell_tanh<1>(one);
  return one[0];
}
NNARCH_INLINE Vec<float> cell_sigmoid(Vec<float> x) {
  Vec<float> one[] = {x};
  cell_sigmoid<1>(one);
  return one[0];
}
#endif

NNARCH_INLINE Vec<double> cell_tanh(Vec<double> x) { return tanh<double>(x); }
NNARCH_INLINE Vec<double> cell_sigmoid(Vec<double> x) { return sigmoid<double>(x); }
template <int N>
NNARCH_INLINE void cell_tanh(Vec<double> (&x)[N]) {
  for (int n = 0; n < N; ++n) x[n] = cell_tanh(x[n]);
}
template <int N>
NNARCH_INLINE void cell_sigmoid(Vec<double> (&x)[N]) {
  for (int n = 0; n < N; ++n) x[n] = cell_sigmoid(x[n]);
}
// product = σ(s)·tanh(t) and, where `Each` is asked for, s = σ(s), t = tanh(t).
template <bool Each, class V, int N>
NNARCH_INLINE void sigmoid_times_tanh(V (&s)[N], V (&t)[N], V (&product)[N]) {
  cell_sigmoid<N>(s), cell_tanh<N>(t);
  for (int n = 0; n < N; ++n) product[n] = s[n] * t[n];
}

}  // namespace
}  // namespace nnarch::NNARCH_ISA
