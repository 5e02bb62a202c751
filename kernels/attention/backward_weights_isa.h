// A tile's weights from its scores: band, mask, dropout, 2^(score - log-sum-exp). For *_isa.cpp.
#pragma once

#include "attention/backward_problem.h"
#include "attention/mask_isa.h"
#include "attention/softmax_isa.h"
#include "attention/storage_isa.h"
#include "cpu/philox_isa.h"

namespace nnarch::NNARCH_ISA {

// A tile is that many queries by keys. One of 64 × 64 floats is half of L1; the rest of what a tile
// works on comes from L2.
inline constexpr int64_t kTileQueries = 64, kTileKeys = 64;

// Which columns (keys) of a tile its rows (queries) see: low <= column - row <= high.
struct Band {
  int64_t low, high, rows, columns;

  static int64_t within(int64_t x, int64_t end) { return x < 0 ? 0 : x < end ? x : end; }
  int64_t first_column(int64_t row) const { return within(row + low, columns); }
  int64_t end_column(int64_t row) const { return within(row + high + 1, columns); }
  int64_t first_row(int64_t column) const { return within(column - high, rows); }
  int64_t end_row(int64_t column) const { return within(column - low + 1, rows); }
  bool empty() const { return low > columns - 1 || high < 1 - rows; }
};

// Where a tile lies.
struct TilePlace {
  int64_t batch, head, query, key;  // the first ones
  Band band;
  int64_t width;  // columns in whole vectors
};

// Words of Philox for the next 4 vectors of columns, as they follow each other.
template <int... I>
NNARCH_INLINE void interleave(Words a, Words b, Words (&to)[2], Indices<I...>) {
  constexpr int w = kLanes<float>;
  to[0] = __builtin_shufflevector(a, b, (I % 2 * w + I / 2)...);
  to[1] = __builtin_shufflevector(a, b, (I % 2 * w + w / 2 + I / 2)...);
}

NNARCH_INLINE void interleave_words(const PhiloxWords& from, Words (&to)[4]) {
  constexpr auto lanes = MakeIndices<kLanes<float>>{};
  Words even[2], odd[2];
  interleave(from.w0, from.w2, even, lanes);
  interleave(from.w1, from.w3, odd, lanes);
  Words low[2], high[2];
  interleave(even[0], odd[0], low, lanes);
  interleave(even[1], odd[1], high, lanes);
  to[0] = low[0], to[1] = low[1], to[2] = high[0], to[3] = high[1];
}

NNARCH_INLINE void keep_words(Words kept, float scale, const float* from, float* to) {
  const Vec<float> factor = (Vec<float>)(kept & (Words)broadcast(scale));
  store(to, load(from) * factor);
}
NNARCH_INLINE void keep_words(Words kept, double scale, const double* from, double* to) {
  for (int i = 0; i < kLanes<float>; ++i) to[i] = from[i] * (kept[i] ? scale : 0.0);
}

// A row of weights after dropout. Rows have room for kTileKeys.
template <class T>
NNARCH_INLINE void drop_row(const Attention<T>& a, uint32_t outer, uint32_t query, int64_t key,
                            int64_t columns, const T* from, T* to) {
  constexpr int w = kLanes<float>;
  static_assert(kTileKeys % (4 * w) == 0);
  const T scale = static_cast<T>(a.survivor_scale);
  const bool none = a.threshold > 0xFFFFFFFFu;
  const Words threshold = static_cast<uint32_t>(a.threshold) - Words{};
  for (int64_t c = 0; c < columns; c += 4 * w) {
    Words quad;
    for (int i = 0; i < w; ++i) quad[i] = static_cast<uint32_t>(i);
    quad += static_cast<uint32_t>((key + c) / 4);
    Words word[4];
    interleave_words(philox(a.seed, quad, query - Words{}, outer - Words{}), word);
    for (int i = 0; i < 4; ++i) {
      const Words kept = none ? Words{} : (Words)(word[i] >= threshold);
      keep_words(kept, scale, from + c + i * w, to + c + i * w);
    }
  }
}

template <class T>
NNARCH_INLINE Vec<T> lane_numbers() {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = static_cast<T>(i);
  return v;
}

// weights[c] = 2^(scale · score + bias · log2(e) - lse) for columns [first, end), 0 beside them.
// None is above 1, whatever large scores, whose rounding is not the forward's, and their lse make
// of it.
template <class T, bool Biased>
NNARCH_INLINE void weights_row(T* row, int64_t width, int64_t first, int64_t end, T scale, T lse,
                               const T* bias) {
  constexpr int w = kLanes<T>;
  const Vec<T> lanes = lane_numbers<T>();
  for (int64_t c = 0; c < width; c += w) {
    if (c >= end || c + w <= first) {
      store(row + c, Vec<T>{});
      continue;
    }
    Vec<T> score = load(row + c) * scale - lse;
    if constexpr (Biased) score += load(bias + c) * T(kLog2E);
    score = score > T(0) ? Vec<T>{} : score;  // NaN stays
    Vec<T> weight = exp2<T>(score);
    if (c < first) weight = lanes >= static_cast<T>(first - c) ? weight : Vec<T>{};
    if (c + w > end) weight = lanes < static_cast<T>(end - c) ? weight : Vec<T>{};
    store(row + c, weight);
  }
}

// Scores of a row, in place: scale · score + bias in columns [first, end), -infinity beside them.
template <class T>
NNARCH_NOINLINE void whole_scores(T* row, int64_t width, int64_t first, int64_t end, T scale,
                                  const T* bias) {
  constexpr int w = kLanes<T>;
  const Vec<T> lanes = lane_numbers<T>(), hidden = broadcast(-kInfinity<T>);
  for (int64_t c = 0; c < width; c += w) {
    Vec<T> score = load(row + c) * scale;
    if (bias) score += load(bias + c);
    score = lanes >= static_cast<T>(first - c) ? score : hidden;
    store(row + c, lanes < static_cast<T>(end - c) ? score : hidden);
  }
}

// Such scores to weights, where the log-sum-exp is large.
template <class T>
NNARCH_NOINLINE void large_weights(T* row, int64_t width, T top, T inverse) {
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    Vec<T> score = load(row + c) - top;
    score = score > T(0) ? Vec<T>{} : score;  // of products that rounded otherwise; NaN stays
    store(row + c, exp2<T>(score * T(kLog2E)) * inverse);
  }
}

