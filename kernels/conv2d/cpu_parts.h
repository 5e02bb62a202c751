// Parts of a convolution's output, and what each reads of the input: half types are widened part by
// part (cpu/half.h).
#pragma once

#include <algorithm>

#include "conv2d/cpu_shape.h"
#include "cpu/half.h"

namespace nnarch {

// Whether every output row's window touches the image: then every part of the rows is a convolution
// of its own.
inline bool may_cut_rows(const ConvShape& p) {
  const int64_t reach = p.dilation_h * (p.r - 1);
  return p.top <= reach && p.bottom <= reach;
}

// Bytes of floats, input and output, for a row of the output.
inline int64_t part_row_bytes(const ConvShape& p) {
  const int64_t in = ceil_div(p.c * p.h * p.w, p.oh), out = p.k * p.ow;
  return (in + out) * int64_t{sizeof(float)};
}

// The convolution that computes a part of the output, from which part of the input.
struct ConvPart {
  ConvShape shape;
  ImagePart input;

  ConvPart(const ConvShape& p, const ImagePart& out) : shape(p) {
    shape.n = out.images;
    input = {out.image, out.images, 0, p.h};
    if (out.rows == p.oh) return;
    const int64_t first = out.row * p.stride_h - p.top;
    const int64_t end = first + (out.rows - 1) * p.stride_h + p.dilation_h * (p.r - 1) + 1;
    input.row = std::max<int64_t>(first, 0);
    input.rows = std::min(end, p.h) - input.row;
    shape.top = input.row - first, shape.bottom = end - input.row - input.rows;
    shape.h = input.rows, shape.oh = out.rows;
  }
};

}  // namespace nnarch
