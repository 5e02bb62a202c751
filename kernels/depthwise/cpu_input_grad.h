// The input gradient: of stride 2 in quads, of others as a convolution.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/streaming.h"
#include "depthwise/cpu_image.h"
#include "depthwise/cpu_run.h"
#include "depthwise/cpu_weight_grad.h"

namespace nnarch {

inline bool has_quads(const ConvShape& p) {
  return p.k == p.c && p.r == p.s && (p.s == 3 || p.s == 5 || p.s == 7) && p.stride_h == 2 &&
         p.stride_w == 2 && p.dilation_h == 1 && p.dilation_w == 1;
}

// Both tensors in channels_last order, dense.
template <class T>
void run_quads(const T* grad, const Tensor& weight, T* dx, const ConvShape& p) {
  const Scratch<T> packed(packed_depthwise_size(p.k, p.taps()));
  pack_depthwise<T>(weight, TapList::whole(p.r, p.s), packed.get());
  const int64_t x_image = p.h * p.w * p.c, g_image = p.oh * p.ow * p.c;
  const bool far = p.n * (x_image + g_image) * static_cast<int64_t>(sizeof(T)) >= kFarBytes;
  const DepthwiseQuads<T> quads{grad, p.oh,  p.ow,   dx,
                                p.h,  p.w,   p.c,    packed.get(),
                                p.s,  p.top, p.left, outgrows_caches(dx, p.n * p.h * p.w, p.c),
                                far};
  const int64_t begin = p.top / 2, rows = (p.top + p.h - 1) / 2 + 1 - begin;
  const int64_t work = std::max<int64_t>(1, rows * p.ow * p.taps() * p.c);  // of an image
  const int64_t wanted = ceil_div(kTasks, std::max<int64_t>(1, p.n));
  const int64_t share = ceil_div(rows, std::max<int64_t>(1, std::min(wanted, work / kTaskWork)));
  const int64_t tasks = ceil_div(rows, share);
  const auto run = NNARCH_SELECT(depthwise_quads_run<T>());
  parallel_tasks(p.n * tasks, [&](int64_t i) {
    const int64_t image = i / tasks, first = i % tasks * share;
    DepthwiseQuads<T> mine = quads;
    mine.g += image * g_image;
    mine.dx += image * x_image;
    run(mine, begin + first, begin + std::min(rows, first + share));
  });
}

// The same channel by channel.
template <class T>
void run_plane_quads(const T* grad, const Tensor& weight, T* dx, const ConvShape& p) {
  const Scratch<T> packed(packed_depthwise_size(p.k, p.taps()));
  pack_depthwise<T>(weight, TapList::whole(p.r, p.s), packed.get());
  run_planes<T>({grad, p.oh, p.ow, dx, p.h, p.w, packed.get(), p.s, 2, -p.top, -p.left, {}, {}},
                p.n, p.c, 1, NNARCH_SELECT(depthwise_plane_quads_run<T>()));
}

// The input gradient is a convolution of grad by the flipped kernel. With a stride, the input
// positions fall into phases, each reached by some of the taps only: no product with a zero.
template <class T>
void input_grad(const Tensor& grad, const Tensor& weight, const Tensor& dx, const ConvShape& p,
                const Layout& out) {
  if (out.channel == 1 && has_quads(p) && is_channels_last(grad))
    return run_quads(data<T>(grad), weight, mutable_data<T>(dx), p);
  if (out.pixel == 1 && has_quads(p) && is_planar(grad))
    return run_plane_quads(data<T>(grad), weight, mutable_data<T>(dx), p);
  const auto rows = gradient_phases(p.h, p.stride_h, p.top, p.r, p.dilation_h);
  const auto columns = gradient_phases(p.w, p.stride_w, p.left, p.s, p.dilation_w);
  const Scratch<T> packed(packed_depthwise_size(p.k, p.taps()));
  std::vector<DepthwisePass<T>> passes;
  T* next = packed.get();
  for (const GradientPhase& row : rows)
    for (const GradientPhase& column : columns) {
      const TapList taps{row.taps, column.taps};
      const bool none = taps.count() == 0;
      pack_depthwise<T>(weight, taps, next);
      passes.push_back({next, none ? 0 : static_cast<int64_t>(row.taps.size()),
                        none ? 0 : static_cast<int64_t>(column.taps.size()), row.offset,
                        column.offset, row.count, column.count,
                        row.first * out.row + column.first * out.pixel});
      next += packed_depthwise_size(p.k, taps.count());
    }

  if (is_planar(grad) && out.pixel == 1 && p.stride_h == 1 && p.stride_w == 1 && p.k == p.c) {
    const DepthwisePass<T>& pass = passes.front();
    const DepthwisePlane<T> plane{
        data<T>(grad), p.oh, p.ow,     mutable_data<T>(dx), p.h, p.w, pass.weight,
        p.s,           1,    pass.row, pass.column,         {},  {}};
    if (run_plane_code(plane, p, 1)) return;
  }
  const SourceImage image(grad, 1);
  DepthwiseConv<T> conv = input_of<T>(image, p);
  conv.h = p.oh, conv.w = p.ow, conv.x_channels = p.k;
  set_output(&conv, dx, out);
  conv.y_row *= p.stride_h, conv.y_pixel *= p.stride_w;
  conv.channels = p.k, conv.group = p.k / p.c;
  conv.stride_h = conv.stride_w = 1;
  conv.dilation_h = p.dilation_h / std::gcd(p.dilation_h, p.stride_h);
  conv.dilation_w = p.dilation_w / std::gcd(p.dilation_w, p.stride_w);
  conv.passes = passes.data(), conv.pass_count = static_cast<int64_t>(passes.size());
  run_images(conv, p.n, image.layout.image, out.image);
}

}  // namespace nnarch
