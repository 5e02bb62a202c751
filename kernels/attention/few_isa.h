// Attention of few queries on many keys: every row of K and V is read once, as it lies, in two
// streams, and vectors run along the head dimension. For *_isa.cpp files.
#pragma once

#include "attention/drop_isa.h"
#include "attention/tile_isa.h"
#include "attention/tile_rows_isa.h"

namespace nnarch::NNARCH_ISA {

// Rows up to which this is faster than a tile, most of whose lanes would be empty.
template <class T>
inline constexpr int kFewRows = kVectorBytes == 64 ? 8 : 4;

namespace {

// Keys of a block. Each change between K and V starts a stream anew: 512 keys of 12 heads took 56
// µs in blocks of 64, 53 in blocks of 256.
constexpr int64_t kFewBlock = 256;

// `Keys` rows, `elements` apart, in two streams: the second half of them begins `apart` rows behind
// the first. One core reads 24 GB/s of memory in two or four streams and 17 in one (Zen 3). Row J
// by at most one addition.
template <class T, int Keys>
struct KeyRows {
  static constexpr int kHalf = Keys > 1 ? Keys / 2 : 1;
  const char *p0, *p4, *q0, *q4;
  int64_t step, step3;

  NNARCH_INLINE KeyRows(const T* first, int64_t elements, int64_t apart)
      : p0(reinterpret_cast<const char*>(first)),
        step(elements * static_cast<int64_t>(sizeof(T))),
        step3(3 * step) {
    p4 = p0 + 4 * step, q0 = p0 + apart * step, q4 = q0 + 4 * step;
  }
  template <int J>
  NNARCH_INLINE const T* row() const {
    constexpr int of_half = J % kHalf, rest = of_half % 4;
    const char* base = J < kHalf ? (of_half < 4 ? p0 : p4) : of_half < 4 ? q0 : q4;
    return reinterpret_cast<const T*>(base + (rest == 3 ? step3 : rest * step));
  }
  NNARCH_INLINE void next(int64_t bytes) { p0 += bytes, p4 += bytes, q0 += bytes, q4 += bytes; }
};

// Lane i of the result is the sum of v[i]'s lanes.
template <int H, class V, int... I>
NNARCH_INLINE V add_crosswise(V a, V b, Indices<I...>) {
  constexpr int lanes = sizeof...(I);
  const V low = __builtin_shufflevector(a, b, ((I & H) == 0 ? I : lanes + I - H)...);
  const V high = __builtin_shufflevector(a, b, ((I & H) == 0 ? I + H : lanes + I)...);
  return low + high;
}
template <int H, class T>
NNARCH_INLINE Vec<T> sums_of(Vec<T>* v) {
  for (int i = 0; i < H; ++i) v[i] = add_crosswise<H>(v[i], v[i + H], MakeIndices<kLanes<T>>{});
  if constexpr (H > 1)
    return sums_of<H / 2, T>(v);
  else
    return v[0];
}

// Vectors of the head dimension that R queries keep in registers: every key's row is read through,
// in the order of memory, before the next.
template <int R>
inline constexpr int kDepthAtOnce = kVectorBytes == 64 ? (R == 4 ? 2 : 4) : 4 / R;

template <int C, class T>
NNARCH_INLINE Vec<T> add_products(Vec<T> sum, const T* k, const Vec<T>* q) {
  // The prefetch of what is loaded next looks idle, and is worth twice the bandwidth of memory: 50
  // MB of keys and values took 3.0 to 4.3 ms without and 1.8 to 1.9 with it; 1 to 16 kB ahead, 2.8
  // to 3.4.
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    __builtin_prefetch(k + c * kLanes<T>);
    sum += load(k + c * kLanes<T>) * q[c];
  }
  return sum;
}

template <class T, int R, int C, int... I>
NNARCH_INLINE void add_dots(Indices<I...>, const T* q, int64_t q_step,
                            const KeyRows<T, kLanes<T> / R>& rows, Vec<T>* sum) {
  constexpr int keys = kLanes<T> / R;
  Vec<T> query[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) query[r][c] = load(q + r * q_step + c * kLanes<T>);
  // I counts keys first, so that a row is read R times in a row.
  ((sum[I % R * keys + I / R] =
        add_products<C, T>(sum[I % R * keys + I / R], rows.template row<I / R>(), query[I % R])),
   ...);
}

template <class T, int R, int... I>
NNARCH_INLINE void add_last_dots(Indices<I...>, const T* q, int64_t q_step, int64_t n,
                                 const KeyRows<T, kLanes<T> / R>& rows, Vec<T>* sum) {
  constexpr int keys = kLanes<T> / R;
  ((sum[I] += load(q + I / keys * q_step) * load_n(rows.template row<I % keys>(), n)), ...);
}

// Scores of R queries and kLanes / R keys, of which the second half lies `apart` rows behind the
// first: lane r·(kLanes / R) + key.
template <class T, int R, int... I>
NNARCH_INLINE Vec<T> dots(Indices<I...> each, const T* q, int64_t q_step, int64_t depth, const T* k,
                          int64_t k_step, int64_t apart) {
  constexpr int w = kLanes<T>, C = kDepthAtOnce<R>;
  Vec<T> sum[w] = {(static_cast<void>(I), Vec<T>{})...};
  KeyRows<T, w / R> rows(k, k_step, apart);
  int64_t d = 0;
  for (; d + C * w <= depth; d += C * w, rows.next(C * kVectorBytes))
    add_dots<T, R, C>(each, q + d, q_step, rows, sum);
  for (; d + w <= depth; d += w, rows.next(kVectorBytes))
    add_dots<T, R, 1>(each, q + d, q_step, rows, sum);
  if (d < depth) add_last_dots<T, R>(each, q + d, q_step, depth - d, rows, sum);
  return sums_of<w / 2, T>(sum);
}

template <class T>
NNARCH_INLINE T dot(const T* q, const T* k, int64_t depth) {
  Vec<T> sum{};
  for (int64_t d = 0; d < depth; d += kLanes<T>) sum += load(q + d) * load_n(k + d, depth - d);
  return horizontal_sum<T>(sum);
}

// What the rows of a task share.
template <class T>
struct FewRows {
  const T* q;  // [rows][q_step], times scale / ln 2; zeros behind the depth
  int64_t q_step;
  T* scores;  // [rows][kFewBlock]
  T* out;     // [rows][out_step]
  int64_t out_step;
};

// Scores of rows [row, row + R) with n keys of a block.
template <class T, int R>
NNARCH_NOINLINE void score_few(const FewRows<T>& f, int64_t row, int64_t depth,
                               const RowsInMemory<T>& k, int64_t n) {
  constexpr int keys = kLanes<T> / R, half = KeyRows<T, keys>::kHalf;
  const T* q = f.q + row * f.q_step;
  T* to = f.scores + row * kFewBlock;
  const int64_t part = n / keys * half;
  const auto put = [&](int64_t j, const Vec<T>& s, int lane) NNARCH_INLINE_LAMBDA {
    __builtin_memcpy(to + j, reinterpret_cast<const T*>(&s) + lane, half * sizeof(T));
  };
  for (int64_t j = 0; j < part; j += half) {
    const Vec<T> s =
        dots<T, R>(MakeIndices<kLanes<T>>{}, q, f.q_step, depth, k.data + j * k.step, k.step, part);
    for (int r = 0; r < R; ++r) {
      put(r * kFewBlock + j, s, r * keys);
      if (keys > 1) put(r * kFewBlock + part + j, s, r * keys + half);
    }
  }
  for (int64_t j = n / keys * keys; j < n; ++j)
    for (int r = 0; r < R; ++r)
      to[r * kFewBlock + j] = dot(q + r * f.q_step, k.data + j * k.step, depth);
}

// out[row] = out[row]·rescale[row] + Σ_j scores[row][j]·v[j] for C vectors of the value dimension;
// of the last vector `last` lanes are there.
template <class T, int R, int C>
NNARCH_INLINE void weigh_few(const FewRows<T>& f, int64_t row, const T* rescale, const T* v,
                             int64_t v_step, int64_t d, int64_t last, int64_t n) {
  constexpr int w = kLanes<T>;
  const T* p = f.scores + row * kFewBlock;
  Vec<T> sum[R][C] = {};
  const auto add = [&](int64_t j) NNARCH_INLINE_LAMBDA {
    const T* from = v + j * v_step + d;
    Vec<T> value[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) __builtin_prefetch(from + c * w);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) value[c] = C == 1 ? load_n(from, last) : load(from + c * w);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = broadcast(p[r * kFewBlock + j]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r][c] += weight * value[c];
    }
  };
  const int64_t half = n / 2;  // two streams, as of keys
  for (int64_t j = 0; j < half; ++j) add(j), add(half + j);
  if (2 * half < n) add(n - 1);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      T* to = f.out + (row + r) * f.out_step + d + c * w;
      store(to, load(to) * rescale[row + r] + sum[r][c]);
    }
}