// What the rows of a tile are normalized by.
template <class T>
struct RowSums {
  const T* lse;            // in units of ln 2
  const T *top, *inverse;  // LargeSums, or null

  RowSums(const T* lse_, const Attention<T>& a, const LargeSums<T>& large, const TilePlace& p)
      : lse(lse_), top(large.top), inverse(large.inverse) {
    if (!top) return;
    const int64_t row = (p.batch * a.heads + p.head) * a.queries + p.query;
    top += row, inverse += row;
  }
  bool is_large(int64_t r) const { return inverse && inverse[r] > T(0); }
};

// What a boolean mask leaves of a tile; Seen::some for a mask that is added.
template <class T>
NNARCH_INLINE Seen seen_in_tile(const Attention<T>& a, const TilePlace& p) {
  const Operand& m = a.mask.values;
  if (!m.data) return Seen::all;
  if (!a.mask.boolean) return Seen::some;
  const int64_t rows = m.row == 0 ? 1 : p.band.rows;
  const int64_t columns = m.column == 0 ? 1 : p.band.columns;
  const char* from = m.at(p.batch, p.head, p.query) + p.key * m.column;
  bool any = false, all = true;
  for (int64_t r = 0; r < rows; ++r, from += m.row) {
    const Seen seen = seen_of(from, m.column, columns);
    any |= seen != Seen::nothing;
    all &= seen == Seen::all;
  }
  return all ? Seen::all : any ? Seen::some : Seen::nothing;
}

