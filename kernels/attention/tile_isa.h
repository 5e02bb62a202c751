// The two matrix products of a tile: queries lie side by side in two vectors, keys below each
// other. For *_isa.cpp files.
//
//   scores  [keys][kTile]         = K · Qᵀ     rows of K broadcast, Q packed [depth][kTile]
//   out     [value depth][kTile]  = Vᵀ · P     columns of V broadcast, P as the softmax left it
//
// Both are the register tile of cpu/gemm_step_isa.h: K and V are read as they lie.
#pragma once

#include "attention/softmax_isa.h"
#include "cpu/gemm_step_isa.h"

namespace nnarch::NNARCH_ISA {

// Rows of a register tile: 12 and not the 14 that fit, because 128 keys are then 10 tiles and 8.
#if defined(NNARCH_ISA_avx512)
inline constexpr int kPiece = 12;
#else
inline constexpr int kPiece = 6;
#endif

template <int N>
struct Size {
  static constexpr int value = N;
};

// Calls f(Size<n>{}, at) for pieces that cover [at, end): whole ones, then 8, 4, 2 and 1.
template <class F>
NNARCH_INLINE void in_pieces(int64_t at, int64_t end, const F& f) {
  for (; end - at >= kPiece; at += kPiece) f(Size<kPiece>{}, at);
  if constexpr (kPiece > 8)
    if (end - at >= 8) f(Size<8>{}, at), at += 8;
  if (end - at >= 4) f(Size<4>{}, at), at += 4;
  if (end - at >= 2) f(Size<2>{}, at), at += 2;
  if (end - at >= 1) f(Size<1>{}, at);
}

// The length of a part of a score's sum: the rounding error of a running sum grows with its length,
// and an output that one key decides carries it whole.
NNARCH_INLINE int64_t score_part(int64_t depth) {
  constexpr int64_t most = 96;
  return depth <= most ? depth : depth <= 2 * most ? (depth + 1) / 2 : most;
}

// Lines that are to come into cache, one a step of a product.
template <class T>
using Fetch = EvenLines<T>;

namespace {

template <class T, Used Use, int... I>
NNARCH_INLINE void score_rows(Indices<I...> each, const T* q, int64_t depth, const T* k,
                              int64_t k_step, Fetch<T> fetch, T* scores, Vec<T>& top0,
                              Vec<T>& top1) {
  constexpr int w = kLanes<T>;
  EvenRows<T> rows(k, k_step);
  const int64_t part = score_part(depth);
  for (int64_t from = 0;; from += part) {
    const int64_t steps = depth - from < part ? depth - from : part;
    Vec<T> left[sizeof...(I)] = {(static_cast<void>(I), Vec<T>{})...};
    Vec<T> right[sizeof...(I)] = {(static_cast<void>(I), Vec<T>{})...};
    multiply<T, Use>(each, rows, 0, steps, q, fetch, 0, left, right);
    if (from > 0) {
      ((left[I] += load(scores + I * 2 * w)), ...);
      if constexpr (Use == kBothVectors) ((right[I] += load(scores + I * 2 * w + w)), ...);
    }
    ((store(scores + I * 2 * w, left[I])), ...);
    if constexpr (Use == kBothVectors) ((store(scores + I * 2 * w + w, right[I])), ...);
    if (from + steps < depth) {
      fetch.at += steps * fetch.stride;
      continue;
    }
    ((top0 = at_least<T>(left[I], top0)), ...);
    if constexpr (Use == kBothVectors) ((top1 = at_least<T>(right[I], top1)), ...);
    return;
  }
}

// Columns of a matrix with rows `step` apart.
template <class T>
struct Columns {
  const T* at;
  int64_t step;
  template <int I>
  NNARCH_INLINE T value(int64_t) const {
    return at[I];
  }
  NNARCH_INLINE void next() { at += step; }
};

template <class T, Used Use, int... I>
NNARCH_INLINE void weigh_columns(Indices<I...> each, const T* weights, int64_t keys, const T* v,
                                 int64_t v_step, Fetch<T> fetch, const T* rescale, T* out) {
  constexpr int w = kLanes<T>;
  Vec<T> left[sizeof...(I)] = {(static_cast<void>(I), Vec<T>{})...};
  Vec<T> right[sizeof...(I)] = {(static_cast<void>(I), Vec<T>{})...};
  Columns<T> columns{v, v_step};
  multiply<T, Use>(each, columns, 0, keys, weights, fetch, 0, left, right);
  if (rescale) {
    const Vec<T> r0 = load(rescale), r1 = load(rescale + w);
    ((left[I] += r0 * load(out + I * 2 * w)), ...);
    if constexpr (Use == kBothVectors) ((right[I] += r1 * load(out + I * 2 * w + w)), ...);
  }
  ((store(out + I * 2 * w, left[I])), ...);
  if constexpr (Use == kBothVectors) ((store(out + I * 2 * w + w, right[I])), ...);
}

}  // namespace

// scores[i][query] = k[i]·q[.][query] for R keys; the maxima so far go on in top[kTile].
template <class T, Used Use, int R>
NNARCH_NOINLINE void score_piece(const T* q, int64_t depth, const T* k, int64_t k_step,
                                 Fetch<T> fetch, T* scores, T* top) {
  Vec<T> top0 = load(top), top1 = load(top + kLanes<T>);
  score_rows<T, Use>(MakeIndices<R>{}, q, depth, k, k_step, fetch, scores, top0, top1);
  store(top, top0), store(top + kLanes<T>, top1);
}

// out[i][query] = Σ_j v[j][i]·weights[j][query] for R columns of v, plus what `out` holds times
// rescale[query], unless that is null.
template <class T, Used Use, int R>
NNARCH_NOINLINE void weigh_piece(const T* weights, int64_t keys, const T* v, int64_t v_step,
                                 Fetch<T> fetch, const T* rescale, T* out) {
  weigh_columns<T, Use>(MakeIndices<R>{}, weights, keys, v, v_step, fetch, rescale, out);
}

}  // namespace nnarch::NNARCH_ISA
