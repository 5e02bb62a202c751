// Upsampling on the CPU, nearest and bilinear, and its gradient: the transpose of the same axes.
#include <algorithm>

#include "cpu/arena.h"
#include "cpu/registry.h"
#include "pooling/cpu_images.h"
#include "upsample/cpu_axis.h"
#include "upsample/cpu_kernels.h"

namespace nnarch {
namespace {

struct Arguments {
  AxisArguments h, w;
};

Arguments arguments(const IntList& input_size, const IntList& output_size, bool bilinear,
                    bool align_corners, double scale_h, double scale_w) {
  for (size_t i : {0, 1})
    require(input_size[2 + i] > 0 && output_size[i] > 0, "upsample2d: sizes must be positive");
  return {{input_size[2], output_size[0], bilinear, align_corners, scale_h},
          {input_size[3], output_size[1], bilinear, align_corners, scale_w}};
}

// Outputs from kStreamBytes to here are written past the caches. Blocks of 32 MB and more come from
// the system each time, which has just cleared them in the cache: 21@28 eight times as large, 34
// MB: 3.9 ms through the caches, 5.4 past them. What 6.4 MB take (256@14 doubled, N8) depends on
// who else is in the caches: among the rivals of a benchmark 0.27 ms past them and 0.46 through
// them, called again and again 0.25 and 0.15.
constexpr int64_t kStreamTo = int64_t{32} << 20;

bool leaves_caches(int64_t bytes) { return bytes >= kStreamBytes && bytes < kStreamTo; }

// Images as planes, or as planes of one wide row after the other where pixels of few channels would
// leave vectors half empty.
struct Planes {
  bool serve;
  int64_t count, channels;