// Scores to weights, in place: kTileKeys a row.
template <class T>
NNARCH_NOINLINE void tile_weights(const Attention<T>& a, const TilePlace& p, Seen seen,
                                  const RowSums<T>& sums, T* weights, T* kept) {
  const Band& band = p.band;
  const Operand& m = a.mask.values;
  const T scale = a.scale * T(kLog2E);
  alignas(kVectorBytes) T bias[kTileKeys];
  for (int64_t r = 0; r < band.rows; ++r) {
    T* row = weights + r * kTileKeys;
    const int64_t first = band.first_column(r), end = band.end_column(r);
    const bool biased = seen != Seen::all;
    if (biased && (r == 0 || m.row != 0))
      bias_row<T>(a.mask, m.at(p.batch, p.head, p.query + r) + p.key * m.column, band.columns,
                  bias);
    if (sums.is_large(r)) [[unlikely]] {
      whole_scores<T>(row, p.width, first, end, a.scale, biased ? bias : nullptr);
      large_weights<T>(row, p.width, sums.top[r], sums.inverse[r]);
    } else if (biased) {
      weights_row<T, true>(row, p.width, first, end, scale, sums.lse[r], bias);
    } else {
      weights_row<T, false>(row, p.width, first, end, scale, sums.lse[r], nullptr);
    }
    if (a.drops)
      drop_row<T>(a, static_cast<uint32_t>(p.batch * a.heads + p.head),
                  static_cast<uint32_t>(p.query + r), p.key, band.columns, row,
                  kept + r * kTileKeys);
  }
}

// Weights (after dropout) to the gradients of their scores, where that of the weights is given:
// `less` loses their sums, row by row.
template <class T>
NNARCH_NOINLINE void given_gradient(const AttentionBackward<T>& a, const TilePlace& p,
                                    const T* kept, T scale, T* to, T* less) {
  constexpr int w = kLanes<T>;
  const Operand& g = a.weights_grad;
  const T factor = a.weights_factor;
  for (int64_t r = 0; r < p.band.rows; ++r) {
    const char* from = g.at(p.batch, p.head, p.query + r) + p.key * g.column;
    Vec<T> sum{};
    for (int64_t c = 0; c < p.width; c += w) {
      const int64_t at = r * kTileKeys + c;
      const Vec<T> given = load_as<T>(g.storage, from + c * g.column, g.column, p.band.columns - c);
      const Vec<T> d = load(kept + at) * (given * factor);
      sum += d;
      store(to + at, d * scale);
    }
    less[r] -= horizontal_sum<T>(sum);
  }
}

// The mask's gradient is the sum of the scores'; these are multiplied by the scale afterwards.
template <class T>
NNARCH_NOINLINE void add_mask_gradient(const AttentionBackward<T>& a, const TilePlace& p, T* d) {
  constexpr int w = kLanes<T>;
  const Sums<T>& sums = a.d_mask;
  T* to = sums.at(p.batch, p.head, p.query) + p.key * sums.column;
  for (int64_t c = 0; c < p.band.columns; c += w) {
    const int64_t n = p.band.columns - c < w ? p.band.columns - c : w;
    Vec<T> total{};
    for (int64_t r = 0; r < p.band.rows; ++r) {
      T* at = d + r * kTileKeys + c;
      const Vec<T> v = load(at);
      store(at, v * a.forward.scale);
      T* sum = to + r * sums.row + c;
      if (sums.row == 0)
        total += v;
      else if (sums.column != 0)
        store_n(sum, load_n(sum, n) + v, n);
      else
        to[r * sums.row] += horizontal_sum<T>(v);
    }
    if (sums.row != 0) continue;
    if (sums.column != 0)
      store_n(to + c, load_n(to + c, n) + total, n);
    else
      to[0] += horizontal_sum<T>(total);
  }
}

}  // namespace nnarch::NNARCH_ISA
