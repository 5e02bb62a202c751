// The pooling kernels of one instruction set, and the windows they run over.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

// The windows of one axis. Output i takes the inputs start[i], start[i] + step, … below end[i], all
// of them inside the input; none where start[i] >= end[i].
struct Axis {
  int64_t inputs, outputs;
  const int64_t* start;
  const int64_t* end;
  const int64_t* count;  // an average divides by the product of both axes' counts
  int64_t step;
  // Windows at regular distances: output i begins at i·stride - padding, `kernel` taps long.
  // kernel is 0 where windows are irregular (adaptive pooling, gradients).
  int64_t kernel, stride, padding;
};

// Positions in a plane while they are compared: lanes as wide as those of the values.
template <class T>
struct LaneIndex;
template <>
struct LaneIndex<float> {
  typedef int32_t Type;
};
template <>
struct LaneIndex<double> {
  typedef int64_t Type;
};

// Rows of a plane, padded on both sides; `slack` elements past the last one may be read.
inline __attribute__((always_inline)) int64_t row_pitch(const Axis& w) {
  const int64_t row = w.padding + w.inputs;
  const int64_t windows =
      w.kernel == 0 ? 0 : (w.outputs - 1) * w.stride + (w.kernel - 1) * w.step + 1;
  return row > windows ? row : windows;
}
inline constexpr int64_t kSlack = 128;
inline __attribute__((always_inline)) int64_t plane_buffer_size(const Axis& w, int64_t rows) {
  return rows * row_pitch(w) + kSlack;
}

template <class T>
struct PlaneBuffer {
  T* values;  // plane_buffer_size elements
  int64_t rows;
  // What an average multiplies by: 1 / count of the row times 1 / count of the column. Null for the
  // columns where all are alike and the factors of the rows hold them.
  const T* row_scales;
  const T* column_scales;                  // readable past the end by whole vectors
  bool same_scale;                         // for all rows and columns
  typename LaneIndex<T>::Type* positions;  // as `values`, or null where no indices are wanted
};

// Rows that are read at a time where x comes from memory.
inline constexpr int64_t kFarRows = 4;

// How an image passes through the caches (cpu/streaming.h).
struct Traffic {
  bool far = false;     // x comes from memory: its rows are read from end to end ahead of use
  bool ask = false;     // x does not come from near: rows are asked for ahead of use (slide_isa.h)
  bool stream = false;  // y is written past the caches
};

template <class T>
struct PoolTable {
  // Output rows [from, to) of an image [H][W][channels]. y and indices point to its output image;
  // indices may be null. Index -1 marks a window without any input.
  void (*max_rows)(const T* image, int64_t channels, const Axis& h, const Axis& w, int64_t from,
                   int64_t to, T* y, int64_t* indices, const Traffic& traffic);
  void (*average_rows)(const T* image, int64_t channels, const Axis& h, const Axis& w, int64_t from,
                       int64_t to, T* y, const Traffic& traffic);
  // The same for planes [H][W] that follow each other, and regular windows whose columns have
  // stride 1 or 2.
  void (*max_planes)(const T* x, int64_t planes, const Axis& h, const Axis& w, int64_t from,
                     int64_t to, T* y, int64_t* indices, const PlaneBuffer<T>& buffer);
  void (*average_planes)(const T* x, int64_t planes, const Axis& h, const Axis& w, int64_t from,
                         int64_t to, T* y, const PlaneBuffer<T>& buffer);
  // Adds n channels of pixels that lie `step` apart to sums[n].
  void (*sum_pixels)(const T* image, int64_t pixels, int64_t step, int64_t n, double* sums);
  // The means of planes that follow each other.
  void (*mean_planes)(const T* x, int64_t planes, int64_t pixels, T* y);
};

NNARCH_PER_ISA(template <class T> const PoolTable<T>& pool_table();)

}  // namespace nnarch
