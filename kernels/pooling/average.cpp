// Average pooling on the CPU, and its gradient: the same kernel over the inverse windows.
#include <algorithm>
#include <numeric>
#include <optional>

#include "cpu/arena.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"
#include "pooling/cpu_images.h"
#include "pooling/cpu_planes.h"
#include "pooling/cpu_stored.h"
#include "pooling/cpu_windows.h"

namespace nnarch {
namespace {

template <class T>
void average_channels_last(const Stored& x, int64_t images, int64_t channels, const Axis& h,
                           const Axis& w, const Stored& y) {
  const auto& table = NNARCH_SELECT(pool_table<T>());
  const int64_t in = h.inputs * w.inputs * channels, out = h.outputs * w.outputs * channels;
  const Traffic traffic = image_traffic<T>(y, images, channels, h, w);
  over_rows<Denormals::flush>(
      images, h.outputs, ceil_div(std::max(in, out), h.outputs),
      [&](int64_t n, int64_t from, int64_t to) {
        const PooledUnits<T> at(x, y, h, w.inputs * channels, w.outputs * channels, n, n + 1, from,
                                to);
        table.average_rows(at.x(), channels, h, w, from, to, at.y(), traffic);
      },
      traffic.far);
}

bool all_equal(const int64_t* v, int64_t n) {
  return std::all_of(v, v + n, [&](int64_t count) { return count == v[0]; });
}

// The factors of an average (PlaneBuffer).
template <class T>
struct PlaneScales {
  std::vector<T> rows, columns;
  bool same = true;