template <class T, int R>
NNARCH_NOINLINE void weigh_block(const FewRows<T>& f, int64_t row, const T* rescale,
                                 const RowsInMemory<T>& v, int64_t depth, int64_t n) {
  constexpr int w = kLanes<T>;
  constexpr int most = kVectorBytes == 64 ? 16 / R : 8 / R;
  int64_t d = 0;
  if constexpr (most >= 8)
    for (; d + 8 * w <= depth; d += 8 * w)
      weigh_few<T, R, 8>(f, row, rescale, v.data, v.step, d, w, n);
  if constexpr (most >= 4)
    for (; d + 4 * w <= depth; d += 4 * w)
      weigh_few<T, R, 4>(f, row, rescale, v.data, v.step, d, w, n);
  if constexpr (most >= 2)
    for (; d + 2 * w <= depth; d += 2 * w)
      weigh_few<T, R, 2>(f, row, rescale, v.data, v.step, d, w, n);
  for (; d < depth; d += w) weigh_few<T, R, 1>(f, row, rescale, v.data, v.step, d, depth - d, n);
}

// f(Size<R>{}, row) for rows in groups of 4, 2 and 1.
template <class T, class F>
NNARCH_INLINE void in_groups(int64_t rows, const F& f) {
  int64_t row = 0;
  if constexpr (kLanes<T> >= 4)
    for (; row + 4 <= rows; row += 4) f(Size<4>{}, row);
  for (; row + 2 <= rows; row += 2) f(Size<2>{}, row);
  if (row < rows) f(Size<1>{}, row);
}

