// The geometry of a convolution, checked.
#pragma once

#include <cstdint>

#include "cpu/tensor.h"

namespace nnarch {

struct ConvShape {
  int64_t n, c, h, w;  // input
  int64_t k, r, s;     // output channels, kernel rows and columns
  int64_t stride_h, stride_w;
  int64_t top, left, bottom, right;  // padding
  int64_t dilation_h, dilation_w;
  int64_t groups;
  int64_t oh, ow;  // output

  int64_t taps() const { return r * s; }
  int64_t group_c() const { return c / groups; }
  int64_t group_k() const { return k / groups; }
  IntList input_size() const { return {n, c, h, w}; }
  IntList output_size() const { return {n, k, oh, ow}; }
  bool pointwise() const {
    return r == 1 && s == 1 && stride_h == 1 && stride_w == 1 && top == 0 && left == 0 &&
           bottom == 0 && right == 0;
  }
};

inline int64_t conv_output_size(int64_t in, int64_t pad, int64_t kernel, int64_t stride,
                                int64_t dilation) {
  const int64_t span = checked_sum(in, pad) - checked_product(dilation, kernel - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

inline ConvShape conv_shape(const IntList& input, const IntList& weight, const IntList& stride,
                            const IntList& padding, const IntList& dilation, int64_t groups) {
  require(input.size() == 4 && weight.size() == 4, "conv2d: x and weight must be 4-D");
  require(stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
          "conv2d: stride and dilation take 2 numbers, padding 4");
  ConvShape p{input[0],   input[1],    input[2],    input[3],   weight[0],  weight[2],
              weight[3],  stride[0],   stride[1],   padding[0], padding[1], padding[2],
              padding[3], dilation[0], dilation[1], groups,     0,          0};
  require(p.stride_h > 0 && p.stride_w > 0 && p.dilation_h > 0 && p.dilation_w > 0,
          "conv2d: stride and dilation must be positive");
  require(p.top >= 0 && p.left >= 0 && p.bottom >= 0 && p.right >= 0,
          "conv2d: padding must not be negative");
  for (int64_t number :
       {p.stride_h, p.stride_w, p.dilation_h, p.dilation_w, p.top, p.left, p.bottom, p.right})
    require(number < int64_t{1} << 31, "conv2d: stride, padding or dilation is too large");
  require(groups > 0 && p.c % groups == 0 && p.k % groups == 0 && weight[1] == p.c / groups,
          "conv2d: channels and groups do not match the weight");
  require(p.k > 0, "conv2d: weight has no output channels");
  require(p.r > 0 && p.s > 0, "conv2d: kernel size must be positive");
  p.oh = conv_output_size(p.h, p.top + p.bottom, p.r, p.stride_h, p.dilation_h);
  p.ow = conv_output_size(p.w, p.left + p.right, p.s, p.stride_w, p.dilation_w);
  require(p.oh > 0 && p.ow > 0, "conv2d: kernel is larger than the padded input");
  checked_product(checked_product(p.n, p.k), checked_product(p.oh, p.ow));
  return p;
}

}  // namespace nnarch
