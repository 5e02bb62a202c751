// The forward kernels of attention of one instruction set.
#pragma once

#include "attention/cpu_problem.h"
#include "cpu/isa.h"

namespace nnarch {

// Rows that share keys: row r is query `first + r` of the query heads from `head` on, which are
// stacked one below the other (r / queries, r % queries).
struct QueryRows {
  int64_t batch, head, first, count;

  template <class T>
  int64_t head_of(const Attention<T>& a, int64_t r) const {
    return head + (first + r) / a.queries;
  }
  template <class T>
  int64_t query_of(const Attention<T>& a, int64_t r) const {
    return (first + r) % a.queries;
  }
};

// The keys of a task. Where they are a part of all, the sums go to `partial` instead of the output:
// per row the unnormalised output, the maximum (of q · k times the query scale) and the sum of
// weights, `partial_step` apart.
template <class T>
struct KeyRange {
  int64_t first, end;
  T* partial;
  int64_t partial_step;
};

template <class T>
struct AttentionTable {
  int64_t tile;           // queries side by side
  int64_t tiles_at_once;  // of a task, at most
  int64_t few_rows;       // at most so many rows go to `few`
  // Scratch elements that a task of so many rows needs.
  int64_t (*scratch)(const Attention<T>& a, int64_t rows);
  // Any number of rows, in tiles.
  void (*tiles)(const Attention<T>& a, const QueryRows& rows, const KeyRange<T>& keys, T* scratch);
  // Few rows, every key met once.
  void (*few)(const Attention<T>& a, const QueryRows& rows, const KeyRange<T>& keys, T* scratch);
  // Adds up the partial sums of `chunks` ranges of keys, `chunk_step` apart, in their order.
  void (*combine)(const Attention<T>& a, const QueryRows& rows, const T* partial,
                  int64_t partial_step, int64_t chunks, int64_t chunk_step, T* scratch);
};

NNARCH_PER_ISA(template <class T> const AttentionTable<T>& attention_table();)

}  // namespace nnarch
