// A convolution's tensors as the products see them, group by group.
#pragma once

#include <cstdint>
#include <vector>

#include "conv2d/cpu_shape.h"
#include "conv2d/winograd_tile.h"
#include "cpu/grid_image.h"
#include "cpu/pack_weight.h"
#include "cpu/tensor.h"

namespace nnarch {

inline std::vector<Tap> forward_taps(const ConvShape& p) {
  std::vector<Tap> taps;
  for (int64_t r = 0; r < p.r; ++r)
    for (int64_t s = 0; s < p.s; ++s)
      taps.push_back({r * p.dilation_h - p.top, s * p.dilation_w - p.left});
  return taps;
}

// The weight of one group with output channels as columns.
template <class T>
WeightView<T> forward_weight(const Tensor& weight, const ConvShape& p, int64_t group) {
  WeightView<T> view{.data = data<T>(weight) + group * p.group_k() * weight.stride(0),
                     .columns = p.group_k(),
                     .depth = p.group_c(),
                     .column_stride = weight.stride(0),
                     .depth_stride = weight.stride(1),
                     .tap_offset = {}};
  for (int64_t r = 0; r < p.r; ++r)
    for (int64_t s = 0; s < p.s; ++s)
      view.tap_offset.push_back(r * weight.stride(2) + s * weight.stride(3));
  return view;
}

// The image of a forward convolution as seen by one group. Where every pixel is for itself, all are
// one long row, of all images or of each one `apart`.
template <class T>
GridImage<T> forward_image(const T* x, const ConvShape& p, int64_t group, bool apart = false) {
  GridImage<T> image{.data = x + group * p.group_c(),
                     .h = p.h,
                     .w = p.w,
                     .pixel = p.c,
                     .n = p.n,
                     .grid_h = p.oh,
                     .grid_w = p.ow,
                     .step_y = p.stride_h,
                     .step_x = p.stride_w,
                     .taps = forward_taps(p),
                     .depth = p.group_c()};
  if (p.pointwise()) {
    image.n = apart ? p.n : 1, image.h = image.grid_h = 1;
    image.w = image.grid_w = (apart ? 1 : p.n) * p.h * p.w;
  }
  return image;
}

// The gradient of one group's outputs, as an image; its grid is itself, without taps.
template <class T>
GridImage<T> grad_image(const T* grad, const ConvShape& p, int64_t group) {
  return {.data = grad + group * p.group_k(),
          .h = p.oh,
          .w = p.ow,
          .pixel = p.k,
          .n = p.n,
          .grid_h = p.oh,
          .grid_w = p.ow,
          .step_y = 1,
          .step_x = 1,
          .taps = {},
          .depth = p.group_k()};
}

// The algorithm's name in nnarch.trace(): a string literal.
inline const char* algorithm_name(const ConvShape& p, const WinogradTile& tile) {
  if (tile.is_pair()) return "strassen";
  const bool strided = tile.stride == 2;
  switch (tile.m) {
    case 2:
      return strided ? "winograd_strided_2x2" : "winograd_2x2";
    case 3:
      return "winograd_strided_3x3";
    case 4:
      return strided ? "winograd_strided_4x4" : "winograd_4x4";
    case 5:
      return "winograd_5x5";
    case 6:
      return "winograd_6x6";
    default:
      return p.pointwise() ? "gemm_1x1" : "implicit_gemm";
  }
}

}  // namespace nnarch
