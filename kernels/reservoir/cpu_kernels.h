// The kernels of sparse reservoirs of one instruction set.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

// Rows of a slice. Rows are sorted by their number of nonzeros, so those of a slice, which are
// computed together, have almost equally many.
inline constexpr int kSlice = 8;
// Bytes of a state in a block of batch rows that are computed together: a cache line.
inline constexpr int kBatchBytes = 64;

// A sparse square matrix in slices: entry k of row j of a slice is at [first + k * kSlice + j].
// Entries that pad a row are zeros in column n, where the state has a zero that never changes: a
// NaN of another neuron times a padding zero would be NaN.
template <class T>
struct Sliced {
  int64_t neurons, slices;
  const int32_t* lengths;  // [slices]
  const int32_t* rows;     // [slices * kSlice]: row numbers; n where a slice has no row
  const T* values;
  const uint16_t* narrow;  // columns; one of the two is null
  const int32_t* wide;
};

// s = (1 - leak) * s + leak * f(W·s + w_in·input + bias) over a sequence.
template <class T>
struct Scan {
  Sliced<T> matrix;
  bool gathers;                      // whether the machine's gathers are fast
  int64_t steps, batch, given, fed;  // a step's input is `given` numbers of x, then `fed` outputs
  const T* x;                        // [steps, batch, given]
  bool driven;                       // x is [steps, batch, neurons] and is w_in·input already
  const T* w_in;                     // [neurons, given + fed]
  const T* w_in_t;                   // [given + fed, neurons]
  const T* bias;                     // [neurons]
  T leak;
  int activation;
  const T* state0;  // [batch, neurons]
  int64_t skip;     // steps whose states are not kept
  T* states;        // [steps - skip, batch, neurons], or null
  T* last;          // [batch, neurons]
  // y = w_out·[s, input of the step] + b_out, fed back into the next step.
  const T* y0;      // [batch, fed]
  const T* w_out;   // [fed, readout]
  int64_t readout;  // neurons, or neurons + given + fed
  const T* b_out;   // [fed]
  T* y;             // [steps, batch, fed]
};

template <class T>
struct ScanTable {
  int64_t lanes;  // batch rows of a block
  // One batch row.
  void (*row)(const Scan<T>& a, int64_t b, T* scratch);
  // Up to `lanes` batch rows from b on.
  void (*block)(const Scan<T>& a, int64_t b, int64_t count, T* scratch);
};

// Elements of T for a task: two states, a step's input and outputs, slack for whole vectors.
template <class T>
int64_t scan_scratch(const Scan<T>& a, int64_t lanes) {
  const int64_t input = a.driven ? a.matrix.neurons : a.given;
  return lanes * (2 * (a.matrix.neurons + 1) + input + 2 * a.fed + 8) + 256;
}

NNARCH_PER_ISA(template <class T> const ScanTable<T>& scan_table();)

}  // namespace nnarch
