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
// z·P(z²)/(ratio·Q(z²)), a minimax fit up to its bound, where it is 1 and tanh 1 - 2.1e-7. P and Q
// begin with their highest power alone: adding to it is no work for the units that multiply, which
// are what a cell waits for. P's constant is ratio times Q's, so that small arguments come out
// right.
struct Quotient {
  float p[4], q[4], ratio, most;
};
// Its bound is the last argument before one whose result rounds beyond 1: there, and so from there
// on, it is 1.
inline constexpr Quotient kTanh = {{74714288.0f, 9998782.0f, 261310.219f, 1541.79297f},
                                   {1283653.62f, 599671.812f, 33226.5664f, 422.132141f},
                                   58.2043991f,
                                   8.03454876f};
// z·P(z²), in z, and Q(z²) of N vectors side by side: one after the other, each waits for its own
// chain.
template <int N>
NNARCH_INLINE void quotient_parts(Vec<float> (&z)[N], Vec<float> (&below)[N], const Quotient& c) {
  Vec<float> square[N], above[N];
  for (int n = 0; n < N; ++n) {
    z[n] = clamp<float>(z[n], broadcast<float>(-c.most), broadcast<float>(c.most));
    square[n] = z[n] * z[n];
    above[n] = square[n] + c.p[3], below[n] = square[n] + c.q[3];
  }
  for (int i = 2; i >= 0; --i)
    for (int n = 0; n < N; ++n)
      above[n] = above[n] * square[n] + c.p[i], below[n] = below[n] * square[n] + c.q[i];
  for (int n = 0; n < N; ++n) z[n] *= above[n];
}
template <int N>
NNARCH_INLINE void quotients(Vec<float> (&z)[N], const Quotient& c) {
  Vec<float> below[N];
  quotient_parts<N>(z, below, c);
  for (int n = 0; n < N; ++n) z[n] /= below[n] * c.ratio;
}
template <int N>
NNARCH_INLINE void cell_tanh(Vec<float> (&x)[N]) {
  quotients<N>(x, kTanh);
}
#if defined(NNARCH_ISA_avx512)
// 2^(i/32), times the ratio above, times the polynomial's highest coefficient.
alignas(64) inline constexpr float kPowers[] = {
    14.1343927f, 14.4438963f, 14.7601757f, 15.0833817f, 15.4136648f, 15.7511806f, 16.0960865f,
    16.4485455f, 16.8087215f, 17.1767845f, 17.552906f,  17.9372654f, 18.33004f,   18.7314148f,
    19.1415806f, 19.5607262f, 19.9890499f, 20.426754f,  20.8740406f, 21.3311234f, 21.798214f,
    22.2755318f, 22.7633038f, 23.261755f,  23.7711201f, 24.2916412f, 24.8235588f, 25.3671227f,
    25.9225903f, 26.4902229f, 27.070282f,  27.663044f};
// x = ratio·2^t, t = -x·log2(e): the power of t's whole part by one instruction, that of the 32nds
// from a table, that of the rest, below 1/32, by a polynomial, whose square is completed; right to
// 1.1e-7, for infinities as well. 9 multiplications of the quotient above become 4, and nothing
// bounds x.
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
    const Vec<float> u = rest + 1.42710173f;
    x[n] = (Vec<float>)_mm512_scalef_ps((__m512)(power * (u * u + 2.08130789f)), (__m512)t);
  }
}
template <int N>
NNARCH_INLINE void cell_sigmoid(Vec<float> (&x)[N]) {
  cell_exp_minus<N>(x);
  for (int n = 0; n < N; ++n) x[n] = kTanh.ratio / (x[n] + kTanh.ratio);
}
// As below. The factors share a division, which takes as long as two multiplications.
template <bool Each, int N>
NNARCH_INLINE void sigmoid_times_tanh(Vec<float> (&s)[N], Vec<float> (&t)[N],
                                      Vec<float> (&product)[N]) {
  Vec<float> below[N];
  cell_exp_minus<N>(s);
  quotient_parts<N>(t, below, kTanh);
  for (int n = 0; n < N; ++n) {
    product[n] = t[n] / (below[n] * (s[n] + kTanh.ratio));
    if constexpr (Each) {
      s[n] = one_over_one_plus<float>(s[n] * (1 / kTanh.ratio));
      t[n] /= below[n] * kTanh.ratio;
    }
  }
}
#else
// σ(x) = ½ + ½·tanh(x/2), with the halves in the coefficients.
template <int N>
NNARCH_INLINE void cell_sigmoid(Vec<float> (&x)[N]) {
  constexpr Quotient k = kTanh;
  static constexpr Quotient half = {{k.p[0] * 256, k.p[1] * 64, k.p[2] * 16, k.p[3] * 4},
                                    {k.q[0] * 256, k.q[1] * 64, k.q[2] * 16, k.q[3] * 4},
                                    k.ratio * 4,
                                    k.most * 2};
  quotients<N>(x, half);
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
