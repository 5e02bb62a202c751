// Average pooling on the CPU, and its gradient: the same kernel over the inverse windows.
#include <optional>

#include "cpu/arena.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"
#include "pooling/cpu_images.h"
#include "pooling/cpu_planes.h"
#include "pooling/cpu_windows.h"

namespace nnarch {
namespace {

template <class T>
void average_channels_last(const T* x, int64_t images, int64_t channels, const Axis& h,
                           const Axis& w, T* y) {
  const auto& table = NNARCH_SELECT(pool_table<T>());
  const int64_t in = h.inputs * w.inputs * channels, out = h.outputs * w.outputs * channels;
  over_rows<Denormals::flush>(images, h.outputs, ceil_div(std::max(in, out), h.outputs),
                              [&](int64_t n, int64_t from, int64_t to) {
                                table.average_rows(x + n * in, channels, h, w, from, to,
                                                   y + n * out);
                              });
}

template <class T>
void average_along_rows(const T* x, int64_t images, int64_t channels, const Axis& h, const Axis& w,
                        T* y) {
  const auto& table = NNARCH_SELECT(pool_table<T>());
  const int64_t in = h.inputs * w.inputs, out = h.outputs * w.outputs;
  Scratch<T> counts(w.outputs);
  std::copy(w.count, w.count + w.outputs, counts.get());
  over_rows<Denormals::flush>(
      checked_product(images, channels), h.outputs, ceil_div(std::max(in, out), h.outputs),
      [&](int64_t p, int64_t from, int64_t to) {
        Scratch<T> row(row_buffer_size(w));
        table.average_plane(x + p * in, h, w, from, to, y + p * out, counts.get(), row.get());
      });
}

template <class T>
void average_contiguous(const T* x, int64_t images, int64_t channels, const Axis& h, const Axis& w,
                        T* y) {
  if (along_rows(h, w)) return average_along_rows<T>(x, images, channels, h, w, y);
  const auto& table = NNARCH_SELECT(pool_table<T>());
  over_planes<Denormals::flush>(
      x, checked_product(images, channels), h, w, y, nullptr,
      [&](const T* image, int64_t lanes, int64_t from, int64_t to, T* out, int64_t*) {
        table.average_rows(image, lanes, h, w, from, to, out);
      });
}

// The mean of every plane: one pass at memory bandwidth.
template <class T>
void global_average(const T* x, int64_t images, int64_t channels, int64_t pixels,
                    bool channels_last, T* y) {
  const auto& table = NNARCH_SELECT(pool_table<T>());
  if (!channels_last) {
    const int64_t run = std::max<int64_t>(1, 16384 / pixels), planes = images * channels;
    parallel_tasks(ceil_div(planes, run), [&](int64_t task) {
      const int64_t first = task * run;
      table.mean_planes(x + first * pixels, std::min(run, planes - first), pixels, y + first);
    });
    return;
  }
  // Few images are cut by channels too.
  const int64_t run = images >= 8 ? channels : 256, runs = ceil_div(channels, run);
  parallel_tasks(images * runs, [&](int64_t task) {
    const int64_t n = task / runs, from = task % runs * run, to = std::min(channels, from + run);
    Scratch<double> sums(to - from);
    table.mean_pixels(x + n * pixels * channels, pixels, channels, from, to, sums.get(),
                      y + n * channels);
  });
}

// Averages over the windows of both axes, in the order of x.
Tensor average_over(const Tensor& x, const Windows& rows, const Windows& columns, bool global) {
  const Axis h = rows.axis(), w = columns.axis();
  const Tensor input = in_order_of(x, to_compute_type(x));
  const Tensor y = new_images(x, h.outputs, w.outputs, input.scalar_type());
  const bool channels_last = follows_channels_last(x);
  const int64_t images = x.size(0), channels = x.size(1);
  if (y.numel() == 0) return to_type(y, x.scalar_type());
  with_scalar_type(input.scalar_type(), "avg_pool2d", [&](auto scalar) {
    using T = decltype(scalar);
    const T* from = data<T>(input);
    T* to = mutable_data<T>(y);
    set_algorithm(global ? "global" : channels_last ? "channels_last" : "planes");
    if (global)
      global_average<T>(from, images, channels, h.inputs * w.inputs, channels_last, to);
    else if (channels_last)
      average_channels_last<T>(from, images, channels, h, w, to);
    else
      average_contiguous<T>(from, images, channels, h, w, to);
  });
  return to_type(y, x.scalar_type());
}

struct Arguments {
  Windows rows, columns;
};

Arguments regular(int64_t height, int64_t width, const IntList& kernel, const IntList& stride,
                  const IntList& padding, bool ceil_mode, bool count_include_pad,
                  std::optional<int64_t> divisor) {
  const auto windows = [&](int64_t inputs, size_t axis) {
    const auto a = axis_arguments(kernel, stride, padding, {1, 1}, ceil_mode, axis);
    return regular_windows(inputs, a, count_include_pad);
  };
  Arguments a{windows(height, 0), windows(width, 1)};
  if (divisor) {
    require(*divisor != 0, "avg_pool2d: divisor_override must not be zero");
    std::fill(a.rows.count.begin(), a.rows.count.end(), *divisor);
    std::fill(a.columns.count.begin(), a.columns.count.end(), int64_t{1});
  }
  return a;
}

Tensor avg_pool2d(const Tensor& x, IntList kernel, IntList stride, IntList padding, bool ceil_mode,
                  bool count_include_pad, std::optional<int64_t> divisor_override) {
  check_images(x);
  const Arguments a = regular(x.size(2), x.size(3), kernel, stride, padding, ceil_mode,
                              count_include_pad, divisor_override);
  return average_over(x, a.rows, a.columns, false);
}

Tensor adaptive_avg_pool2d(const Tensor& x, IntList output_size) {
  check_images(x);
  require(output_size.size() == 2, "adaptive_avg_pool2d: output_size must be a pair");
  return average_over(x, adaptive_windows(x.size(2), output_size[0]),
                      adaptive_windows(x.size(3), output_size[1]),
                      output_size[0] == 1 && output_size[1] == 1);
}

// grad[n, c, i, j] / (rows[i]·columns[j]), dense in the order of `grad`.
template <class T>
Tensor divide(const Tensor& grad, const Windows& rows, const Windows& columns) {
  const Tensor out = new_like(grad, grad.scalar_type());
  const int64_t height = grad.size(2), width = grad.size(3);
  const bool channels_last = follows_channels_last(grad);
  const int64_t inner = channels_last ? grad.size(1) : 1;
  const int64_t units = channels_last ? grad.size(0) : grad.size(0) * grad.size(1);
  const T* from = data<T>(grad);
  T* to = mutable_data<T>(out);
  over_rows<Denormals::flush>(
      units, height, width * inner, [&](int64_t unit, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
          for (int64_t j = 0; j < width; ++j) {
            const T divisor = static_cast<T>(rows.count[i] * columns.count[j]);
            const int64_t at = ((unit * height + i) * width + j) * inner;
            for (int64_t c = 0; c < inner; ++c) to[at + c] = from[at + c] / divisor;
          }
      });
  return out;
}

bool all_equal(const std::vector<int64_t>& v) {
  return std::all_of(v.begin(), v.end(), [&](int64_t count) { return count == v.front(); });
}

// Every input sums the gradients of the outputs that it went into, each over its divisor.
Tensor spread(const Tensor& grad, const Arguments& forward) {
  const Tensor g = in_order_of(grad, to_compute_type(grad));
  Windows rows = inverse_windows(forward.rows), columns = inverse_windows(forward.columns);
  Tensor scaled = g;
  if (grad.numel() > 0 && all_equal(forward.rows.count) && all_equal(forward.columns.count)) {
    std::fill(rows.count.begin(), rows.count.end(), forward.rows.count.front());
    std::fill(columns.count.begin(), columns.count.end(), forward.columns.count.front());
  } else {
    with_scalar_type(g.scalar_type(), "avg_pool2d_input_grad", [&](auto scalar) {
      scaled = divide<decltype(scalar)>(g, forward.rows, forward.columns);
    });
  }
  return to_type(average_over(scaled, rows, columns, false), grad.scalar_type());
}

void check_grad(const Tensor& grad, const IntList& input_size) {
  require(grad.dim() == 4 && input_size.size() == 4,
          "avg_pool2d_input_grad: 4 dimensions expected");
  require(input_size[0] == grad.size(0) && input_size[1] == grad.size(1) && input_size[2] > 0 &&
              input_size[3] > 0,
          "avg_pool2d_input_grad: input_size does not fit");
  with_scalar_type(grad.scalar_type(), "avg_pool2d_input_grad", [](auto) {});
}

Tensor avg_pool2d_input_grad(const Tensor& grad, IntList input_size, IntList kernel, IntList stride,
                             IntList padding, bool ceil_mode, bool count_include_pad,
                             std::optional<int64_t> divisor_override) {
  check_grad(grad, input_size);
  const Arguments a = regular(input_size[2], input_size[3], kernel, stride, padding, ceil_mode,
                              count_include_pad, divisor_override);
  require(grad.size(2) == static_cast<int64_t>(a.rows.start.size()) &&
              grad.size(3) == static_cast<int64_t>(a.columns.start.size()),
          "avg_pool2d_input_grad: grad does not have the size of the output");
  return spread(grad, a);
}

Tensor adaptive_avg_pool2d_input_grad(const Tensor& grad, IntList input_size) {
  check_grad(grad, input_size);
  return spread(grad, {adaptive_windows(input_size[2], grad.size(2)),
                       adaptive_windows(input_size[3], grad.size(3))});
}

}  // namespace

NNARCH_OPS(average_pooling, ops) {
  ops.impl("avg_pool2d", TORCH_BOX(&avg_pool2d));
  ops.impl("avg_pool2d_input_grad", TORCH_BOX(&avg_pool2d_input_grad));
  ops.impl("adaptive_avg_pool2d", TORCH_BOX(&adaptive_avg_pool2d));
  ops.impl("adaptive_avg_pool2d_input_grad", TORCH_BOX(&adaptive_avg_pool2d_input_grad));
}

}  // namespace nnarch
