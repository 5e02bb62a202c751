// Softmax over classes, in two memory orders, for one instruction set.
//
// A tile is z[class][column]: the columns (samples, pixels, pairs of a contrastive loss) lie side
// by side, so maxima and sums over classes need no horizontal operation. The statistics of a column
// go on from tile to tile: an online log-sum-exp. Where the classes of a sample lie side by side
// and are many, `row_*` reads them as they lie.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

// What a loss adds to the log-sum-exp, for class c of a column: a = weight[c]·(of_target·q + rest).
template <class T>
struct ClassFactors {
  const T* weight = nullptr;  // [classes]; null: 1
  const T* q = nullptr;       // the column's target probabilities, a tile like z; null: 0
  int64_t q_step = 0;
  T of_target = 0;
  T rest = 0;  // what label smoothing gives to every class

  bool any() const { return q != nullptr || rest != T{0}; }
  ClassFactors from(int64_t c, int64_t column = 0) const {
    ClassFactors f = *this;
    if (weight) f.weight += c;
    if (q) f.q += c * q_step + column;
    return f;
  }
};

template <class T>
struct SoftmaxTable {
  // z[c][n] += bias[c]
  void (*add_bias)(T* z, int64_t step, int64_t classes, int64_t columns, const T* bias);
  // The running maximum, and the running sum of exp(z - max). They begin as -infinity and 0.
  void (*observe)(const T* z, int64_t step, int64_t classes, int64_t columns, T* max, T* sum);
  // logs[n] = log(sum[n])
  void (*log_sums)(const T* sum, int64_t columns, double* logs);
  // weighted[n] += Σ_c a·z, total[n] += Σ_c a. Differences to `near` are summed: it is a number
  // near the largest z of the column, such as its maximum.
  void (*weigh)(const T* z, int64_t step, int64_t classes, int64_t columns, const T* near,
                const ClassFactors<T>& a, double* weighted, double* total);
  // g = alpha[n]·exp(z - max[n]) - scale[n]·a; g may be z.
  void (*gradient)(const T* z, int64_t step, int64_t classes, int64_t columns, const T* max,
                   const T* alpha, const T* scale, const ClassFactors<T>& a, T* g, int64_t g_step);
  // g = scale[n]·weight[c]·of_target·(max[n] - z + rest[n]): the gradient of the target
  // probabilities.
  void (*target_gradient)(const T* z, int64_t step, int64_t classes, int64_t columns, const T* max,
                          const T* rest, const T* scale, const ClassFactors<T>& a, T* g,
                          int64_t g_step);
  // The same three of one column whose classes lie side by side.
  void (*row_observe)(const T* z, int64_t classes, T* max, T* sum);
  void (*row_weigh)(const T* z, int64_t classes, T near, const ClassFactors<T>& a, double* weighted,
                    double* total);
  void (*row_gradient)(const T* z, int64_t classes, T max, T alpha, T scale,
                       const ClassFactors<T>& a, T* g, bool stream);
  // Σ_n x[n]
  double (*row_sum)(const T* x, int64_t n);
  // to[i] = Σ_p parts[p * stride + i], in the order of p
  void (*add_parts)(const T* parts, int64_t stride, int64_t count, T* to, int64_t n);
  // x[i] *= factor
  void (*scale)(const T* x, T factor, T* to, int64_t n);
};

NNARCH_PER_ISA(template <class T> const SoftmaxTable<T>& softmax_table();)

template <class T>
const SoftmaxTable<T>& softmax() {
  return NNARCH_SELECT(softmax_table<T>());
}

}  // namespace nnarch