// Mask and band of one row: scores of keys [first, first + n); up to whole vectors they are set.
template <class T>
NNARCH_INLINE void hide_few(const Attention<T>& a, const char* mask, int64_t first_key,
                            int64_t end_key, int64_t first, int64_t n, T* scores) {
  if (mask) {
    alignas(kVectorBytes) T bias[kFewBlock];
    bias_row<T>(a.mask, mask + first * a.mask.values.column, n, bias);
    for (int64_t j = 0; j < n; ++j)
      scores[j] = !a.mask.boolean ? scores[j] + bias[j] : bias[j] == T(0) ? scores[j] : bias[j];
  }
  for (int64_t j = 0; j < n && first + j < first_key; ++j) scores[j] = -kInfinity<T>;
  const int64_t end = end_key - first;
  for (int64_t j = end < 0 ? 0 : end; j < whole_vectors<T>(n); ++j) scores[j] = -kInfinity<T>;
  for (int64_t j = n; j < whole_vectors<T>(n); ++j) scores[j] = -kInfinity<T>;
}

// The largest lane.
template <int H, class T, int... I>
NNARCH_INLINE T horizontal_max(Vec<T> v, Indices<I...> each) {
  v = at_least<T>(v, __builtin_shufflevector(v, v, (I ^ H)...));
  if constexpr (H > 1)
    return horizontal_max<H / 2, T>(v, each);
  else
    return v[0];
}

