// A sequence of a block of batch rows, which lie side by side: every nonzero is one multiplication
// of a vector. For *_isa.cpp files.
#pragma once

#include "reservoir/gather_isa.h"
#include "reservoir/response_isa.h"
#include "reservoir/transpose_isa.h"

namespace nnarch::NNARCH_ISA {

template <class T>
inline constexpr int kBlockLanes = kBatchBytes / static_cast<int>(sizeof(T));
template <class T>
inline constexpr int kBlockVectors = kBatchBytes / kVectorBytes;

// Rows whose sums are in registers at once: four chains hide the latency of an addition.
template <class T>
inline constexpr int kRowsAtOnce = kBlockVectors<T> == 4 ? 2 : 4;

// to[i][lane] = from[lane][i] for i < n, where from's rows lie `stride` apart; lanes past `count`
// become zero.
template <class T>
NNARCH_INLINE void to_lanes(const T* from, int64_t stride, int64_t n, int64_t count, T* to) {
  constexpr int W = kLanes<T>, L = kBlockLanes<T>;
  for (int64_t i = 0; i < n; i += W)
    for (int64_t b = 0; b < L; b += W) {
      Vec<T> tile[W];
      for (int j = 0; j < W; ++j)
        tile[j] = b + j < count ? load_n(from + (b + j) * stride + i, n - i) : Vec<T>{};
      transpose<T>(tile);
      for (int j = 0; j < W && i + j < n; ++j) store(to + (i + j) * L + b, tile[j]);
    }
}

// The other way round; lanes past `count` go nowhere.
template <class T>
NNARCH_INLINE void from_lanes(const T* from, int64_t n, int64_t count, T* to, int64_t stride) {
  constexpr int W = kLanes<T>, L = kBlockLanes<T>;
  for (int64_t i = 0; i < n; i += W)
    for (int64_t b = 0; b < count; b += W) {
      Vec<T> tile[W];
      for (int j = 0; j < W; ++j)
        tile[j] = i + j < n ? load(from + (i + j) * L + b) : Vec<T>{};
      transpose<T>(tile);
      for (int j = 0; j < W && b + j < count; ++j)
        store_n(to + (b + j) * stride + i, tile[j], n - i);
    }
}

// One step of some rows of a slice. `drive` is null where the input is `inputs` numbers a lane.
template <class T, int code, class I>
NNARCH_INLINE void step_rows(const Scan<T>& a, const T* values, const I* at, int64_t length,
                             const int32_t* rows, const T* input, const T* drive, const T* state,
                             T* next) {
  constexpr int R = kRowsAtOnce<T>, K = kBlockVectors<T>, W = kLanes<T>, L = kBlockLanes<T>;
  const int64_t n = a.matrix.neurons, inputs = a.given + a.fed;
  Vec<T> sum[R][K];
  for (int j = 0; j < R; ++j) {
    const int64_t row = rows[j] < n ? rows[j] : 0;  // a row that fills the slice: any input does
    for (int k = 0; k < K; ++k) sum[j][k] = broadcast<T>(a.bias[row]);
    if (drive)
      for (int k = 0; k < K; ++k) sum[j][k] += load(drive + row * L + k * W);
    else
      for (int64_t i = 0; i < inputs; ++i)
        for (int k = 0; k < K; ++k) sum[j][k] += load(input + i * L + k * W) * a.w_in[row * inputs + i];
  }
  for (int64_t e = 0; e < length; ++e, values += kSlice, at += kSlice)
    for (int j = 0; j < R; ++j)
      for (int k = 0; k < K; ++k)
        sum[j][k] += load(state + static_cast<int64_t>(at[j]) * L + k * W) * values[j];
  const T stay = T(1) - a.leak;
  for (int j = 0; j < R; ++j)
    for (int k = 0; k < K; ++k) {
      const int64_t place = static_cast<int64_t>(rows[j]) * L + k * W;
      store(next + place, load(state + place) * stay + respond<T, code>(sum[j][k]) * a.leak);
    }
}

template <class T, int code, class I>
NNARCH_INLINE void step_block(const Scan<T>& a, const I* at, const T* input, const T* drive,
                              const T* state, T* next) {
  constexpr int R = kRowsAtOnce<T>, L = kBlockLanes<T>;
  const Sliced<T>& m = a.matrix;
  const T* values = m.values;
  const int32_t* rows = m.rows;
  for (int64_t s = 0; s < m.slices; ++s, rows += kSlice) {
    for (int j = 0; j < kSlice; j += R)
      step_rows<T, code>(a, values + j, at + j, m.lengths[s], rows + j, input, drive, state, next);
    values += m.lengths[s] * kSlice;
    at += m.lengths[s] * kSlice;
  }
  for (int l = 0; l < L; ++l) next[m.neurons * L + l] = T(0);  // what padding multiplies
}

// y[o][lane] of a step.
template <class T>
NNARCH_INLINE void read_out_block(const Scan<T>& a, const T* state, const T* input, T* y) {
  constexpr int K = kBlockVectors<T>, W = kLanes<T>, L = kBlockLanes<T>;
  const int64_t n = a.matrix.neurons;
  for (int64_t o = 0; o < a.fed; ++o) {
    const T* w = a.w_out + o * a.readout;
    Vec<T> sum[2][K] = {};  // two chains of additions
    for (int64_t i = 0; i < n; ++i)
      for (int k = 0; k < K; ++k) sum[i & 1][k] += load(state + i * L + k * W) * w[i];
    for (int64_t i = n; i < a.readout; ++i)
      for (int k = 0; k < K; ++k) sum[i & 1][k] += load(input + (i - n) * L + k * W) * w[i];
    for (int k = 0; k < K; ++k) store(y + o * L + k * W, sum[0][k] + sum[1][k] + a.b_out[o]);
  }
}

template <class T, int code, class I>
NNARCH_NOINLINE void scan_block(const Scan<T>& a, const I* at, int64_t b, int64_t count,
                                T* scratch) {
  constexpr int L = kBlockLanes<T>;
  const int64_t n = a.matrix.neurons, width = a.driven ? n : a.given;
  T *state = scratch, *next = state + (n + 1) * L, *input = next + (n + 1) * L;
  T* y = input + (a.given + a.fed) * L;
  T* drive = a.driven ? input : nullptr;
  to_lanes(a.state0 + b * n, n, n, count, state);
  for (int l = 0; l < L; ++l) state[n * L + l] = T(0);
  if (a.fed) to_lanes(a.y0 + b * a.fed, a.fed, a.fed, count, input + a.given * L);
  for (int64_t t = 0; t < a.steps; ++t) {
    to_lanes(a.x + (t * a.batch + b) * width, width, width, count, input);
    step_block<T, code>(a, at, input, drive, state, next);
    T* const before = state;
    state = next;
    next = before;
    if (t >= a.skip && a.states)
      from_lanes(state, n, count, a.states + ((t - a.skip) * a.batch + b) * n, n);
    if (a.fed) {
      read_out_block(a, state, input, y);
      from_lanes(y, a.fed, count, a.y + (t * a.batch + b) * a.fed, a.fed);
      for (int64_t i = 0; i < a.fed * L; ++i) input[a.given * L + i] = y[i];
    }
  }
  from_lanes(state, n, count, a.last + b * n, n);
}

}  // namespace nnarch::NNARCH_ISA
