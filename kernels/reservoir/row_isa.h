// A sequence of one batch row. For *_isa.cpp files.
#pragma once

#include "reservoir/gather_isa.h"
#include "reservoir/response_isa.h"

namespace nnarch::NNARCH_ISA {

// The sum of a[i] * b[i].
template <class T>
NNARCH_INLINE T dot(const T* a, const T* b, int64_t n) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) sum[j] += load(a + i + j * W) * load(b + i + j * W);
  for (; i < n; i += W) sum[0] += load_n(a + i, n - i) * load_n(b + i, n - i);
  return horizontal_sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The state after a step, from z = W·state. A step is memory-bound by nothing here: z, the state
// and w_in_t lie in the caches.
template <class T, int code>
NNARCH_INLINE void respond_row(const Scan<T>& a, const T* z, const T* input, T* state, T* kept) {
  constexpr int W = kLanes<T>;
  const int64_t n = a.matrix.neurons, inputs = a.driven ? 0 : a.given + a.fed;
  const T stay = T(1) - a.leak;
  for (int64_t i = 0; i < n; i += W) {
    const int64_t lanes = n - i;
    Vec<T> sum = load_n(z + i, lanes) + load_n(a.bias + i, lanes);
    if (a.driven) sum += load_n(input + i, lanes);
    for (int64_t j = 0; j < inputs; ++j) sum += load_n(a.w_in_t + j * n + i, lanes) * input[j];
    const Vec<T> s = load_n(state + i, lanes) * stay + respond<T, code>(sum) * a.leak;
    store_n(state + i, s, lanes);
    if (kept) store_n(kept + i, s, lanes);
  }
}

// The outputs of a step.
template <class T>
NNARCH_INLINE void read_out_row(const Scan<T>& a, const T* state, const T* input, T* y) {
  const int64_t n = a.matrix.neurons;
  for (int64_t o = 0; o < a.fed; ++o) {
    const T* w = a.w_out + o * a.readout;
    T sum = dot(w, state, n) + a.b_out[o];
    if (a.readout > n) sum += dot(w + n, input, a.readout - n);
    y[o] = sum;
  }
}

template <class T, int code, class I>
NNARCH_NOINLINE void scan_row(const Scan<T>& a, const I* at, int64_t b, T* scratch) {
  const int64_t n = a.matrix.neurons, width = a.driven ? n : a.given;
  T *state = scratch, *z = state + n + 1, *input = z + n + 1;
  for (int64_t i = 0; i < n; ++i) state[i] = a.state0[b * n + i];
  state[n] = T(0);  // what padding multiplies
  for (int64_t o = 0; o < a.fed; ++o) input[a.given + o] = a.y0[b * a.fed + o];
  for (int64_t t = 0; t < a.steps; ++t) {
    const T* from = a.x + (t * a.batch + b) * width;
    if (a.fed) {
      for (int64_t i = 0; i < a.given; ++i) input[i] = from[i];
      from = input;
    }
    if (kGathersAtOnce && a.gathers)
      multiply_row<T, kGathersAtOnce>(a.matrix, at, state, z);
    else
      multiply_row<T, false>(a.matrix, at, state, z);
    T* kept = t < a.skip || !a.states ? nullptr : a.states + ((t - a.skip) * a.batch + b) * n;
    respond_row<T, code>(a, z, from, state, kept);
    if (a.fed) {
      T* y = a.y + (t * a.batch + b) * a.fed;
      read_out_row(a, state, input, y);
      for (int64_t o = 0; o < a.fed; ++o) input[a.given + o] = y[o];
    }
  }
  for (int64_t i = 0; i < n; ++i) a.last[b * n + i] = state[i];
}

}  // namespace nnarch::NNARCH_ISA
