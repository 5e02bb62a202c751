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
      for (int j = 0; j < W; ++j) tile[j] = i + j < n ? load(from + (i + j) * L + b) : Vec<T>{};
      transpose<T>(tile);
      for (int j = 0; j < W && b + j < count; ++j)
        store_n(to + (b + j) * stride + i, tile[j], n - i);
    }
}

// What a step reads of its arguments, in registers: stores of vectors may alias a struct.
template <class T>
struct Step {
  const T *bias, *w_in, *input, *drive, *state;
  T* next;
  int64_t neurons, inputs;
  T leak, stay;
};

// The sums of some rows before the matrix: what comes from outside. `drive` is null where that is
// `inputs` numbers a lane.
template <class T, int R, int K>
NNARCH_INLINE void begin_rows(const Step<T>& a, const int32_t* rows, Vec<T> (&sum)[R][K]) {
  constexpr int W = kLanes<T>, L = kBlockLanes<T>;
  int64_t row[R];  // 0 for rows that fill the last slice: any input does
  for (int j = 0; j < R; ++j) row[j] = rows[j] < a.neurons ? rows[j] : 0;
  for (int j = 0; j < R; ++j)
    for (int k = 0; k < K; ++k) sum[j][k] = broadcast<T>(a.bias[row[j]]);
  if (a.drive) {
    for (int j = 0; j < R; ++j)
      for (int k = 0; k < K; ++k) sum[j][k] += load(a.drive + row[j] * L + k * W);
    return;
  }
  for (int64_t i = 0; i < a.inputs; ++i)
    for (int j = 0; j < R; ++j)
      for (int k = 0; k < K; ++k)
        sum[j][k] += load(a.input + i * L + k * W) * a.w_in[row[j] * a.inputs + i];
}

// One step of some rows of a slice.
template <class T, int code, class I>
NNARCH_INLINE void step_rows(const Step<T>& a, const T* values, const I* at, int64_t length,
                             const int32_t* rows) {
  constexpr int R = kRowsAtOnce<T>, K = kBlockVectors<T>, W = kLanes<T>, L = kBlockLanes<T>;
  T* to[R];
  for (int j = 0; j < R; ++j) {
    to[j] = a.next + static_cast<int64_t>(rows[j]) * L;
    __builtin_prefetch(to[j], 1);  // rows lie anywhere: 5 % of a step of 1000 neurons
  }
  Vec<T> sum[R][K];
  begin_rows(a, rows, sum);
  for (int64_t e = 0; e < length; ++e, values += kSlice, at += kSlice)
    for (int j = 0; j < R; ++j)
      for (int k = 0; k < K; ++k)
        sum[j][k] += load(a.state + static_cast<int64_t>(at[j]) * L + k * W) * values[j];
  for (int j = 0; j < R; ++j)
    for (int k = 0; k < K; ++k) {
      const Vec<T> old = load(a.state + (to[j] - a.next) + k * W);
      store(to[j] + k * W, old * a.stay + respond<T, code>(sum[j][k]) * a.leak);
    }
}

template <class T, int code, class I>
NNARCH_INLINE void step_block(const Step<T> a, const Sliced<T>& m, const I* at) {
  constexpr int R = kRowsAtOnce<T>, L = kBlockLanes<T>;
  const T* values = m.values;
  const int32_t *rows = m.rows, *lengths = m.lengths;
  const int64_t slices = m.slices;
  for (int64_t s = 0; s < slices; ++s, rows += kSlice) {
    const int64_t length = lengths[s];
    for (int j = 0; j < kSlice; j += R) step_rows<T, code>(a, values + j, at + j, length, rows + j);
    values += length * kSlice;
    at += length * kSlice;
  }
  for (int l = 0; l < L; ++l) a.next[a.neurons * L + l] = T(0);  // what padding multiplies
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
    step_block<T, code>(Step<T>{a.bias, a.w_in, input, drive, state, next, n, a.given + a.fed,
                                a.leak, T(1) - a.leak},
                        a.matrix, at);
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
