// Maximum pooling on the CPU, its gradient and the gradient's.
#include <atomic>
#include <tuple>

#include "cpu/arena.h"
#include "cpu/registry.h"
#include "pooling/cpu_images.h"
#include "pooling/cpu_planes.h"
#include "pooling/cpu_stored.h"
#include "pooling/cpu_windows.h"

namespace nnarch {
namespace {

using Pair = std::tuple<Tensor, Tensor>;

template <class T>
void max_channels_last(const Stored& x, const Tensor& shape, const Axis& h, const Axis& w,
                       const Stored& y, int64_t* indices) {
  const auto& table = NNARCH_SELECT(pool_table<T>());
  const int64_t channels = shape.size(1);
  const int64_t in = h.inputs * w.inputs * channels, out = h.outputs * w.outputs * channels;
  const Traffic traffic = image_traffic<T>(y, shape.size(0), channels, h, w);
  over_rows<Denormals::keep>(
      shape.size(0), h.outputs, ceil_div(in, h.outputs),
      [&](int64_t n, int64_t from, int64_t to) {
        const PooledUnits<T> at(x, y, h, w.inputs * channels, w.outputs * channels, n, n + 1, from,
                                to);
        table.max_rows(at.x(), channels, h, w, from, to, at.y(),
                       indices ? indices + n * out : nullptr, traffic);
      },
      traffic.far);
}

template <class T>
void max_along_rows(const Stored& x, const Tensor& shape, const Axis& h, const Axis& w,
                    const Stored& y, int64_t* indices) {
  const auto& table = NNARCH_SELECT(pool_table<T>());
  const int64_t planes = checked_product(shape.size(0), shape.size(1));
  const int64_t in = h.inputs * w.inputs, out = h.outputs * w.outputs;
  const int64_t rows = indices ? 1 : buffered_rows<T>(w);
  const std::vector<T> scales(h.outputs, T{1});
  over_units<Denormals::keep>(
      planes, h.outputs, ceil_div(in, h.outputs),
      [&](int64_t first, int64_t last, int64_t from, int64_t to) {
        Scratch<T> values(plane_buffer_size(w, rows));
        Scratch<typename LaneIndex<T>::Type> positions(indices ? plane_buffer_size(w, 1) : 0);
        const PlaneBuffer<T> buffer{values.get(), rows, scales.data(),
                                    nullptr,      true, indices ? positions.get() : nullptr};
        const PooledUnits<T> at(x, y, h, w.inputs, w.outputs, first, last, from, to);
        table.max_planes(at.x(), last - first, h, w, from, to, at.y(),
                         indices ? indices + first * out : nullptr, buffer);
      });
}

template <class T>
void max_contiguous(const Stored& x, const Tensor& shape, const Axis& h, const Axis& w,
                    const Stored& y, int64_t* indices) {
  if (along_rows(h, w)) return max_along_rows<T>(x, shape, h, w, y, indices);
  const auto& table = NNARCH_SELECT(pool_table<T>());
  over_planes<Denormals::keep, T>(
      x, checked_product(shape.size(0), shape.size(1)), h, w, y, indices,
      [&](const T* image, int64_t lanes, int64_t from, int64_t to, T* out, int64_t* found) {
        table.max_rows(image, lanes, h, w, from, to, out, found, Traffic{});
      });
}

// windows(axis) makes the windows of an axis; it is called where there is memory for the output.
template <class F>
Pair max_over(const Tensor& x, int64_t height, int64_t width, bool return_indices,
              const F& windows) {
  // Positions are compared in 32-bit lanes beside floats.
  require(!return_indices || checked_product(x.size(2), x.size(3)) < INT32_MAX,
          "max_pool2d: the plane is too large for indices");
  const Tensor input = in_order_of(x, x);
  const Tensor y = new_images(x, height, width, x.scalar_type());
  const Tensor indices = return_indices ? new_images(x, height, width, ScalarType::Long)
                                        : new_contiguous({0}, ScalarType::Long);
  if (y.numel() == 0) return {y, indices};
  const Windows rows = windows(0), columns = windows(1);
  const Axis h = rows.axis(), w = columns.axis();
  with_scalar_type(input.scalar_type(), "max_pool2d", [&](auto scalar) {
    using T = decltype(scalar);
    int64_t* found = return_indices ? mutable_data<int64_t>(indices) : nullptr;
    set_algorithm(follows_channels_last(x) ? "channels_last" : "planes");
    const auto pool = follows_channels_last(x) ? max_channels_last<T> : max_contiguous<T>;
    pool(Stored(input), x, h, w, Stored(y), found);
  });
  return {y, indices};
}

Pair max_pool2d(const Tensor& x, IntList kernel, IntList stride, IntList padding, IntList dilation,
                bool ceil_mode, bool return_indices) {
  check_images(x);
  const AxisArguments axes[] = {axis_arguments(kernel, stride, padding, dilation, ceil_mode, 0),
                                axis_arguments(kernel, stride, padding, dilation, ceil_mode, 1)};
  return max_over(x, output_size(x.size(2), axes[0]), output_size(x.size(3), axes[1]),
                  return_indices,
                  [&](int axis) { return regular_windows(x.size(2 + axis), axes[axis], true); });
}

Pair adaptive_max_pool2d(const Tensor& x, IntList output_size, bool return_indices) {
  check_images(x);
  check_pair(output_size);
  return max_over(x, output_size[0], output_size[1], return_indices,
                  [&](int axis) { return adaptive_windows(x.size(2 + axis), output_size[axis]); });
}

// Calls f(small, large, channels) for pieces that cover both tensors: the offsets at which a piece
// begins in each, and how many neighbouring channels it takes at every pixel. A piece is one plane,
// or some channels of a channels_last image.
template <class F>
void over_columns(const Tensor& small, const Tensor& large, bool channels_last, const F& f) {
  const int64_t images = small.size(0), channels = small.size(1);
  const int64_t few = small.size(2) * small.size(3), many = large.size(2) * large.size(3);
  if (!channels_last) {
    pooling_tasks<Denormals::keep>(images * channels,
                                   [&](int64_t p) { f(p * few, p * many, int64_t{1}); });
    return;
  }
  // Few images are cut by channels too.
  const int64_t run = images >= 8 ? channels : 64, runs = ceil_div(channels, run);
  pooling_tasks<Denormals::keep>(images * runs, [&](int64_t task) {
    const int64_t n = task / runs, c = task % runs * run;
    f(n * few * channels + c, n * many * channels + c, std::min(run, channels - c));
  });
}

void check_indices(const Tensor& t, const Tensor& indices) {
  require(indices.scalar_type() == ScalarType::Long, "max_pool2d: indices must be int64");
  require(same_sizes(t, indices), "max_pool2d: indices must have the shape of the output");
}

// dx[index[i][c]][c] += grad[i][c] for `channels` neighbouring channels, where pixels lie `stride`
// apart; the rest of dx becomes 0. False where an index lies outside; -1 is a window of padding.
//
// dx is cleared shortly before the first gradient arrives, while the cache still holds it.
template <class T>
bool scatter(const T* grad, const int64_t* index, T* dx, int64_t pixels, int64_t inputs,
             int64_t stride, int64_t channels) {
  int64_t cleared = 0;
  const auto clear_to = [&](int64_t end) {
    if (channels == stride)
      std::fill(dx + cleared * stride, dx + end * stride, T{0});
    else
      for (int64_t i = cleared; i < end; ++i)
        std::fill(dx + i * stride, dx + i * stride + channels, T{0});
    cleared = end;
  };
  const int64_t ahead = ceil_div(4096, channels);
  bool inside = true;
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = index[i * stride + c];
      if (static_cast<uint64_t>(at) >= static_cast<uint64_t>(cleared)) [[unlikely]] {
        if (at < 0 || at >= inputs) {
          inside &= at == -1;
          continue;
        }
        clear_to(std::min(inputs, at + ahead));
      }
      dx[at * stride + c] += grad[i * stride + c];
    }
  clear_to(inputs);
  return inside;
}

Tensor max_pool2d_input_grad(const Tensor& grad, const Tensor& indices, IntList input_size) {
  require(grad.dim() == 4 && input_size.size() == 4,
          "max_pool2d_input_grad: 4 dimensions expected");
  check_indices(grad, indices);
  require(input_size[0] == grad.size(0) && input_size[1] == grad.size(1),
          "max_pool2d_input_grad: input_size does not fit");
  require(input_size[2] >= 0 && input_size[3] >= 0, "max_pool2d_input_grad: negative input_size");
  const bool channels_last = follows_channels_last(grad);
  const Tensor g = in_order_of(grad, to_compute_type(grad));
  const Tensor where = indices_in_order_of(grad, indices);
  const ScalarType type = g.scalar_type();
  const Tensor dx = new_images(grad, input_size[2], input_size[3], type);
  const int64_t pixels = grad.size(2) * grad.size(3),
                inputs = checked_product(input_size[2], input_size[3]);
  const int64_t stride = channels_last ? grad.size(1) : 1;
  std::atomic<bool> inside{true};
  with_scalar_type(type, "max_pool2d_input_grad", [&](auto scalar) {
    using T = decltype(scalar);
    over_columns(grad, dx, channels_last, [&](int64_t small, int64_t large, int64_t channels) {
      if (!scatter(data<T>(g) + small, data<int64_t>(where) + small, mutable_data<T>(dx) + large,
                   pixels, inputs, stride, channels))
        inside = false;
    });
  });
  require(inside, "max_pool2d_input_grad: an index lies outside the input");
  return to_type(dx, grad.scalar_type());
}

Tensor max_pool2d_gather(const Tensor& x, const Tensor& indices) {
  check_images(x);
  require(indices.dim() == 4 && indices.scalar_type() == ScalarType::Long,
          "max_pool2d_gather: indices must be int64 and 4-D");
  require(indices.size(0) == x.size(0) && indices.size(1) == x.size(1),
          "max_pool2d_gather: indices do not fit");
  const bool channels_last = follows_channels_last(x);
  const Tensor input = in_order_of(x, to_compute_type(x));
  const Tensor where = indices_in_order_of(x, indices);
  const Tensor y = new_images(x, indices.size(2), indices.size(3), input.scalar_type());
  const int64_t pixels = indices.size(2) * indices.size(3), inputs = x.size(2) * x.size(3);
  const int64_t stride = channels_last ? x.size(1) : 1;
  std::atomic<bool> inside{true};
  with_scalar_type(input.scalar_type(), "max_pool2d_gather", [&](auto scalar) {
    using T = decltype(scalar);
    over_columns(indices, x, channels_last, [&](int64_t small, int64_t large, int64_t channels) {
      const T* from = data<T>(input) + large;
      T* to = mutable_data<T>(y) + small;
      const int64_t* index = data<int64_t>(where) + small;
      bool all_inside = true;
      for (int64_t i = 0; i < pixels; ++i)
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t at = index[i * stride + c];
          const bool valid = static_cast<uint64_t>(at) < static_cast<uint64_t>(inputs);
          to[i * stride + c] = valid ? from[at * stride + c] : T{0};
          all_inside &= valid | (at == -1);
        }
      if (!all_inside) inside = false;
    });
  });
  require(inside, "max_pool2d_gather: an index lies outside the input");
  return to_type(y, x.scalar_type());
}

}  // namespace

NNARCH_OPS(max_pooling, ops) {
  ops.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  ops.impl("adaptive_max_pool2d", TORCH_BOX(&adaptive_max_pool2d));
  ops.impl("max_pool2d_input_grad", TORCH_BOX(&max_pool2d_input_grad));
  ops.impl("max_pool2d_gather", TORCH_BOX(&max_pool2d_gather));
}

}  // namespace nnarch
