// What attention's backward works on beside what the forward does.
//
// No SIMD and no std:: templates, so that the sources of every instruction set may include it.
#pragma once

#include "attention/cpu_problem.h"
#include "cpu/isa.h"

namespace nnarch {

// One number a query; strides in elements. `data` is null where there is none.
template <class T>
struct RowValues {
  const T* data;
  int64_t batch, head, row;

  T at(int64_t b, int64_t h, int64_t i) const { return data[b * batch + h * head + i * row]; }
};

// A large log-sum-exp has lost the logarithm of the sum: 2^(score - it) is off by that factor. Such
// rows have a maximum and one over the sum instead (large_rows.h), others 0. Null where no row
// does.
template <class T>
struct LargeSums {
  const T *top, *inverse;  // [batch][heads][queries]
};

// Such rounding is up to 6e-5 of a weight in float, 1e-10 in double.
template <class T>
constexpr bool is_large_sum(T lse) {
  constexpr T large = sizeof(T) == 4 ? T(1024) : T(1048576);
  return (lse >= large || lse <= -large) && lse - lse == T(0);
}

// Sums in the type that kernels compute in. Strides in elements; 0 where a dimension is summed.
template <class T>
struct Sums {
  T* data;
  int64_t batch, head, row, column;

  T* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};

template <class T>
struct AttentionBackward {
  Attention<T> forward;  // `out` is what it gave
  Operand grad, dq, dk, dv;
  RowValues<T> lse, grad_lse;
  LargeSums<T> large;
  // Where dq is summed: in place (one chunk of keys), or in one part for each chunk, which `finish`
  // adds up. A row holds the depth rounded up to whole vectors.
  Sums<T> dq_sum;
  int64_t chunks, dq_chunk;
  bool dq_in_place;
  Sums<T> d_mask;  // data is null where it is not asked for
  // Instead of the output's gradient that of the weights themselves, times `weights_factor`; then
  // the values are 0 wide, and what a log-sum-exp gets goes to d_lse [chunks, batch, heads,
  // queries]. `data` is null where it is not so.
  Operand weights_grad;
  T weights_factor;
  T* d_lse;
};

// Keys [first, end) of one sequence and key head, and what comes after them.
struct KeyChunk {
  int64_t batch, group, chunk, first, end;
  int64_t next_batch, next_group;
};

template <class T>
struct AttentionBackwardTable {
  int64_t lanes, keys;  // of a vector; of a block
  // Scratch elements that `run` needs.
  int64_t (*scratch)(const AttentionBackward<T>& a);
  // Everything that these keys take part in: dk and dv of them, and their part of dq.
  void (*run)(const AttentionBackward<T>& a, const KeyChunk& keys, T* scratch);
  // dq of queries [first, end) from its parts.
  void (*finish)(const AttentionBackward<T>& a, int64_t batch, int64_t head, int64_t first,
                 int64_t end);
};

NNARCH_PER_ISA(template <class T> const AttentionBackwardTable<T>& attention_backward_table();)

}  // namespace nnarch
