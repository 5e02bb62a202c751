// A convolution over all images of a batch: its tasks, their scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "cpu/streaming.h"
#include "depthwise/cpu_flat.h"
#include "depthwise/cpu_image.h"
#include "depthwise/cpu_plan.h"
#include "depthwise/cpu_row_winograd.h"
#include "depthwise/cpu_weight_grad.h"

namespace nnarch {

template <class T>
void set_output(DepthwiseConv<T>* conv, const Tensor& y, const Layout& layout) {
  conv->y = mutable_data<T>(y);
  conv->y_row = layout.row, conv->y_pixel = layout.pixel, conv->y_channel = layout.channel;
}

// Whether vectors of less than a line, past the caches, meet where the processor puts them
// together: of two outputs of a block that lie a multiple of 4 KB apart.
template <class T>
bool half_lines_collide(const DepthwiseConv<T>& conv) {
  constexpr int64_t line = 64, page = 4096, size = sizeof(T);
  if (NNARCH_SELECT(depthwise_lanes<T>()) * size >= line) return false;
  const int64_t rows = conv.passes->s == 3 ? kBlockRowsMost : 1, pixels = kBlockPixelsMost / rows;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 1 - pixels; j < pixels; ++j) {
      const int64_t apart = std::abs(i * conv.y_row + j * conv.y_pixel) * size % page;
      if ((i > 0 || j > 0) && (apart < line || page - apart < line)) return true;
    }
  return false;
}

// Runs a convolution that is given for its first image on all of them.
template <class T>
void run_images(const DepthwiseConv<T>& conv, int64_t images, int64_t x_image, int64_t y_image) {
  if constexpr (std::is_same_v<T, float>)
    if (row_winograd_serves(conv, images)) return run_row_winograd(conv, images, x_image, y_image);
  const DepthwisePlanner<T> planner(conv, images, /*weight_grad=*/false);
  DepthwisePlan plan = planner.plan();
  const DepthwisePass<T>& pass = *conv.passes;
  plan.stream = plan.blocks && conv.y_channel == 1 && conv.epilogue.activation <= kRelu6 &&
                outgrows_caches(conv.y, images * pass.oh * pass.ow, conv.channels);
  const bool staged = conv.y_channel != 1 || conv.group > 1;
  const bool residual_staged = conv.epilogue.residual && conv.y_channel != 1;
  const bool gathers = plan.stream && conv.y_pixel == conv.channels && half_lines_collide(conv);
  const auto run = NNARCH_SELECT(depthwise_run<T>());
  parallel_tasks(images * planner.tasks(), [&](int64_t i) {
    const Scratch<T> tile(plan.tile_size()), stage(staged ? plan.stage_size() : 0),
        residual(residual_staged ? plan.stage_size() : 0);
    const Scratch<const T*> rows(planner.row_pointers());
    const Scratch<T> lines(gathers ? plan.lines_size() : 0);
    const int64_t image = i / planner.tasks();
    DepthwiseConv<T> mine = conv;
    mine.x += image * x_image;
    mine.y += image * y_image;
    if (mine.epilogue.residual) mine.epilogue.residual += image * y_image;
    run(mine, plan, planner.task(i % planner.tasks()),
        {tile.get(), staged ? stage.get() : nullptr, residual_staged ? residual.get() : nullptr,
         rows.get(), gathers ? lines.get() : nullptr});
  });
}

// `plane`: the first one. Each of `inputs` planes gives `multiplier` planes of the output, in
// every image; packed weights and the epilogue start at channel 0.
template <class T>
void run_planes(const DepthwisePlane<T>& plane, int64_t images, int64_t inputs, int64_t multiplier,
                DepthwisePlaneRun<T> run) {
  const int64_t channels = inputs * multiplier, taps = plane.s * plane.s;
  const int64_t work = std::max<int64_t>(1, plane.oh * plane.ow * taps);
  const int64_t share = std::max<int64_t>(1, kTaskWork / work), planes = images * channels;
  parallel_tasks(ceil_div(planes, share), [&](int64_t task) {
    // Nothing is divided or copied for a plane: of 49 pixels, that cost a third of the time.
    int64_t i = task * share, k = i % channels, m = k % multiplier;
    DepthwisePlane<T> mine = plane;
    mine.x += i / multiplier * plane.h * plane.w;
    mine.y += i * plane.oh * plane.ow;
    for (const int64_t last = std::min(planes, (task + 1) * share); i < last; ++i) {
      mine.weight =
          plane.weight + k / kDepthwiseBlock * taps * kDepthwiseBlock + k % kDepthwiseBlock;
      const Epilogue<T>& e = plane.epilogue;
      if (e.scale) mine.epilogue.scale = e.scale + k;
      if (e.shift) mine.epilogue.shift = e.shift + k;
      if (e.residual) mine.epilogue.residual = e.residual + i * plane.oh * plane.ow;
      run(mine);
      mine.y += plane.oh * plane.ow;
      if (++m == multiplier) m = 0, mine.x += plane.h * plane.w;
      if (++k == channels) k = 0;
    }
  });
}

// The forward pass, or the input gradient at stride 1, of NCHW where there is code for planes.
template <class T>
bool run_plane_code(const DepthwisePlane<T>& plane, const ConvShape& p, int64_t multiplier) {
  if (FlatTable<T>::serves(p, /*weight_grad=*/false)) {
    const FlatTable<T> table(plane.h, plane.oh, plane.w, plane.row, plane.column, p);
    DepthwisePlane<T> flat = plane;
    flat.flat = table.taps();
    run_planes<T>(flat, p.n, p.c, multiplier, NNARCH_SELECT(depthwise_plane_flat_run<T>()));
    return true;
  }
  if (!has_plane_code(p)) return false;
  run_planes<T>(plane, p.n, p.c, multiplier, NNARCH_SELECT(depthwise_plane_run<T>()));
  return true;
}

}  // namespace nnarch
