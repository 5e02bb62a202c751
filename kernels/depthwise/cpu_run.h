// A convolution over all images of a batch: its tasks, their scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/streaming.h"
#include "depthwise/cpu_image.h"
#include "depthwise/cpu_plan.h"

namespace nnarch {

template <class T>
void set_output(DepthwiseConv<T>* conv, const Tensor& y, const Layout& layout) {
  conv->y = mutable_data<T>(y);
  conv->y_row = layout.row, conv->y_pixel = layout.pixel, conv->y_channel = layout.channel;
}

// Runs a convolution that is given for its first image on all of them.
template <class T>
void run_images(const DepthwiseConv<T>& conv, int64_t images, int64_t x_image, int64_t y_image) {
  const DepthwisePlanner<T> planner(conv, images, /*weight_grad=*/false);
  DepthwisePlan plan = planner.plan();
  const DepthwisePass<T>& pass = *conv.passes;
  plan.stream = plan.blocks && conv.y_channel == 1 && conv.epilogue.activation <= kRelu6 &&
                outgrows_caches(conv.y, images * pass.oh * pass.ow, conv.channels);
  const bool staged = conv.y_channel != 1 || conv.group > 1;
  const bool residual_staged = conv.epilogue.residual && conv.y_channel != 1;
  const auto run = NNARCH_SELECT(depthwise_run<T>());
  parallel_tasks(images * planner.tasks(), [&](int64_t i) {
    const Scratch<T> tile(plan.tile_size()), stage(staged ? plan.stage_size() : 0),
        residual(residual_staged ? plan.stage_size() : 0);
    const Scratch<const T*> rows(planner.row_pointers());
    const int64_t image = i / planner.tasks();
    DepthwiseConv<T> mine = conv;
    mine.x += image * x_image;
    mine.y += image * y_image;
    if (mine.epilogue.residual) mine.epilogue.residual += image * y_image;
    run(mine, plan, planner.task(i % planner.tasks()),
        {tile.get(), staged ? stage.get() : nullptr, residual_staged ? residual.get() : nullptr,
         rows.get()});
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
    for (int64_t i = task * share; i < std::min(planes, (task + 1) * share); ++i) {
      const int64_t k = i % channels;
      DepthwisePlane<T> mine = plane;
      mine.x += i / multiplier * plane.h * plane.w;
      mine.y += i * plane.oh * plane.ow;
      mine.weight += k / kDepthwiseBlock * taps * kDepthwiseBlock + k % kDepthwiseBlock;
      mine.epilogue = plane.epilogue.from_channel(k);
      if (plane.epilogue.residual)
        mine.epilogue.residual = plane.epilogue.residual + i * plane.oh * plane.ow;
      run(mine);
    }
  });
}

}  // namespace nnarch
