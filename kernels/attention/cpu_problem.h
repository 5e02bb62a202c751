// What attention's kernels work on: tensors as they lie in memory, and who sees whom.
//
// No SIMD and no std:: templates, so that the sources of every instruction set may include it.
#pragma once

#include <cstdint>

namespace nnarch {

// How numbers lie in memory. Half types are computed in float, everything else as it is.
enum class Storage : int { native, half, bfloat16 };

// A [batch, heads, rows, columns] tensor; strides in bytes.
struct Operand {
  char* data;
  int64_t batch, head, row, column;
  Storage storage;
  bool in_place;  // a row is an array of the type that kernels compute in

  char* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};

struct MaskOperand {
  Operand values;  // data is null where there is none
  bool boolean;    // one byte, not 0: may see
};

// Query i sees key j where low <= j - i <= high and j < the key length of its sequence.
template <class T>
struct Attention {
  int64_t batch, heads, groups, queries, keys, depth, value_depth;
  Operand q, k, v, out;
  MaskOperand mask;
  const int64_t* key_lengths;  // null: all keys
  int64_t key_lengths_step;
  T scale;
  // scale = query_scale · score_scale: queries are multiplied by one, scores less their maximum by
  // the other.
  T query_scale;
  double score_scale;
  int64_t low, high;
  bool drops;
  uint64_t seed, threshold;  // words of Philox of at least `threshold` are kept,
  double survivor_scale;     // times this
  T* lse;                    // [batch, heads, queries]

  int64_t heads_each() const { return heads / groups; }
  int64_t key_length(int64_t b) const {
    if (!key_lengths) return keys;
    const int64_t n = key_lengths[b * key_lengths_step];
    return n < 0 ? 0 : n < keys ? n : keys;
  }
  // The first key that a query sees, and the one after its last; none where first >= end. (`low`
  // and `high` may be as large as ±2^62.)
  int64_t first_key(int64_t query) const {
    const int64_t first = query + low;
    return first < 0 ? 0 : first;
  }
  int64_t end_key(int64_t query, int64_t length) const {
    const int64_t end = query + high + 1;
    return end < length ? end : length;
  }
};

}  // namespace nnarch