template <class T>
NNARCH_INLINE T largest(const T* x, int64_t n, T most) {
  Vec<T> m = broadcast(most);
  for (int64_t j = 0; j < n; j += kLanes<T>) m = at_least<T>(load(x + j), m);
  return horizontal_max<kLanes<T> / 2, T>(m, MakeIndices<kLanes<T>>{});
}

// One row's scores to weights; returns what its earlier sums are multiplied by. `sum` stays a
// vector: its lanes are added at the end.
template <class T>
NNARCH_INLINE T soften_few(T* scores, int64_t n, const Power<T>& power, T& top, T* sum) {
  const T most = largest(scores, n, top);
  const T used = most == -kInfinity<T> ? T(0) : most;
  const T rescale = power(broadcast(top - used))[0];
  top = most;
  Vec<T> total = load(sum) * rescale;
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    const Vec<T> p = power(load(scores + j) - used);
    store(scores + j, p);
    total += p;
  }
  store(sum, total);
  return rescale;
}

template <class T>
NNARCH_INLINE int64_t few_scratch(const Attention<T>& a) {
  const int64_t rows = kFewRows<T>, d = whole_vectors<T>(a.depth),
                dv = whole_vectors<T>(a.value_depth);
  return rows * (d + dv + kFewBlock + kLanes<T>)+kFewBlock *
         ((a.k.in_place ? 0 : d) + (a.v.in_place ? 0 : dv));
}

template <class T>
NNARCH_NOINLINE void write_few(const Attention<T>& a, const QueryRows& rows,
                               const KeyRange<T>& keys, int64_t r, const T* out, T top, T sum) {
  if (keys.partial) {
    T* to = keys.partial + r * keys.partial_step;
    for (int64_t d = 0; d < a.value_depth; d += kLanes<T>)
      store_n(to + d, load(out + d), a.value_depth - d);
    to[keys.partial_step - 2] = top, to[keys.partial_step - 1] = sum;
    return;
  }
  const int64_t head = rows.head_of(a, r), query = rows.query_of(a, r);
  const T inverse = sum == T(0) ? T(0) : T(1) / sum;
  char* to = a.out.at(rows.batch, head, query);
  for (int64_t d = 0; d < a.value_depth; d += kLanes<T>)
    store_as<T>(a.out.storage, to + d * a.out.column, load(out + d) * inverse, a.value_depth - d);
  const T lse = log_sum_exp(a, broadcast(top), broadcast(sum))[0];
  a.lse[(rows.batch * a.heads + head) * a.queries + query] = sum == T(0) ? -kInfinity<T> : lse;
}

