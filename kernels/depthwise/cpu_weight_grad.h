// The weight gradient: partial sums over parts of the batch, added up in a fixed order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "depthwise/cpu_image.h"
#include "depthwise/cpu_plan.h"

namespace nnarch {

// conv_shape() of a depthwise convolution.
inline ConvShape depthwise_shape(const IntList& input, const IntList& weight, const IntList& stride,
                                 const IntList& padding, const IntList& dilation) {
  require(input.size() == 4 && input[1] > 0, "depthwise_conv2d: x must be 4-D and have channels");
  const ConvShape p = conv_shape(input, weight, stride, padding, dilation, input[1]);
  require(p.k > 0 && p.k <= INT32_MAX, "depthwise_conv2d: too few or too many channels");
  return p;
}

// The fields of DepthwiseConv that describe its input.
template <class T>
DepthwiseConv<T> input_of(const SourceImage& image, const ConvShape& p) {
  DepthwiseConv<T> conv{};
  conv.x = data<T>(image.tensor);
  conv.h = p.h, conv.w = p.w, conv.x_channels = p.c;
  conv.x_row = image.layout.row, conv.x_pixel = image.layout.pixel;
  conv.x_channel = image.layout.channel;
  return conv;
}

// How many partial sums: work for this many threads, and rounding errors that do not add up.
inline constexpr int64_t kPartialSums = 16;

// Narrower planes fill too little of a vector: 960 of 7×7, N 8, take 478 µs, in tiles 403.
inline constexpr int64_t kPlaneColumns = 8;

// Whether planes are convolved as they lie, vectors along their rows.
inline bool has_plane_code(const ConvShape& p) {
  // Width 7 holds no weights in registers: planes are 0.85 times as fast as eager torch for one
  // image of 96 channels of 56×56, tiles about as fast; for eight images 1.15 and 0.84 times.
  const bool width = p.s == 3 || p.s == 5 || (p.s == 7 && p.n > 1);
  return p.r == p.s && width && p.stride_h == p.stride_w && p.stride_h <= 2 && p.dilation_h == 1 &&
         p.dilation_w == 1 && p.ow >= kPlaneColumns;
}
// Where x and grad lie channel by channel: a channel is one sum, in the order of its pixels.
template <class T>
void weight_grad_of_planes(const Tensor& grad, const Tensor& x, const Tensor& dw,
                           const ConvShape& p) {
  const int64_t multiplier = p.k / p.c, plane = p.h * p.w, out = p.oh * p.ow;
  const int64_t work = std::max<int64_t>(1, p.n * out * p.taps());
  const int64_t share = std::max<int64_t>(1, kTaskWork / work);
  const auto run = NNARCH_SELECT(depthwise_plane_grad_run<T>());
  parallel_tasks(ceil_div(p.k, share), [&](int64_t task) {
    for (int64_t k = task * share; k < std::min(p.k, (task + 1) * share); ++k)
      run({data<T>(x) + k / multiplier * plane, data<T>(grad) + k * out, p.n, p.c * plane,
           p.k * out, p.h, p.w, p.oh, p.ow, mutable_data<T>(dw) + k * p.taps(), p.s, p.stride_h,
           -p.top, -p.left});
  });
}

template <class T>
void weight_grad(const Tensor& grad, const Tensor& x, const Tensor& dw, const ConvShape& p) {
  if (is_planar(x) && is_planar(grad) && has_plane_code(p))
    return weight_grad_of_planes<T>(grad, x, dw, p);
  const int64_t multiplier = p.k / p.c;
  const SourceImage image(x, multiplier), g(grad, 1);
  const ChannelSource<T> source(p.k, multiplier);
  const DepthwisePass<T> pass{nullptr, p.r, p.s, -p.top, -p.left, p.oh, p.ow, 0};
  DepthwiseWeightGrad<T> problem{input_of<T>(image, p), data<T>(g.tensor), nullptr};
  DepthwiseConv<T>& conv = problem.conv;
  source.set(&conv);
  conv.y_row = g.layout.row, conv.y_pixel = g.layout.pixel, conv.y_channel = g.layout.channel;
  conv.channels = p.k, conv.group = 1;
  conv.stride_h = p.stride_h, conv.stride_w = p.stride_w;
  conv.dilation_h = p.dilation_h, conv.dilation_w = p.dilation_w;
  conv.passes = &pass, conv.pass_count = 1;

  const DepthwisePlanner<T> planner(conv, p.n, /*weight_grad=*/true);
  const DepthwisePlan& plan = planner.plan();
  const int64_t channel_tasks = planner.channel_tasks(), row_tasks = planner.row_tasks();
  const int64_t units = p.n * row_tasks;  // a unit: some rows of an image, one block of channels
  const int64_t parts = std::min(units, kPartialSums);
  const int64_t size = packed_depthwise_size(p.k, p.taps());
  const Scratch<T> partial(checked_product(std::max<int64_t>(parts, 1), size));
  const auto run = NNARCH_SELECT(depthwise_weight_grad_run<T>());
  parallel_tasks(parts * channel_tasks, [&](int64_t i) {
    const int64_t part = i / channel_tasks, block = i % channel_tasks;
    const Scratch<T> tile(plan.tile_size()), stage(plan.stage_size());
    const Scratch<const T*> rows(2 * plan.kernel_rows);
    DepthwiseWeightGrad<T> mine = problem;
    mine.partial = partial.get() + part * size;
    const int64_t channel = block * plan.block;
    const int64_t channels = round_up(std::min(plan.block, p.k - channel), kDepthwiseBlock);
    std::fill_n(mine.partial + channel * p.taps(), channels * p.taps(), T{0});
    for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; ++unit) {
      const int64_t n = unit / row_tasks;
      mine.conv.x = conv.x + n * image.layout.image;
      mine.g = problem.g + n * g.layout.image;
      run(mine, plan, planner.task(block * row_tasks + unit % row_tasks),
          {tile.get(), stage.get(), nullptr, rows.get()});
    }
  });

  T* out = mutable_data<T>(dw);
  parallel_tasks(ceil_div(p.k, kDepthwiseBlock), [&](int64_t block) {
    const int64_t channels = std::min(kDepthwiseBlock, p.k - block * kDepthwiseBlock);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t tap = 0; tap < p.taps(); ++tap) {
        const T* from = partial.get() + (block * p.taps() + tap) * kDepthwiseBlock + c;
        T sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += from[part * size];
        out[(block * kDepthwiseBlock + c) * p.taps() + tap] = sum;
      }
  });
}

}  // namespace nnarch
