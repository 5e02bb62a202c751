// The weight gradient: partial sums over parts of the batch, added up in a fixed order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "depthwise/cpu_flat.h"
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
// Blocks of channels whose partial sums are added up in a task.
inline constexpr int64_t kPartialBlocks = 8;

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
void weight_grad_of_planes(const Tensor& grad, const Tensor& x, const Tensor& dw, T* db,
                           const ConvShape& p) {
  const int64_t multiplier = p.k / p.c, plane = p.h * p.w, out = p.oh * p.ow;
  const int64_t work = std::max<int64_t>(1, p.n * out * p.taps());
  const int64_t share = std::max<int64_t>(1, kTaskWork / work);
  const auto run_on = [&](FlatTaps taps, DepthwisePlaneGradRun<T> run) {
    parallel_tasks(ceil_div(p.k, share), [&](int64_t task) {
      for (int64_t k = task * share; k < std::min(p.k, (task + 1) * share); ++k)
        run({data<T>(x) + k / multiplier * plane, data<T>(grad) + k * out, p.n, p.c * plane,
             p.k * out, p.h, p.w, p.oh, p.ow, mutable_data<T>(dw) + k * p.taps(),
             db ? db + k : nullptr, p.s, p.stride_h, -p.top, -p.left, taps});
    });
  };
  if (!FlatTable<T>::serves(p, /*weight_grad=*/true))
    return run_on({}, NNARCH_SELECT(depthwise_plane_grad_run<T>()));
  const FlatTable<T> table(p.h, p.oh, p.w, -p.top, -p.left, p);
  run_on(table.taps(), NNARCH_SELECT(depthwise_plane_flat_grad_run<T>()));
}

// Partial sums in packed order to dw [K, R·S]. A block of channels at a time: added up tap by tap
// and channel by channel, 1024
// channels of 7×7, N 8, took 24 µs more.
template <class T>
void add_partial_sums(const T* partial, int64_t parts, int64_t size, const ConvShape& p, T* dw) {
  const int64_t taps = p.taps(), block = taps * kDepthwiseBlock;
  const auto transpose = transpose_fn<T>();
  parallel_tasks(ceil_div(p.k, kPartialBlocks * kDepthwiseBlock), [&](int64_t task) {
    const Scratch<T> sum(block);
    const int64_t first = task * kPartialBlocks * kDepthwiseBlock;
    const int64_t last = std::min(p.k, first + kPartialBlocks * kDepthwiseBlock);
    for (int64_t k = first; k < last; k += kDepthwiseBlock) {
      const T* from = partial + k * taps;
      std::copy_n(from, block, sum.get());
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = 0; i < block; ++i) sum[i] += from[part * size + i];
      transpose(sum.get(), kDepthwiseBlock, dw + k * taps, taps, taps,
                std::min(kDepthwiseBlock, p.k - k));
    }
  });
}

// `db`, where it is not null, gets the sum of grad over all pixels: the gradient of a bias, nearly
// for nothing while grad is at hand.
template <class T>
void weight_grad(const Tensor& grad, const Tensor& x, const Tensor& dw, T* db, const ConvShape& p) {
  if (is_planar(x) && is_planar(grad) &&
      (has_plane_code(p) || FlatTable<T>::serves(p, /*weight_grad=*/true)))
    return weight_grad_of_planes<T>(grad, x, dw, db, p);
  const int64_t multiplier = p.k / p.c;
  const SourceImage image(x, multiplier), g(grad, 1);
  const ChannelSource<T> source(p.k, multiplier);
  const DepthwisePass<T> pass{nullptr, p.r, p.s, -p.top, -p.left, p.oh, p.ow, 0};
  DepthwiseWeightGrad<T> problem{input_of<T>(image, p), data<T>(g.tensor), nullptr, nullptr};
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
  if (parts == 0) std::fill_n(partial.get(), size, T{0});
  const int64_t all = round_up(p.k, kDepthwiseBlock);
  const Scratch<double> bias(db ? checked_product(std::max<int64_t>(parts, 1), all) : 0);
  const auto run = plan.pair_pixels ? NNARCH_SELECT(depthwise_pair_run<T>())
                                    : NNARCH_SELECT(depthwise_weight_grad_run<T>());
  parallel_tasks(parts * channel_tasks, [&](int64_t i) {
    const int64_t part = i / channel_tasks, block = i % channel_tasks;
    const Scratch<T> tile(plan.tile_size()), stage(plan.stage_size());
    const Scratch<const T*> rows(2 * plan.kernel_rows);
    DepthwiseWeightGrad<T> mine = problem;
    mine.partial = partial.get() + part * size;
    const int64_t channel = block * plan.block;
    const int64_t channels = round_up(std::min(plan.block, p.k - channel), kDepthwiseBlock);
    std::fill_n(mine.partial + channel * p.taps(), channels * p.taps(), T{0});
    if (db) {
      mine.bias = bias.get() + part * all;
      std::fill_n(mine.bias + channel, channels, 0.0);
    }
    for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; ++unit) {
      const int64_t n = unit / row_tasks;
      mine.conv.x = conv.x + n * image.layout.image;
      mine.g = problem.g + n * g.layout.image;
      run(mine, plan, planner.task(block * row_tasks + unit % row_tasks),
          {tile.get(), stage.get(), nullptr, rows.get()});
    }
  });

  add_partial_sums(partial.get(), parts, size, p, mutable_data<T>(dw));
  for (int64_t k = 0; k < p.k && db; ++k) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += bias[part * all + k];
    db[k] = static_cast<T>(sum);
  }
}

}  // namespace nnarch