template <class T>
void run_few(const Attention<T>& a, const QueryRows& rows, const KeyRange<T>& keys, T* scratch) {
  constexpr int w = kLanes<T>;
  const int64_t d = whole_vectors<T>(a.depth), dv = whole_vectors<T>(a.value_depth);
  const int64_t count = rows.count;
  T* q = scratch;
  T* out = q + count * d;
  T* scores = out + count * dv;
  T* sums = scores + count * kFewBlock;
  T* k_copy = sums + count * w;
  T* v_copy = k_copy + (a.k.in_place ? 0 : kFewBlock * d);
  const FewRows<T> few{q, d, scores, out, dv};
  T top[kFewRows<T>], rescale[kFewRows<T>];
  int64_t first_key[kFewRows<T>], end_key[kFewRows<T>];
  const char* mask[kFewRows<T>];
  const int64_t length = a.key_length(rows.batch);
  const Power<T> power = power_of(a);
  int64_t begin = keys.end, end = keys.first;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t head = rows.head_of(a, r), query = rows.query_of(a, r);
    const char* from = a.q.at(rows.batch, head, query);
    for (int64_t i = 0; i < d; i += w)
      store(q + r * d + i, load_as<T>(a.q.storage, from + i * a.q.column, a.q.column, a.depth - i) *
                               a.query_scale);
    for (int64_t i = 0; i < dv; i += w) store(out + r * dv + i, Vec<T>{});
    store(sums + r * w, Vec<T>{});
    top[r] = -kInfinity<T>;
    first_key[r] = a.first_key(query), end_key[r] = a.end_key(query, length);
    mask[r] = a.mask.values.data ? a.mask.values.at(rows.batch, head, query) : nullptr;
    if (first_key[r] >= end_key[r]) continue;
    begin = first_key[r] < begin ? first_key[r] : begin;
    end = end_key[r] > end ? end_key[r] : end;
  }
  begin = begin < keys.first ? keys.first : begin / 4 * 4;
  end = end > keys.end ? keys.end : end;
  const int64_t group = rows.head / a.heads_each();
  for (int64_t j = begin; j < end; j += kFewBlock) {
    const int64_t n = end - j < kFewBlock ? end - j : kFewBlock;
    const RowsInMemory<T> k = readable_rows(a.k, a.k.at(rows.batch, group, j), n, a.depth, k_copy);
    in_groups<T>(count, [&](auto size, int64_t row) NNARCH_INLINE_LAMBDA {
      score_few<T, size.value>(few, row, a.depth, k, n);
    });
    for (int64_t r = 0; r < count; ++r) {
      T* s = scores + r * kFewBlock;
      hide_few(a, mask[r], first_key[r], end_key[r], j, n, s);
      rescale[r] = soften_few(s, n, power, top[r], sums + r * w);
      if (!a.drops) continue;
      alignas(kVectorBytes) T factors[kFewBlock];
      const int64_t outer = rows.batch * a.heads + rows.head_of(a, r);
      row_factors(a, static_cast<uint32_t>(rows.query_of(a, r)), static_cast<uint32_t>(outer), j, n,
                  factors);
      for (int64_t i = 0; i < n; ++i) s[i] *= factors[i];
    }
    const RowsInMemory<T> v =
        readable_rows(a.v, a.v.at(rows.batch, group, j), n, a.value_depth, v_copy);
    in_groups<T>(count, [&](auto size, int64_t row) NNARCH_INLINE_LAMBDA {
      weigh_block<T, size.value>(few, row, rescale, v, a.value_depth, n);
    });
  }
  for (int64_t r = 0; r < count; ++r)
    write_few(a, rows, keys, r, out + r * dv, top[r], horizontal_sum<T>(load(sums + r * w)));
}

// The sums of several ranges of keys, each with a maximum of its own, in one.
template <class T>
void combine(const Attention<T>& a, const QueryRows& rows, const T* partial, int64_t partial_step,
             int64_t chunks, int64_t chunk_step, T* scratch) {
  const int64_t dv = whole_vectors<T>(a.value_depth);
  const Power<T> power = power_of(a);
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* from = partial + r * partial_step;
    T top = -kInfinity<T>, sum = T(0);
    for (int64_t c = 0; c < chunks; ++c) {
      const T one = from[c * chunk_step + partial_step - 2];
      top = one > top || one != one ? one : top;
    }
    const T used = top == -kInfinity<T> ? T(0) : top;
    for (int64_t d = 0; d < dv; d += kLanes<T>) store(scratch + d, Vec<T>{});
    for (int64_t c = 0; c < chunks; ++c) {
      const T* part = from + c * chunk_step;
      const T factor = power(broadcast(part[partial_step - 2] - used))[0];
      sum += part[partial_step - 1] * factor;
      for (int64_t d = 0; d < a.value_depth; d += kLanes<T>)
        store(scratch + d, load(scratch + d) + load_n(part + d, a.value_depth - d) * factor);
    }
    write_few(a, rows, KeyRange<T>{0, 0, nullptr, 0}, r, scratch, top, sum);
  }
}

}  // namespace
}  // namespace nnarch::NNARCH_ISA