  PlaneScales(const Axis& h, const Axis& w) {
    const bool same_columns = all_equal(w.count, w.outputs);
    same = same_columns && all_equal(h.count, h.outputs);
    for (int64_t i = 0; i < h.outputs; ++i)
      rows.push_back(T{1} / static_cast<T>(same_columns ? h.count[i] * w.count[0] : h.count[i]));
    if (same_columns) return;
    columns.assign(w.outputs + kSlack, T{0});
    for (int64_t j = 0; j < w.outputs; ++j) columns[j] = T{1} / static_cast<T>(w.count[j]);
  }
};

template <class T>
void average_along_rows(const Stored& x, int64_t images, int64_t channels, const Axis& h,
                        const Axis& w, const Stored& y) {
  const auto& table = NNARCH_SELECT(pool_table<T>());
  const int64_t in = h.inputs * w.inputs, out = h.outputs * w.outputs;
  const PlaneScales<T> scales(h, w);
  const int64_t rows = buffered_rows<T>(w);
  over_units<Denormals::flush>(
      checked_product(images, channels), h.outputs, ceil_div(std::max(in, out), h.outputs),
      [&](int64_t first, int64_t last, int64_t from, int64_t to) {
        Scratch<T> values(plane_buffer_size(w, rows));
        const PlaneBuffer<T> buffer{
            values.get(),       rows,
            scales.rows.data(), scales.columns.empty() ? nullptr : scales.columns.data(),
            scales.same,        nullptr};
        const PooledUnits<T> at(x, y, h, w.inputs, w.outputs, first, last, from, to);
        table.average_planes(at.x(), last - first, h, w, from, to, at.y(), buffer);
      });
}

template <class T>
void average_contiguous(const Stored& x, int64_t images, int64_t channels, const Axis& h,
                        const Axis& w, const Stored& y) {
  if (along_rows(h, w)) return average_along_rows<T>(x, images, channels, h, w, y);
  const auto& table = NNARCH_SELECT(pool_table<T>());
  over_planes<Denormals::flush, T>(
      x, checked_product(images, channels), h, w, y, nullptr,
      [&](const T* image, int64_t lanes, int64_t from, int64_t to, T* out, int64_t*) {
        table.average_rows(image, lanes, h, w, from, to, out, Traffic{});
      });
}

// Adds n channels of `pixels` pixels, `step` apart from element `first` on, to sums[n]. Half types
// pass through scratch memory in parts.
template <class T>
void add_pixels(const Stored& x, int64_t first, int64_t pixels, int64_t step, int64_t n,
                double* sums) {
  const auto& table = NNARCH_SELECT(pool_table<T>());
  const int64_t part = x.half ? std::max<int64_t>(1, kMemoryPartBytes / (4 * n)) : pixels;
  for (int64_t p = 0; p < pixels; p += part) {
    const int64_t rows = std::min(part, pixels - p), from = first + p * step;
    const bool dense = step == n;
    const Reading<T> in(x, dense ? StoredBlock{from, rows * n} : StoredBlock{from, n, rows, step});
    table.sum_pixels(in.get(), rows, dense ? n : in.step(), n, sums);
  }
}

// The mean of a plane that is too large for scratch memory: of pixels of 64 channels and a rest.
template <class T>
T mean_of_plane(const Stored& x, int64_t first, int64_t pixels) {
  constexpr int64_t n = 64;
  double sums[n] = {};
  const int64_t rest = pixels % n;
  add_pixels<T>(x, first, pixels / n, n, n, sums);
  if (rest > 0) add_pixels<T>(x, first + pixels - rest, 1, rest, rest, sums);
  return static_cast<T>(std::accumulate(sums, sums + n, 0.0) / static_cast<double>(pixels));
}

// The mean of every plane: one pass at memory bandwidth.
template <class T>
void mean_planes(const Stored& x, int64_t planes, int64_t pixels, const Stored& y) {
  const auto& table = NNARCH_SELECT(pool_table<T>());
  const int64_t run = std::max<int64_t>(1, 16384 / pixels);
  parallel_tasks(ceil_div(planes, run), [&](int64_t task) {
    const int64_t first = task * run, count = std::min(run, planes - first);
    const Writing<T> out(y, {first, count});
    if (x.half && pixels * 4 > kMemoryPartBytes) {  // one plane
      *out.get() = mean_of_plane<T>(x, first * pixels, pixels);
    } else {
      const Reading<T> in(x, {first * pixels, count * pixels});
      table.mean_planes(in.get(), count, pixels, out.get());
    }
  });
}

// The same for channels_last.
template <class T>
void mean_pixels(const Stored& x, int64_t images, int64_t channels, int64_t pixels,
                 const Stored& y) {
  // Few images are cut by channels too.
  const int64_t run = images >= 8 ? channels : 256, runs = ceil_div(channels, run);
  parallel_tasks(images * runs, [&](int64_t task) {
    const int64_t image = task / runs, from = task % runs * run;
    const int64_t n = std::min(channels - from, run);
    Scratch<double> scratch(n);
    double* const sums = scratch.get();
    std::fill_n(sums, n, 0.0);
    add_pixels<T>(x, image * pixels * channels + from, pixels, channels, n, sums);
    const Writing<T> out(y, {image * channels + from, n});
    const double scale = 1.0 / static_cast<double>(pixels);
    for (int64_t c = 0; c < n; ++c) out.get()[c] = static_cast<T>(sums[c] * scale);
  });
}

// Averages of `input`, which lies in the order of the images `y`.
void average_into(const Tensor& y, const Tensor& input, bool channels_last, const Windows& rows,
                  const Windows& columns) {
  const Axis h = rows.axis(), w = columns.axis();
  const int64_t images = y.size(0), channels = y.size(1);
  // One window, which is the whole plane; a count is what its sum is divided by.
  const auto whole = [](const Axis& a) {
    return a.outputs == 1 && a.start[0] == 0 && a.end[0] == a.inputs && a.count[0] == a.inputs;
  };
  const bool global = whole(h) && whole(w) && h.step == 1;
  with_scalar_type(input.scalar_type(), "avg_pool2d", [&](auto scalar) {
    using T = decltype(scalar);
    const Stored from(input), to(y);
    set_algorithm(global ? "global" : channels_last ? "channels_last" : "planes");
    if (global && channels_last)
      mean_pixels<T>(from, images, channels, h.inputs * w.inputs, to);
    else if (global)
      mean_planes<T>(from, images * channels, h.inputs * w.inputs, to);
    else if (channels_last)
      average_channels_last<T>(from, images, channels, h, w, to);
    else
      average_contiguous<T>(from, images, channels, h, w, to);
  });
}

// Averages over the windows that windows(axis) makes, in the order of x. It is called where there
// is memory for the output.
template <class F>
Tensor average_over(const Tensor& x, int64_t height, int64_t width, const F& windows) {
  const Tensor input = in_order_of(x, x);
  const Tensor y = new_images(x, height, width, x.scalar_type());
  if (y.numel() > 0) average_into(y, input, follows_channels_last(x), windows(0), windows(1));
  return y;
}

// The arguments of avg_pool2d.
struct Arguments {
  AxisArguments axes[2];
  bool count_padding;
  std::optional<int64_t> divisor;

  Arguments(const IntList& kernel, const IntList& stride, const IntList& padding, bool ceil_mode,
            bool count_include_pad, std::optional<int64_t> divisor_override)
      : axes{axis_arguments(kernel, stride, padding, {1, 1}, ceil_mode, 0),
             axis_arguments(kernel, stride, padding, {1, 1}, ceil_mode, 1)},
        count_padding(count_include_pad),
        divisor(divisor_override) {
    require(!divisor || *divisor != 0, "avg_pool2d: divisor_override must not be 0");
  }