  Planes(int64_t images, int64_t channels_, bool channels_last, int64_t lanes)
      : serve(!channels_last || (channels_ % lanes != 0 && channels_ < 2 * lanes)),
        count(channels_last ? images : checked_product(images, channels_)),
        channels(channels_last ? channels_ : 1) {}
};

template <class T>
void forward(const T* x, int64_t images, int64_t channels, bool channels_last, const Arguments& a,
             T* y) {
  const auto& table = NNARCH_SELECT(upsample_table<T>());
  const SourceTable<T> rows(a.h), columns(a.w);
  const Sources<T> h = rows.view(), w = columns.view();
  const int64_t in = h.inputs * w.inputs, out = h.outputs * w.outputs;
  const bool far = leaves_caches(images * channels * out * int64_t{sizeof(T)});
  const Planes planes(images, channels, channels_last, table.lanes);
  if (!planes.serve) {
    const auto run = a.h.bilinear ? table.bilinear_rows : table.nearest_rows;
    const bool past_caches = far && outgrows_caches(y, images * out, channels);
    return over_rows<Denormals::keep>(
        images, h.outputs, w.outputs * channels, [&](int64_t n, int64_t from, int64_t to) {
          run(x + n * in * channels, channels, h, w, from, to, y + n * out * channels, past_caches);
        });
  }
  const auto run = a.h.bilinear ? table.bilinear_planes : table.nearest_planes;
  const auto over_planes = [&](const Sources<T>& h, const Sources<T>& w) {
    const ColumnTable<T> vectors(w, planes.channels, table.lanes);
    const Columns<T> c = vectors.view();
    over_units<Denormals::keep>(planes.count, h.outputs, c.outputs,
                                [&](int64_t first, int64_t last, int64_t from, int64_t to) {
                                  const Scratch<T> scratch(plane_scratch(c));
                                  for (int64_t p = first; p < last; ++p)
                                    run(x + p * h.inputs * c.inputs, h, c, from, to, scratch.get(),
                                        y + p * h.outputs * c.outputs, far);
                                });
  };
  if (planes.channels > 1 || !JoinedRows<T>::serve(h, w, table.lanes)) return over_planes(h, w);
  const JoinedRows<T> joined(h, w, table.lanes);
  over_planes(joined.rows(), joined.columns());
}

template <class T>
void transpose(const T* grad, int64_t images, int64_t channels, bool channels_last,
               const Arguments& a, T* dx) {
  const auto& table = NNARCH_SELECT(upsample_table<T>());
  const SourceTable<T> rows(a.h), columns(a.w);
  const SpreadTable<T> row_spread(rows.view()), column_spread(columns.view());
  const Spread<T> h = row_spread.view(), w = column_spread.view();
  const int64_t in = h.results * w.results, out = h.values * w.values;
  const int64_t row = ceil_div(std::max(in, out), h.results);
  const Planes planes(images, channels, channels_last, table.lanes);
  if (!planes.serve)
    return over_rows<Denormals::flush>(images, h.results, row * channels,
                                       [&](int64_t n, int64_t from, int64_t to) {
                                         table.spread_rows(grad + n * out * channels, channels, h,
                                                           w, from, to, dx + n * in * channels);
                                       });
  const ColumnTable<T> vectors(w, planes.channels, table.lanes);
  const Columns<T> c = vectors.view();
  over_units<Denormals::flush>(planes.count, h.results, row * planes.channels,
                               [&](int64_t first, int64_t last, int64_t from, int64_t to) {
                                 const Scratch<T> scratch(plane_scratch(c));
                                 for (int64_t p = first; p < last; ++p)
                                   table.spread_planes(grad + p * h.values * c.inputs, h, c, from,
                                                       to, scratch.get(),
                                                       dx + p * h.results * c.outputs);
                               });
}

Tensor upsample2d(const Tensor& x, IntList output_size, bool bilinear, bool align_corners,
                  double scale_h, double scale_w) {
  check_images(x);
  require(output_size.size() == 2, "upsample2d: output_size must be two sizes");
  const Arguments a =
      arguments(sizes_of(x), output_size, bilinear, align_corners, scale_h, scale_w);
  const Tensor input = in_order_of(x, to_compute_type(x));
  const Tensor y = new_images(x, output_size[0], output_size[1], input.scalar_type());
  if (y.numel() == 0) return to_type(y, x.scalar_type());
  const bool channels_last = follows_channels_last(x);
  set_algorithm(channels_last ? "channels_last" : "planes");
  with_scalar_type(input.scalar_type(), "upsample2d", [&](auto scalar) {
    using T = decltype(scalar);
    forward<T>(data<T>(input), x.size(0), x.size(1), channels_last, a, mutable_data<T>(y));
  });
  return to_type(y, x.scalar_type());
}

Tensor upsample2d_input_grad(const Tensor& grad, IntList input_size, bool bilinear,
                             bool align_corners, double scale_h, double scale_w) {
  check_images(grad);
  require(input_size.size() == 4 && input_size[0] == grad.size(0) && input_size[1] == grad.size(1),
          "upsample2d_input_grad: input_size does not fit");
  const Arguments a = arguments(input_size, {grad.size(2), grad.size(3)}, bilinear, align_corners,
                                scale_h, scale_w);
  const Tensor g = in_order_of(grad, to_compute_type(grad));
  const Tensor dx = new_images(grad, input_size[2], input_size[3], g.scalar_type());
  if (dx.numel() == 0) return to_type(dx, grad.scalar_type());
  const bool channels_last = follows_channels_last(grad);
  set_algorithm(channels_last ? "channels_last" : "planes");
  with_scalar_type(g.scalar_type(), "upsample2d_input_grad", [&](auto scalar) {
    using T = decltype(scalar);
    transpose<T>(data<T>(g), grad.size(0), grad.size(1), channels_last, a, mutable_data<T>(dx));
  });
  return to_type(dx, grad.scalar_type());
}

}  // namespace

NNARCH_OPS(upsample, ops) {
  ops.impl("upsample2d", TORCH_BOX(&upsample2d));
  ops.impl("upsample2d_input_grad", TORCH_BOX(&upsample2d_input_grad));
}

}  // namespace nnarch
