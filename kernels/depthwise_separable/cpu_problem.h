// A depthwise-separable convolution, with or without an expansion before it, as the drivers see it.
#pragma once

#include <cstdint>

#include "conv2d/cpu_shape.h"
#include "cpu/epilogue.h"
#include "cpu/grid_image.h"
#include "depthwise/cpu_image.h"
#include "depthwise/cpu_plan.h"

namespace nnarch {

// Packed weights, and what happens to their sums.
template <class T>
struct Stage {
  const T* packed = nullptr;
  Epilogue<T> epilogue = {};
  bool pairs = false;  // packed for Strassen's product (cpu/strassen_product.h); of `project` alone
};

// y = project(depthwise(expand(x))), every stage with its epilogue. All tensors channels_last.
template <class T>
struct SeparableConv {
  ConvShape p;     // of the depthwise convolution; its input is the expanded one
  int64_t in = 0;  // channels of x before the expansion; 0: there is none
  int64_t out = 0;
  const T* x = nullptr;
  T* y = nullptr;
  Stage<T> expand, depthwise, project;

  int64_t plane() const { return p.oh * p.ow; }
  int64_t x_pixel() const { return in > 0 ? in : p.c; }
};

// The distance of pixels in a buffer: whole cache lines, and no multiple of 2048 bytes: 14 rows of
// the product that lie so far apart push each other out of the first-level cache.
template <class T>
int64_t buffer_pitch(int64_t channels) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  constexpr int64_t alias = 2048 / static_cast<int64_t>(sizeof(T));
  const int64_t whole = round_up(channels, line);
  return whole % alias == 0 ? whole + line : whole;
}

// The depthwise stage from pixels `x_pixel` apart to pixels `y_pixel` apart; x, y and the pass are
// the caller's to set.
template <class T>
DepthwiseConv<T> depthwise_stage(const SeparableConv<T>& s, int64_t x_pixel, int64_t y_pixel) {
  DepthwiseConv<T> c{};
  c.h = s.p.h, c.w = s.p.w, c.x_channels = s.p.c;
  c.x_row = s.p.w * x_pixel, c.x_pixel = x_pixel, c.x_channel = 1;
  c.y_row = s.p.ow * y_pixel, c.y_pixel = y_pixel, c.y_channel = 1;
  c.channels = s.p.k, c.group = 1;
  c.stride_h = s.p.stride_h, c.stride_w = s.p.stride_w;
  c.dilation_h = s.p.dilation_h, c.dilation_w = s.p.dilation_w;
  c.pass_count = 1;
  c.epilogue = s.depthwise.epilogue;
  return c;
}

template <class T>
DepthwisePass<T> depthwise_pass(const SeparableConv<T>& s) {
  return {s.depthwise.packed, s.p.r, s.p.s, -s.p.top, -s.p.left, s.p.oh, s.p.ow, 0};
}

// Dense positions of images as the rows of a product.
template <class T>
GridImage<T> positions_of(const T* data, int64_t images, int64_t plane, int64_t pixel,
                          int64_t depth) {
  return {data, 1, plane, pixel, images, 1, plane, 1, 1, {{0, 0}}, depth};
}

}  // namespace nnarch
