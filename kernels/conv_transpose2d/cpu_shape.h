// The geometry of a transposed convolution.
#pragma once

#include <cstdint>

#include "cpu/tensor.h"

namespace nnarch {

// y[i·stride + r·dilation − top] += x[i] · w[r], rows and columns alike. The weight is
// [c, k / groups, r, s]. Of a convolution's gradient by its input, x is the output's gradient and y
// the input's.
struct TransposedShape {
  int64_t n, c, h, w;  // x
  int64_t k, r, s;     // channels of y, kernel rows and columns
  int64_t stride_h, stride_w;
  int64_t top, left;
  int64_t dilation_h, dilation_w;
  int64_t groups;
  int64_t oh, ow;  // y

  int64_t taps() const { return r * s; }
  int64_t group_c() const { return c / groups; }
  int64_t group_k() const { return k / groups; }
  IntList output_size() const { return {n, k, oh, ow}; }
};

// (in − 1)·stride − 2·pad + dilation·(kernel − 1) + extra + 1
inline int64_t transposed_size(int64_t in, int64_t pad, int64_t kernel, int64_t stride,
                               int64_t dilation, int64_t extra) {
  const int64_t span =
      checked_sum(checked_product(in - 1, stride), checked_product(dilation, kernel - 1));
  return checked_sum(span, extra + 1 - 2 * pad);
}

// x, weight; stride, padding, output padding and dilation of rows and columns.
inline TransposedShape transposed_shape(const IntList& input, const IntList& weight,
                                        const IntList& stride, const IntList& padding,
                                        const IntList& output_padding, const IntList& dilation,
                                        int64_t groups) {
  require(input.size() == 4 && weight.size() == 4, "conv_transpose2d: x and weight must be 4-D");
  require(stride.size() == 2 && padding.size() == 2 && output_padding.size() == 2 &&
              dilation.size() == 2,
          "conv_transpose2d: stride, padding, output_padding and dilation take 2 numbers");
  for (int i : {0, 1}) {
    require(stride[i] > 0 && dilation[i] > 0,
            "conv_transpose2d: stride and dilation must be positive");
    require(padding[i] >= 0, "conv_transpose2d: padding must not be negative");
    constexpr int64_t limit = int64_t{1} << 31;
    require(stride[i] < limit && dilation[i] < limit && padding[i] < limit,
            "conv_transpose2d: stride, padding or dilation is too large");
    require(output_padding[i] >= 0 && (output_padding[i] < std::max(stride[i], dilation[i])),
            "conv_transpose2d: output_padding must be smaller than stride or dilation");
    require(input[2 + i] > 0, "conv_transpose2d: the input has no pixels");
  }
  TransposedShape p{input[0],    input[1],  input[2],  input[3],   0,          weight[2],
                    weight[3],   stride[0], stride[1], padding[0], padding[1], dilation[0],
                    dilation[1], groups,    0,         0};
  require(p.c > 0, "conv_transpose2d: weight has no input channels");
  require(groups > 0 && weight[0] == p.c && p.c % groups == 0,
          "conv_transpose2d: channels and groups do not match the weight");
  p.k = checked_product(weight[1], groups);
  require(p.k > 0, "conv_transpose2d: weight has no output channels");
  require(p.r > 0 && p.s > 0, "conv_transpose2d: kernel size must be positive");
  p.oh = transposed_size(p.h, p.top, p.r, p.stride_h, p.dilation_h, output_padding[0]);
  p.ow = transposed_size(p.w, p.left, p.s, p.stride_w, p.dilation_w, output_padding[1]);
  require(p.oh > 0 && p.ow > 0, "conv_transpose2d: the output has no pixels");
  checked_product(checked_product(p.n, p.k), checked_product(p.oh, p.ow));
  return p;
}

}  // namespace nnarch
