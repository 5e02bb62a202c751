// The matrices of Winograd's short convolutions, derived at compile time from their points.
//
// F(m, r) gives m outputs of a correlation with r taps from t = m + r − 1 inputs with t products:
//     y = Aᵀ[(G g) ∘ (Bᵀ d)]
// It multiplies polynomials by their values at t − 1 points and at infinity (Toom-Cook). In two
// dimensions both sides are transformed along rows and columns: t² products instead of r²·m².
#pragma once

#include <cstdint>

namespace nnarch {

// t − 1 finite points: 0, then pairs ±p, then, where t is odd, one alone. The values decide the
// error: ±5/8, ±3/2 for F(4, 3) is three times as accurate as the textbook's ±1, ±2.
template <int M, int R>
struct WinogradPoints;
template <int M, int R>
  requires(M + R == 3)
struct WinogradPoints<M, R> {
  static constexpr double at[] = {0};
};
template <int M, int R>
  requires(M + R == 4)
struct WinogradPoints<M, R> {
  static constexpr double at[] = {0, 1};
};
template <int M, int R>
  requires(M + R == 5)
struct WinogradPoints<M, R> {
  static constexpr double at[] = {0, 1, -1};
};
template <>
struct WinogradPoints<4, 2> {  // half the error of ±1 and 2: then that of F(4, 3)
  static constexpr double at[] = {0, 0.75, -0.75, -1.5};
};
template <>
struct WinogradPoints<4, 1> {  // the other phase of three taps with stride 2 shares its points
  static constexpr double at[] = {0, 0.75, -0.75};
};
template <int M, int R>
  requires(M + R == 7)  // F(4, 3) and F(2, 5)
struct WinogradPoints<M, R> {
  static constexpr double at[] = {0, 0.625, -0.625, 1.5, -1.5};
};
// The phases of nine taps with stride 2 (winograd_strided.h): the four are those of the five but
// for the last, so that their products share sums. 9/16, 35/32 and 19/8 have the least error of all
// phases and gradients together, twice that of F(4, 3).
template <>
struct WinogradPoints<3, 5> {
  static constexpr double at[] = {0, 0.5625, -0.5625, 1.09375, -1.09375, 2.375};
};
template <>
struct WinogradPoints<3, 4> {
  static constexpr double at[] = {0, 0.5625, -0.5625, 1.09375, -1.09375};
};
template <>
struct WinogradPoints<5, 3> {
  static constexpr double at[] = {0, 0.5, -0.5, 1.125, -1.125, 2};
};
template <>
struct WinogradPoints<6, 3> {
  static constexpr double at[] = {0, 0.5, -0.5, 1, -1, 2, -2};
};

// Row i of each matrix belongs to point i, the last one to infinity. The tile at the end of a line
// may have fewer outputs, S of M: then it takes the first S + R − 2 finite points and infinity, and
// the weights of M outputs: what divides these more than it should multiplies the input.
template <int M, int R, int S = M>
struct Winograd {
  static constexpr int outputs = S, taps = R, size = S + R - 1;
  // Points of all M outputs, and which of them is the tile's i-th.
  static constexpr int points = M + R - 1;
  static constexpr int point(int i) { return i == size - 1 ? points - 1 : i; }

  double input[size][size] = {};           // Bᵀ
  double weight[size][taps] = {};          // G: of a filter of R taps
  double output[size][S] = {};             // A: to S outputs
  double weight_of_grad[size][S] = {};     // G of S taps: the gradient as a filter over the input
  double output_of_grad[size][taps] = {};  // A to R outputs: the gradient of the filter

  constexpr Winograd() {
    constexpr int n = size - 1;
    const auto& at = WinogradPoints<M, R>::at;
    for (int i = 0; i <= n; ++i) {
      double scale = 1;  // Π (p_i − p_j), which divides G
      int degree = 0;
      input[i][0] = 1;
      for (int j = 0; j < n; ++j) {  // input[i] *= (x − p_j)
        if (j == i) continue;
        for (int d = ++degree; d >= 0; --d)
          input[i][d] = (d > 0 ? input[i][d - 1] : 0) - at[j] * input[i][d];
        if (i < n) scale *= at[i] - at[j];
      }
      for (int j = n; j < points - 1 && i < n; ++j) {
        for (int d = 0; d <= n; ++d) input[i][d] *= at[i] - at[j];
        scale *= at[i] - at[j];
      }
      powers(i, output[i], S, 1);
      powers(i, output_of_grad[i], taps, 1);
      powers(i, weight[i], taps, scale);
      powers(i, weight_of_grad[i], S, scale);
    }
  }

 private:
  // 1, p, p², … over `scale`; at infinity the last coefficient alone.
  static constexpr void powers(int i, double* row, int count, double scale) {
    if (i == size - 1) {
      row[count - 1] = 1;
      return;
    }
    double power = 1 / scale;
    for (int k = 0; k < count; ++k, power *= WinogradPoints<M, R>::at[i]) row[k] = power;
  }
};

template <int M, int R, int S = M>
inline constexpr Winograd<M, R, S> kWinograd{};

}  // namespace nnarch
