// The kernels of upsampling of one instruction set.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

// Indices of lanes, as wide as T.
template <class T>
struct LaneOf;
template <>
struct LaneOf<float> {
  using Type = int32_t;
};
template <>
struct LaneOf<double> {
  using Type = int64_t;
};

// Where the values of an axis come from. Output i of the forward pass is w0·x[first] +
// w1·x[second]; where w0 is null it is x[first].
template <class T>
struct Sources {
  int64_t inputs, outputs;
  const int64_t *first, *second;
  const T *w0, *w1;
};

// The transpose: result i is the sum of the values start[i] to end[i], the first of them times
// weight[at[i]], the next times weight[at[i] + 1] and so on.
template <class T>
struct Spread {
  int64_t results, values;
  const int64_t *start, *end, *at;
  const T* weight;
};

// How many vectors hold what a vector of outputs picks from: one, two, or any number.
enum class Reach { one, two, any };

// The columns of rows that lie along vectors: vector b of outputs picks lanes lane0[b·W + l] from
// base0[b] on and lane1[b·W + l] from base1[b] on, and weighs them. Pixels of few channels are
// columns as well.
template <class T>
struct Columns {
  using Lane = typename LaneOf<T>::Type;
  int64_t inputs, outputs, taps, step;
  Reach reach;
  const int64_t *base0, *base1;
  const Lane *lane0, *lane1;
  // Forward: the two weights, null for nearest. Transpose: `taps` vectors of weights for every
  // vector of outputs, of which tap k lies k·step after lane0; w1 is null.
  const T *w0, *w1;
};

template <class T>
struct UpsampleTable {
  int64_t lanes;
  // Rows [from, to) of the output of a channels_last image. past_caches: pixels are whole vectors.
  void (*nearest_rows)(const T* x, int64_t channels, const Sources<T>& h, const Sources<T>& w,
                       int64_t from, int64_t to, T* y, bool past_caches);
  void (*bilinear_rows)(const T* x, int64_t channels, const Sources<T>& h, const Sources<T>& w,
                        int64_t from, int64_t to, T* y, bool past_caches);
  void (*spread_rows)(const T* grad, int64_t channels, const Spread<T>& h, const Spread<T>& w,
                      int64_t from, int64_t to, T* dx);
  // The same of planes, in scratch memory of plane_scratch(…) elements.
  void (*nearest_planes)(const T* x, const Sources<T>& h, const Columns<T>& w, int64_t from,
                         int64_t to, T* scratch, T* y, bool past_caches);
  void (*bilinear_planes)(const T* x, const Sources<T>& h, const Columns<T>& w, int64_t from,
                          int64_t to, T* scratch, T* y, bool past_caches);
  void (*spread_planes)(const T* grad, const Spread<T>& h, const Columns<T>& w, int64_t from,
                        int64_t to, T* scratch, T* dx);
};

// Rows that are computed before one is read again: what has just been stored cannot be loaded at
// another offset for some 20 cycles.
inline constexpr int64_t kRowsTogether = 4;

// From one row of inputs to the next, and from one of outputs: whole vectors and slack.
template <class T>
int64_t input_pitch(const Columns<T>& w) {
  constexpr int64_t vector = 64 / sizeof(T);
  return (w.inputs + w.taps * w.step + 3 * vector - 1) / vector * vector;
}
template <class T>
int64_t output_pitch(const Columns<T>& w) {
  constexpr int64_t vector = 64 / sizeof(T);
  return (w.outputs + vector - 1) / vector * vector;
}
template <class T>
int64_t plane_scratch(const Columns<T>& w) {
  return kRowsTogether * (input_pitch(w) + output_pitch(w));
}

NNARCH_PER_ISA(template <class T> const UpsampleTable<T>& upsample_table();)

}  // namespace nnarch
