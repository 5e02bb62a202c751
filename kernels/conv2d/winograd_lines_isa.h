// Winograd's matrices applied to a line of vectors, with nothing multiplied by 0 or 1 and the sums
// that a pair of points shares formed once. For *_isa.cpp files.
#pragma once

#include "conv2d/winograd_points.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {

using V = Vec<float>;

template <class X>
struct ScalarOf;
template <>
struct ScalarOf<Vec<float>> {
  using Type = float;
};
template <>
struct ScalarOf<Vec<double>> {
  using Type = double;
};
template <class X>
using Scalar = typename ScalarOf<X>::Type;

// The matrices of Winograd<M, R, S>, and where the points lie among all.
template <int M, int R, int S>
struct Points {
  static constexpr int points = Winograd<M, R, S>::points;
  static constexpr int point(int i) { return Winograd<M, R, S>::point(i); }
};
template <int M, int R, int S = M>
struct InputMatrix : Points<M, R, S> {
  static constexpr int rows = S + R - 1, columns = S + R - 1;
  static constexpr double at(int i, int j) { return kWinograd<M, R, S>.input[i][j]; }
};
template <int M, int R, int S = M>
struct GradMatrix : Points<M, R, S> {
  static constexpr int rows = S + R - 1, columns = S;
  static constexpr double at(int i, int j) { return kWinograd<M, R, S>.weight_of_grad[i][j]; }
};
template <int M, int R>
struct WeightMatrix : Points<M, R, M> {
  static constexpr int rows = M + R - 1, columns = R;
  static constexpr double at(int i, int j) { return kWinograd<M, R>.weight[i][j]; }
};
template <int M, int R, int S = M>
struct OutputMatrix : Points<M, R, S> {
  static constexpr int rows = S, columns = S + R - 1;
  static constexpr double at(int i, int j) { return kWinograd<M, R, S>.output[j][i]; }
};
template <int M, int R>
struct WeightGradMatrix : Points<M, R, M> {
  static constexpr int rows = R, columns = M + R - 1;
  static constexpr double at(int i, int j) { return kWinograd<M, R>.output_of_grad[j][i]; }
};

// Of one tap and one output, which are not transformed.
struct NoMatrix {
  static constexpr int rows = 1, columns = 1, points = 1;
  static constexpr int point(int) { return 0; }
  static constexpr double at(int, int) { return 1; }
};

// A sum that begins with its first term.
template <class X>
struct Sum {
  X value{};
  bool empty = true;
};

// sum += Matrix(I, J) / divisor · x; X is a vector of floats or doubles.
template <class Matrix, int I, int J, class X>
NNARCH_INLINE void add_term(X x, double divisor, Sum<X>& sum) {
  if constexpr (Matrix::at(I, J) != 0) {
    const auto factor = static_cast<Scalar<X>>(Matrix::at(I, J) / divisor);
    if (sum.empty)
      sum.value = factor == 1 ? x : factor == -1 ? -x : x * factor;
    else
      sum.value = factor == 1    ? sum.value + x
                  : factor == -1 ? sum.value - x
                                 : sum.value + x * factor;
    sum.empty = false;
  }
}

// Σ_j Matrix(I, j) / divisor · d[j] over j = First + Step·J
template <class Matrix, int I, int First, int Step, class X, int... J>
NNARCH_INLINE X line_sum(Indices<J...>, const X* d, double divisor = 1) {
  Sum<X> sum;
  (add_term<Matrix, I, First + Step * J>(d[First + Step * J], divisor, sum), ...);
  return sum.value;
}

// Whether rows i and i + 1 belong to points p and −p: equal in even columns, opposite in odd ones.
template <class Matrix>
constexpr bool is_pair(int i) {
  if (i % 2 == 0 || i + 2 >= Matrix::rows || Matrix::columns < 2) return false;
  for (int j = 0; j < Matrix::columns; ++j) {
    const double twin = j % 2 == 0 ? Matrix::at(i + 1, j) : -Matrix::at(i + 1, j);
    const double gap = Matrix::at(i, j) - twin;
    if (gap > 1e-12 || gap < -1e-12) return false;
  }
  return true;
}

template <class Matrix, int I, class X>
NNARCH_INLINE void spread_row(const X* d, X* out) {
  constexpr int odd = Matrix::columns / 2, even = Matrix::columns - odd;
  if constexpr (is_pair<Matrix>(I)) {
    constexpr int last = 2 * odd - 1;
    constexpr double lead = Matrix::at(I, Matrix::at(I, last) != 0 ? last : last - 2);
    const X e = line_sum<Matrix, I, 0, 2>(MakeIndices<even>{}, d);
    const X o = line_sum<Matrix, I, 1, 2>(MakeIndices<odd>{}, d, lead);
    out[I] = e + o * static_cast<Scalar<X>>(lead);
    out[I + 1] = e - o * static_cast<Scalar<X>>(lead);
  } else if constexpr (I == 0 || !is_pair<Matrix>(I - 1)) {
    out[I] = line_sum<Matrix, I, 0, 1>(MakeIndices<Matrix::columns>{}, d);
  }
}

template <class Matrix, class X, int... I>
NNARCH_INLINE void spread_rows(Indices<I...>, const X* d, X* out) {
  (spread_row<Matrix, I>(d, out), ...);
}

// out = Matrix · d, from pixels to points: Bᵀ and G.
template <class Matrix, class X>
NNARCH_INLINE void spread(const X* d, X* out) {
  spread_rows<Matrix>(MakeIndices<Matrix::rows>{}, d, out);
}

// Of a pair of points, even rows take the sum, which lies in the first's place, and odd rows the
// difference.
template <class Matrix, int I, int... P, int... Rest>
NNARCH_INLINE V collect_row(Indices<P...>, Indices<Rest...>, const V* d) {
  constexpr int after = 1 + 2 * sizeof...(P);
  Sum<V> sum;
  add_term<Matrix, I, 0>(d[0], 1, sum);
  (add_term<Matrix, I, 1 + 2 * P>(d[1 + 2 * P + I % 2], 1, sum), ...);
  (add_term<Matrix, I, after + Rest>(d[after + Rest], 1, sum), ...);
  return sum.value;
}

template <class Matrix, int... P, int... I>
NNARCH_INLINE void collect_rows(Indices<P...> pairs, Indices<I...>, V* d, V* out) {
  V first;
  ((first = d[1 + 2 * P], d[1 + 2 * P] = first + d[2 + 2 * P], d[2 + 2 * P] = first - d[2 + 2 * P]),
   ...);
  using Rest = MakeIndices<Matrix::columns - 1 - 2 * int{sizeof...(P)}>;
  ((out[I] = collect_row<Matrix, I>(pairs, Rest{}, d)), ...);
}

// out = Matrix · d, from points to pixels: Aᵀ. Changes d.
template <class Matrix>
NNARCH_INLINE void collect(V* d, V* out) {
  constexpr int pairs = (Matrix::columns - 2) / 2;
  collect_rows<Matrix>(MakeIndices<pairs>{}, MakeIndices<Matrix::rows>{}, d, out);
}

}  // namespace nnarch::NNARCH_ISA
