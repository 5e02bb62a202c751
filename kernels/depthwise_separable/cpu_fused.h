// The stages of a depthwise-separable convolution, group after group of output rows.
//
// A group's depthwise values go to a buffer in the second-level cache whose rows are those of the
// product's A, so they are neither written to memory nor gathered from it.
#pragma once

#include <cstring>
#include <optional>
#include <type_traits>

#include "cpu/arena.h"
#include "cpu/gather_gemm.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/strassen_product.h"
#include "cpu/streaming.h"
#include "depthwise_separable/cpu_plan.h"

namespace nnarch {

// The buffers and the kernels of one task.
template <class T>
class SeparableTask {
 public:
  SeparableTask(const SeparableConv<T>& s, const SeparablePlan& plan,
                const SeparablePlanner<T>& planner, const DepthwiseConv<T>& conv,
                const DepthwisePlanner<T>& depthwise, bool stream)
      : s_(s),
        planner_(planner),
        conv_(conv),
        depthwise_(depthwise),
        stream_(stream),
        tile_(depthwise.plan().tile_size()),
        rows_(depthwise.row_pointers()),
        values_(plan.images * plan.rows * s.p.ow * planner.pitch()),
        expanded_(plan.expanded ? planner.input_rows(plan.rows) * s.p.w * planner.expanded_pitch()
                                : 0) {
    if constexpr (std::is_same_v<T, float>)
      if (s.project.pairs)
        pairs_.emplace(s.project.packed, s.out, s.p.k,
                       plan.images * ceil_div(plan.rows * s.p.ow, int64_t{2}), s.project.epilogue);
  }

  // Whole images, from `image` on.
  void run_images(int64_t image, int64_t images) {
    for (int64_t i = 0; i < images; ++i)
      depthwise_rows(s_.x + (image + i) * s_.p.h * s_.p.w * s_.p.c, 0, s_.p.oh,
                     values_.get() + i * s_.plane() * planner_.pitch());
    project(image * s_.plane(), images, s_.plane());
  }

  // Output rows [oy, oy + rows) of an image.
  void run_rows(int64_t image, int64_t oy, int64_t rows) {
    depthwise_rows(s_.x + image * s_.p.h * s_.p.w * s_.p.c, oy, rows, values_.get());
    project(image * s_.plane() + oy * s_.p.ow, 1, rows * s_.p.ow);
  }

  // The same from the expanded input. Groups of an image come one after the other.
  void expand_and_run_rows(int64_t image, int64_t oy, int64_t rows) {
    const int64_t row = s_.p.w * planner_.expanded_pitch();
    const int64_t first = std::clamp<int64_t>(oy * s_.p.stride_h - s_.p.top, 0, s_.p.h);
    const int64_t last = std::clamp<int64_t>(
        oy * s_.p.stride_h - s_.p.top + planner_.input_rows(rows), first, s_.p.h);
    expand(image, first, last);
    // Row i of the image would start here + i * row.
    depthwise_rows(expanded_.get() - first * row, oy, rows, values_.get());
    project(image * s_.plane() + oy * s_.p.ow, 1, rows * s_.p.ow);
  }

 private:
  void depthwise_rows(const T* x, int64_t oy, int64_t rows, T* to) {
    DepthwisePass<T> pass = depthwise_pass(s_);
    pass.y_offset = -oy * conv_.y_row;
    DepthwiseConv<T> conv = conv_;
    conv.x = x, conv.y = to, conv.passes = &pass;
    const auto run = NNARCH_SELECT(depthwise_run<T>());
    for (int64_t i = 0; i < depthwise_.channel_tasks(); ++i) {
      DepthwiseTask task = depthwise_.task(i * depthwise_.row_tasks());
      task.first = oy, task.last = oy + rows;
      run(conv, depthwise_.plan(), task, {tile_.get(), nullptr, nullptr, rows_.get()});
    }
  }

  // Makes rows [first, last) of the expanded image present; those from the group before stay.
  void expand(int64_t image, int64_t first, int64_t last) {
    const int64_t row = s_.p.w * planner_.expanded_pitch();
    const bool follows = image == image_ && first >= first_ && first <= last_;
    const int64_t from = follows ? std::max(first, last_) : first;
    if (follows && from > first && first > first_)
      std::memmove(expanded_.get(), expanded_.get() + (first - first_) * row,
                   static_cast<size_t>((from - first) * row) * sizeof(T));
    image_ = image, first_ = first, last_ = last;
    if (from >= last) return;
    const Strip<T> pixels{s_.x + (image * s_.p.h + from) * s_.p.w * s_.in, (from - first) * row,
                          (last - from) * s_.p.w};
    gemm<T>().run({.depth = s_.in,
                   .b = s_.expand.packed,
                   .b_after = s_.expand.packed,
                   .c = expanded_.get(),
                   .n = s_.p.c,
                   .epilogue = s_.expand.epilogue,
                   .strips = &pixels,
                   .strip_count = 1,
                   .a_step = s_.in,
                   .c_step = planner_.expanded_pitch()});
  }

