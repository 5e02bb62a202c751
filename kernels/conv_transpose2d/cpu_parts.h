// A transposed convolution cut into parts of its output (cpu/half.h has how they are cut).
#pragma once

#include <algorithm>

#include "conv_transpose2d/cpu_shape.h"
#include "cpu/half.h"

namespace nnarch {

// Bytes of floats, input and output, for a row of the output.
inline int64_t part_row_bytes(const TransposedShape& p) {
  return (ceil_div(p.c * p.h * p.w, p.oh) + p.k * p.ow) * int64_t{sizeof(float)};
}

// The part of a transposed convolution that computes a part of the output, from which input.
struct TransposedPart {
  TransposedShape shape;
  ImagePart input;

  TransposedPart(const TransposedShape& p, const ImagePart& out) : shape(p) {
    shape.n = out.images;
    input = {out.image, out.images, 0, p.h};
    if (out.rows == p.oh) return;
    // Input row i is added to rows i·stride − top to i·stride − top + reach.
    const int64_t reach = (p.r - 1) * p.dilation_h, first = out.row + p.top;
    const int64_t last = first + out.rows - 1;
    const int64_t least = first > reach ? ceil_div(first - reach, p.stride_h) : 0;
    input.row = std::min({least, first / p.stride_h, p.h - 1});
    input.rows = std::max<int64_t>(std::min(p.h, last / p.stride_h + 1) - input.row, 1);
    shape.top = first - input.row * p.stride_h;
    shape.h = input.rows, shape.oh = out.rows;
  }
};

}  // namespace nnarch