  // The divisor of a window is the product of its counts in both axes.
  Windows windows(int64_t inputs, int axis) const {
    Windows w = regular_windows(inputs, axes[axis], count_padding);
    if (divisor) std::fill(w.count.begin(), w.count.end(), axis == 0 ? *divisor : 1);
    return w;
  }
};

Tensor avg_pool2d(const Tensor& x, IntList kernel, IntList stride, IntList padding, bool ceil_mode,
                  bool count_include_pad, std::optional<int64_t> divisor_override) {
  check_images(x);
  const Arguments a(kernel, stride, padding, ceil_mode, count_include_pad, divisor_override);
  return average_over(x, output_size(x.size(2), a.axes[0]), output_size(x.size(3), a.axes[1]),
                      [&](int axis) { return a.windows(x.size(2 + axis), axis); });
}

Tensor adaptive_avg_pool2d(const Tensor& x, IntList output_size) {
  check_images(x);
  check_pair(output_size);
  return average_over(x, output_size[0], output_size[1], [&](int axis) {
    return adaptive_windows(x.size(2 + axis), output_size[axis]);
  });
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

bool all_equal(const Windows& w) {
  return all_equal(w.count.data(), static_cast<int64_t>(w.count.size()));
}

// Every input sums the gradients of the outputs that it went into, each over its divisor.
// forward(axis) makes the windows of the forward pass.
template <class F>
Tensor spread(const Tensor& grad, const IntList& input_size, const F& forward) {
  const Tensor g = in_order_of(grad, grad);
  const Tensor dx = new_images(grad, input_size[2], input_size[3], grad.scalar_type());
  if (dx.numel() == 0) return dx;
  const Windows rows = forward(0), columns = forward(1);
  Windows inverse_rows = inverse_windows(rows), inverse_columns = inverse_windows(columns);
  Tensor scaled = g;
  if (grad.numel() > 0 && all_equal(rows) && all_equal(columns)) {
    std::fill(inverse_rows.count.begin(), inverse_rows.count.end(), rows.count.front());
    std::fill(inverse_columns.count.begin(), inverse_columns.count.end(), columns.count.front());
  } else {
    with_scalar_type(g.scalar_type(), "avg_pool2d_input_grad", [&](auto scalar) {
      scaled = divide<decltype(scalar)>(to_compute_type(g), rows, columns);
    });
  }
  average_into(dx, scaled, follows_channels_last(grad), inverse_rows, inverse_columns);
  return dx;
}

void check_grad(const Tensor& grad, const IntList& input_size) {
  require(grad.dim() == 4 && input_size.size() == 4,
          "avg_pool2d_input_grad: 4 dimensions expected");
  require(input_size[0] == grad.size(0) && input_size[1] == grad.size(1) && input_size[2] > 0 &&
              input_size[3] > 0,
          "avg_pool2d_input_grad: input_size does not fit");
  for (int axis : {2, 3}) {
    check_windows(input_size[axis]);
    check_windows(grad.size(axis));
  }
  with_scalar_type(grad.scalar_type(), "avg_pool2d_input_grad", [](auto) {});
}

Tensor avg_pool2d_input_grad(const Tensor& grad, IntList input_size, IntList kernel, IntList stride,
                             IntList padding, bool ceil_mode, bool count_include_pad,
                             std::optional<int64_t> divisor_override) {
  check_grad(grad, input_size);
  const Arguments a(kernel, stride, padding, ceil_mode, count_include_pad, divisor_override);
  for (int axis : {0, 1})
    require(grad.size(2 + axis) == output_size(input_size[2 + axis], a.axes[axis]),
            "avg_pool2d_input_grad: grad does not have the size of the output");
  return spread(grad, input_size, [&](int axis) { return a.windows(input_size[2 + axis], axis); });
}

Tensor adaptive_avg_pool2d_input_grad(const Tensor& grad, IntList input_size) {
  check_grad(grad, input_size);
  return spread(grad, input_size, [&](int axis) {
    return adaptive_windows(input_size[2 + axis], grad.size(2 + axis));
  });
}

}  // namespace

NNARCH_OPS(average_pooling, ops) {
  ops.impl("avg_pool2d", TORCH_BOX(&avg_pool2d));
  ops.impl("avg_pool2d_input_grad", TORCH_BOX(&avg_pool2d_input_grad));
  ops.impl("adaptive_avg_pool2d", TORCH_BOX(&adaptive_avg_pool2d));
  ops.impl("adaptive_avg_pool2d_input_grad", TORCH_BOX(&adaptive_avg_pool2d_input_grad));
}

}  // namespace nnarch
