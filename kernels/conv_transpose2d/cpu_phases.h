// The phases of a transposed convolution.
//
// An output row i meets kernel row r where i + top − r·dilation is a multiple of the stride. So
// rows with the same residue (i + top) mod stride share their taps, and rows and columns of one
// phase are an ordinary convolution with stride 1: of the input, with these taps, into every
// stride-th row and column of the output. No zero is stuffed, nothing is added up in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv_transpose2d/cpu_shape.h"
#include "cpu/gather_gemm.h"
#include "cpu/grid_image.h"
#include "cpu/pack_weight.h"

namespace nnarch {

// Rows or columns of a transposed convolution.
struct TransposedAxis {
  int64_t size;  // of the output
  int64_t stride, pad, kernel, dilation;

  static TransposedAxis rows(const TransposedShape& p) {
    return {p.oh, p.stride_h, p.top, p.r, p.dilation_h};
  }
  static TransposedAxis columns(const TransposedShape& p) {
    return {p.ow, p.stride_w, p.left, p.s, p.dilation_w};
  }

  // The taps of a residue, the last first, so that they read from top to bottom.
  std::vector<int64_t> taps(int64_t residue) const {
    std::vector<int64_t> all;
    for (int64_t r = kernel - 1; r >= 0; --r)
      if ((residue - r * dilation) % stride == 0) all.push_back(r);
    return all;
  }

  // How many taps a residue has, if they read neighbouring pixels; else 0.
  int64_t dense_taps(int64_t residue) const {
    const std::vector<int64_t> all = taps(residue);
    for (size_t i = 1; i < all.size(); ++i)
      if ((all[i - 1] - all[i]) * dilation != stride) return 0;
    return static_cast<int64_t>(all.size());
  }

  // The residues that have taps, in a fixed order: there are no more than taps.
  std::vector<int64_t> residues() const {
    std::vector<int64_t> all;
    for (int64_t r = 0; r < kernel; ++r) {
      const int64_t residue = r * dilation % stride;
      if (std::find(all.begin(), all.end(), residue) == all.end()) all.push_back(residue);
    }
    return all;
  }
};

// Output positions first, first + stride, …: `count` of them. Tap taps[i] reads the input at the
// index in the phase + offset[i].
struct TransposedPhase {
  int64_t residue, first, count;
  std::vector<int64_t> taps, offset;

  static TransposedPhase of(const TransposedAxis& axis, int64_t first) {
    const int64_t residue = (first + axis.pad) % axis.stride;
    TransposedPhase phase{
        residue, first, ceil_div(axis.size - first, axis.stride), axis.taps(residue), {}};
    for (const int64_t r : phase.taps)
      phase.offset.push_back((first + axis.pad - r * axis.dilation) / axis.stride);
    return phase;
  }
};

inline std::vector<TransposedPhase> phases_of(const TransposedAxis& axis) {
  std::vector<TransposedPhase> all;
  for (int64_t first = 0; first < std::min(axis.stride, axis.size); ++first)
    all.push_back(TransposedPhase::of(axis, first));
  return all;
}

// The input as one phase of one group reads it.
template <class T>
GridImage<T> phase_image(const T* x, const TransposedShape& p, int64_t group,
                         const TransposedPhase& rows, const TransposedPhase& columns) {
  GridImage<T> image{.data = x + group * p.group_c(),
                     .h = p.h,
                     .w = p.w,
                     .pixel = p.c,
                     .n = p.n,
                     .grid_h = rows.count,
                     .grid_w = columns.count,
                     .step_y = 1,
                     .step_x = 1,
                     .taps = {},
                     .depth = p.group_c()};
  for (const int64_t dy : rows.offset)
    for (const int64_t dx : columns.offset) image.taps.push_back({dy, dx});
  return image;
}

// The weight of one group at some taps, with the channels of y as columns.
template <class T>
WeightView<T> phase_weight(const Tensor& weight, int64_t groups, int64_t group,
                           const std::vector<int64_t>& rows, const std::vector<int64_t>& columns) {
  const int64_t depth = weight.size(0) / groups;
  WeightView<T> view{.data = data<T>(weight) + group * depth * weight.stride(0),
                     .columns = weight.size(1),
                     .depth = depth,
                     .column_stride = weight.stride(1),
                     .depth_stride = weight.stride(0),
                     .tap_offset = {}};
  for (const int64_t r : rows)
    for (const int64_t s : columns)
      view.tap_offset.push_back(r * weight.stride(2) + s * weight.stride(3));
  return view;
}

}  // namespace nnarch