  // Pixels of images in the buffer, the first of which is pixel `first` of the output.
  void project(int64_t first, int64_t images, int64_t plane) {
    if constexpr (std::is_same_v<T, float>)
      if (pairs_) {
        const GridImage<T> image =
            positions_of(values_.get(), images, plane, planner_.pitch(), s_.p.k);
        const T* residual = s_.project.epilogue.residual;
        return pairs_->run(image, s_.y + first * s_.out,
                           residual ? residual + first * s_.out : nullptr,
                           {plane * s_.out, 0, s_.out}, 0, images * pairs_of_image(image), stream_);
      }
    const Strip<T> pixels{values_.get(), first * s_.out, images * plane};
    gemm<T>().run({.depth = s_.p.k,
                   .b = s_.project.packed,
                   .b_after = s_.project.packed,
                   .c = s_.y,
                   .n = s_.out,
                   .epilogue = s_.project.epilogue,
                   .stream = stream_,
                   .strips = &pixels,
                   .strip_count = 1,
                   .a_step = planner_.pitch(),
                   .c_step = s_.out});
  }

  const SeparableConv<T>& s_;
  const SeparablePlanner<T>& planner_;
  const DepthwiseConv<T>& conv_;
  const DepthwisePlanner<T>& depthwise_;
  const bool stream_;
  const Scratch<T> tile_;
  const Scratch<const T*> rows_;
  const Scratch<T> values_, expanded_;
  int64_t image_ = -1, first_ = 0, last_ = 0;  // what `expanded_` holds
  std::optional<StrassenProduct> pairs_;
};

template <class T>
void run_fused(const SeparableConv<T>& s, const SeparablePlan& plan,
               const SeparablePlanner<T>& planner) {
  const DepthwisePass<T> pass = depthwise_pass(s);
  const ChannelSource<T> source(s.p.k, s.p.k / s.p.c);
  DepthwiseConv<T> conv =
      depthwise_stage(s, plan.expanded ? planner.expanded_pitch() : s.x_pixel(), planner.pitch());
  source.set(&conv);
  conv.passes = &pass;
  // Expanded rows are in cache; an input of many images is not, and is fetched row by row.
  const DepthwisePlanner<T> depthwise(conv, plan.expanded ? 1 : s.p.n, /*weight_grad=*/false);
  const bool stream = outgrows_caches(s.y, s.p.n * s.plane(), s.out);
  const auto with_task = [&](const auto& f) {
    SeparableTask<T> task(s, plan, planner, conv, depthwise, stream);
    f(task);
  };
  if (plan.images > 1)
    return parallel_tasks(ceil_div(s.p.n, plan.images), [&](int64_t i) {
      const int64_t first = i * plan.images;
      with_task([&](auto& task) { task.run_images(first, std::min(plan.images, s.p.n - first)); });
    });
  const int64_t groups = ceil_div(s.p.oh, plan.rows);
  if (!plan.expanded)
    return parallel_tasks(s.p.n * groups, [&](int64_t i) {
      const int64_t oy = i % groups * plan.rows;
      with_task(
          [&](auto& task) { task.run_rows(i / groups, oy, std::min(plan.rows, s.p.oh - oy)); });
    });
  parallel_tasks(s.p.n * plan.parts, [&](int64_t i) {
    const int64_t part = i % plan.parts;
    const int64_t first = part * groups / plan.parts, last = (part + 1) * groups / plan.parts;
    with_task([&](auto& task) {
      for (int64_t g = first; g < last; ++g)
        task.expand_and_run_rows(i / plan.parts, g * plan.rows,
                                 std::min(plan.rows, s.p.oh - g * plan.rows));
    });
  });
}

// Stage after stage: where an image is too small to give several threads work by rows, or one
// output row outgrows the cache.
template <class T>
void run_stages(const SeparableConv<T>& s, T* values, int64_t pitch) {
  const DepthwisePass<T> pass = depthwise_pass(s);
  const ChannelSource<T> source(s.p.k, s.p.k / s.p.c);
  DepthwiseConv<T> conv = depthwise_stage(s, s.x_pixel(), pitch);
  source.set(&conv);
  conv.passes = &pass;
  const DepthwisePlanner<T> depthwise(conv, s.p.n, /*weight_grad=*/false);
  const auto run = NNARCH_SELECT(depthwise_run<T>());
  parallel_tasks(s.p.n * depthwise.tasks(), [&](int64_t i) {
    const Scratch<T> tile(depthwise.plan().tile_size());
    const Scratch<const T*> rows(depthwise.row_pointers());
    const int64_t image = i / depthwise.tasks();
    DepthwiseConv<T> mine = conv;
    mine.x = s.x + image * s.p.h * s.p.w * s.x_pixel();
    mine.y = values + image * s.plane() * pitch;
    run(mine, depthwise.plan(), depthwise.task(i % depthwise.tasks()),
        {tile.get(), nullptr, nullptr, rows.get()});
  });
  const GridImage<T> image = positions_of<T>(values, s.p.n, s.plane(), pitch, s.p.k);
  const OutputGrid out{s.plane() * s.out, 0, s.out};
  if constexpr (std::is_same_v<T, float>)
    if (s.project.pairs)
      return strassen_gemm(image, s.project.packed, s.out, s.y, out, s.project.epilogue);
  gather_gemm<T>(image, s.project.packed, s.out, s.y, out, s.project.epilogue);
}

}  // namespace nnarch
