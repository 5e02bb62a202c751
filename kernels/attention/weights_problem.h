// What makes attention's weights visible: nnarch::attention_weights.
//
// No SIMD and no std:: templates, so that the sources of every instruction set may include it.
#pragma once

#include "attention/backward_problem.h"

namespace nnarch {

template <class T>
struct AttentionWeights {
  Attention<T> forward;  // without values; `out` are the weights [batch, heads or 1, queries, keys]
  RowValues<T> lse;
  LargeSums<T> large;
  bool averaged;  // over heads
};

// Queries [query, query_end) by a block of keys, of one head or of all.
struct WeightsTask {
  int64_t batch, head, heads_end, query, query_end, key, key_end;
};

template <class T>
struct AttentionWeightsTable {
  int64_t queries, keys;  // of a task, at most
  int64_t (*scratch)(const AttentionWeights<T>& a);
  void (*run)(const AttentionWeights<T>& a, const WeightsTask& task, T* scratch);
  // Of the task's queries of one head: maxima and one over the sums where their log-sum-exp is
  // large, 0 elsewhere.
  void (*large_sums)(const AttentionWeights<T>& a, const WeightsTask& task, T* top, T* inverse,
                     T* scratch);
};

NNARCH_PER_ISA(template <class T> const AttentionWeightsTable<T>& attention_weights_table();)

}  // namespace nnarch
