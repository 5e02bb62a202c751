// A tile's queries: packing them, and writing what became of them. For *_isa.cpp files.
#pragma once

#include "attention/cpu_kernels.h"
#include "attention/mask_isa.h"

namespace nnarch::NNARCH_ISA {

template <class T>
NNARCH_INLINE int64_t whole_vectors(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// What differences of scores become weights with.
template <class T>
NNARCH_INLINE Power<T> power_of(const Attention<T>& a) {
  return Power<T>(static_cast<T>(a.score_scale * kLog2E));
}

// The log-sum-exp of scores with this maximum, and weights with this sum.
template <class T>
NNARCH_INLINE Vec<T> log_sum_exp(const Attention<T>& a, Vec<T> top, Vec<T> sum) {
  return top * static_cast<T>(a.score_scale) + log2<T>(sum) * T(kLn2);
}

// Up to kTile queries and their running softmax. The arrays lie in scratch memory.
template <class T>
struct Tile {
  int64_t first, count;                            // of the task's rows
  int64_t first_key[kTile<T>], end_key[kTile<T>];  // what each query may see; none: 0 and 0
  int64_t least_first, most_first, least_end, most_end;
  const char* mask[kTile<T>];                 // each query's row of the mask
  uint32_t query[kTile<T>], outer[kTile<T>];  // places, for dropout
  bool started;
  T* q;    // [depth][kTile], times the query scale
  T* out;  // [value depth][kTile]
  T* top;  // [kTile] the maximum so far
  T* sum;  // [kTile] of the weights

  bool narrow() const { return count <= kLanes<T>; }
};

template <class T>
NNARCH_INLINE void see_keys(const Attention<T>& a, const QueryRows& rows, const KeyRange<T>& keys,
                            Tile<T>& t) {
  const int64_t length = a.key_length(rows.batch);
  t.least_first = t.least_end = INT64_MAX;
  t.most_first = t.most_end = 0;
  for (int64_t i = 0; i < kTile<T>; ++i) {
    const int64_t r = t.first + (i < t.count ? i : t.count - 1);
    const int64_t query = rows.query_of(a, r), head = rows.head_of(a, r);
    int64_t first = a.first_key(query), end = a.end_key(query, length);
    first = first < keys.first ? keys.first : first;
    end = end > keys.end ? keys.end : end;
    if (first >= end) first = end = 0;
    t.first_key[i] = first, t.end_key[i] = end;
    t.query[i] = static_cast<uint32_t>(query);
    t.outer[i] = static_cast<uint32_t>(rows.batch * a.heads + head);
    if (a.mask.values.data) t.mask[i] = a.mask.values.at(rows.batch, head, query);
    t.most_first = first > t.most_first ? first : t.most_first;
    t.least_end = end < t.least_end ? end : t.least_end;
    if (first < end && first < t.least_first) t.least_first = first;
    t.most_end = end > t.most_end ? end : t.most_end;
  }
}

template <class T>
NNARCH_NOINLINE void pack_queries(const Attention<T>& a, const QueryRows& rows, Tile<T>& t) {
  constexpr int w = kLanes<T>;
  const T scale = a.query_scale;
  for (int64_t half = 0; half < kTile<T>; half += w) {
    const char* from[w];
    for (int i = 0; i < w; ++i) {
      const int64_t r = t.first + half + i;
      from[i] = half + i < t.count ? a.q.at(rows.batch, rows.head_of(a, r), rows.query_of(a, r))
                                   : nullptr;
    }
    for (int64_t d = 0; d < a.depth; d += w) {
      const int64_t n = a.depth - d < w ? a.depth - d : w;
      Vec<T> lanes[w];
      for (int i = 0; i < w; ++i) {
        if (!from[i])
          lanes[i] = Vec<T>{};
        else if (a.q.in_place && n == w)
          lanes[i] = load(reinterpret_cast<const T*>(from[i]) + d) * scale;
        else
          lanes[i] = load_as<T>(a.q.storage, from[i] + d * a.q.column, a.q.column, n) * scale;
      }
      transpose_rows<w / 2, T>(lanes);
      T* to = t.q + d * kTile<T> + half;
      for (int i = 0; i < w && i < n; ++i) store(to + i * kTile<T>, lanes[i]);
    }
  }
}

// The rows of the output, or of the partial sums.
template <class T>
NNARCH_NOINLINE void write_rows(const Attention<T>& a, const QueryRows& rows,
                                const KeyRange<T>& keys, Tile<T>& t) {
  constexpr int w = kLanes<T>;
  const int64_t size = a.out.column;
  for (int64_t half = 0; half < t.count; half += w) {
    const Vec<T> sum = load(t.sum + half), top = load(t.top + half);
    const Vec<T> inverse = sum == T(0) ? Vec<T>{} : T(1) / sum;
    const Vec<T> factor = keys.partial ? broadcast(T(1)) : inverse;
    char* to[w];
    const int64_t count = t.count - half < w ? t.count - half : w;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = t.first + half + i;
      if (keys.partial) {
        T* row = keys.partial + r * keys.partial_step;
        row[keys.partial_step - 2] = top[i], row[keys.partial_step - 1] = sum[i];
        to[i] = reinterpret_cast<char*>(row);
      } else {
        to[i] = a.out.at(rows.batch, rows.head_of(a, r), rows.query_of(a, r));
      }
    }
    const Storage storage = keys.partial ? Storage::native : a.out.storage;
    const int64_t step = keys.partial ? static_cast<int64_t>(sizeof(T)) : size;
    for (int64_t d = 0; d < a.value_depth; d += w) {
      Vec<T> lanes[w];
      for (int i = 0; i < w; ++i)
        lanes[i] = t.started ? load(t.out + (d + i) * kTile<T> + half) * factor : Vec<T>{};
      transpose_rows<w / 2, T>(lanes);
      for (int64_t i = 0; i < count; ++i)
        store_as<T>(storage, to[i] + d * step, lanes[i], a.value_depth - d);
    }
    if (keys.partial) continue;
    const Vec<T> lse = log_sum_exp(a, top, sum);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = t.first + half + i;
      const int64_t head = rows.batch * a.heads + rows.head_of(a, r);
      a.lse[head * a.queries + rows.query_of(a, r)] = sum[i] == T(0) ? -kInfinity<T> : lse[i];
    }
  }
}

}  // namespace nnarch::NNARCH_ISA
