// The kernels of capsule routing of one instruction set, and the orders that they read.
//
// Input capsules lie in blocks of kBlock side by side, so that dot products over a capsule's
// values and the softmax over output capsules are vertical:
//   packed weight  [I / kBlock][O][D_out][D_in][kBlock]
//   x              [I / kBlock][D_in][kBlock]            of one sample
//   votes          [I / kBlock][O][D_out][kBlock]        of one sample
//   coefficients   [I / kBlock][terms][O][kBlock]        of one sample
// Lanes of capsules that do not exist are zero.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

// Input capsules of a block: two cache lines, whatever the instruction set.
template <class T>
inline constexpr int64_t kCapsuleBlock = 128 / static_cast<int64_t>(sizeof(T));

// Samples that share a pass over a block of the weight's gradient.
inline constexpr int64_t kGradSamples = 16;

struct CapsuleShape {
  int64_t blocks;        // of input capsules
  int64_t in, out, dim;  // D_in, O, D_out
};

// Some samples and what lies between two of them, in elements.
template <class P>
struct PerSample {
  P* first;
  int64_t step;
  P* operator[](int64_t sample) const { return first + sample * step; }
};

// The parts of a block of input capsules' gradient: votes' gradients are
//   constant[o][d] + Σ_t coefficients[t][o][i] · factors[t][o][d]
template <class T>
struct GradBlock {
  int64_t samples, terms;
  PerSample<const T> constant;      // [O][D_out], or null for none
  PerSample<const T> coefficients;  // of this block
  PerSample<const T> factors;       // [terms][O][D_out]
  PerSample<const T> x;             // of this block
  const T* weight;                  // of this block
  bool first;                       // whether `weight_grad` starts at zero
  T* scratch;                       // kGradSamples * D_out * kBlock
  PerSample<T> x_grad;              // [D_in][kBlock], written
  T* weight_grad;                   // as `weight`, added to
};

// Some input capsules of a group of samples that lie side by side, one in each lane of a vector.
template <class T>
struct LaneCapsules {
  const T* weight;      // [O][.][D_out][D_in], from the first of these capsules
  int64_t weight_step;  // between two output capsules
  const T* x;           // [count][D_in][lanes]
  int64_t count;
};

template <class T>
struct RoutingTable {
  int64_t lanes, lane_capsules;
  // to[j][i] = from[i][j] for i < rows, j < columns.
  void (*transpose)(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows,
                    int64_t columns);
  // to[row][i] = from[row][i] for i < n <= kCapsuleBlock; past the caches where lines are whole.
  void (*copy_rows)(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows,
                    int64_t n, bool past_caches);
  // The votes of `samples` samples for one block, and their sums [O][D_out][lanes] (or null).
  void (*votes)(const CapsuleShape& s, const T* weight, PerSample<const T> x, int64_t samples,
                PerSample<T> votes, PerSample<T> sums);
  // totals[i] = scale · Σ sums[i][lanes]
  void (*total)(const T* sums, int64_t count, T scale, T* totals);
  // One iteration of one sample: softmax of ⟨votes, outputs⟩, and Σ c·votes added to `sums`.
  // scratch: O * kBlock.
  void (*iteration)(const CapsuleShape& s, const T* votes, const T* outputs, T* scratch, T* sums);
  // The same backwards: with dc = ⟨votes, sum_grad⟩, the softmax c and its gradient db as
  // coefficients `c_term` and `c_term + 1` of `terms`, and Σ db·votes added to `sums`.
  // scratch: O * kBlock.
  void (*iteration_grad)(const CapsuleShape& s, const T* votes, const T* outputs, const T* sum_grad,
                         int64_t c_term, int64_t terms, T* coefficients, T* scratch, T* sums);
  // The softmax alone, as the only coefficient.
  void (*softmax)(const CapsuleShape& s, const T* votes, const T* outputs, T* coefficients);
  void (*grad)(const CapsuleShape& s, const GradBlock<T>& g);
  // Samples in lanes: to[value][lanes] from `samples` samples' values, `step` apart.
  void (*to_lanes)(const T* from, int64_t step, int64_t samples, int64_t values, T* to);
  // The sum of the capsules' votes, added to sums [O][D_out][lanes].
  void (*lane_sums)(const CapsuleShape& s, const LaneCapsules<T>& c, T* sums);
  // The same weighted with the softmax of ⟨votes, outputs [O][D_out][lanes]⟩.
  // scratch: lane_capsules * (O * D_out + O) * lanes.
  void (*lane_iteration)(const CapsuleShape& s, const LaneCapsules<T>& c, const T* outputs,
                         T* scratch, T* sums);
  // The same backwards: with dc = ⟨votes, sum_grad⟩, the softmax c and its gradient db as
  // coefficients [count][2][O][lanes], and Σ db·votes added to `sums`.
  // scratch: lane_capsules * O * D_out * lanes.
  void (*lane_iteration_grad)(const CapsuleShape& s, const LaneCapsules<T>& c, const T* outputs,
                              const T* sum_grad, T* coefficients, T* scratch, T* sums);
  // sums = scale·sums + bias [O][D_out] (or null), v = squash(sums), outputs += v.
  void (*lane_outputs)(const CapsuleShape& s, T scale, const T* bias, T* sums, T* v, T* outputs);
};

NNARCH_PER_ISA(template <class T> const RoutingTable<T>& routing_table();)

// x[outer][dim][inner] · |x| / (1 + |x|²), and its gradient where `grad` is not null.
template <class T>
struct SquashTable {
  void (*forward)(const T* x, int64_t outer, int64_t dim, int64_t inner, T* y);
  void (*backward)(const T* grad, const T* x, int64_t outer, int64_t dim, int64_t inner, T* dx);
};

NNARCH_PER_ISA(template <class T> const SquashTable<T>& squash_table();)

}  // namespace nnarch
