// Maximum pooling for training on the CPU: maxima with the taps they came from, and the gradient.
#include <array>
#include <tuple>

#include "cpu/arena.h"
#include "cpu/registry.h"
#include "pooling/cpu_images.h"
#include "pooling/cpu_taps.h"
#include "pooling/cpu_windows.h"

namespace nnarch {
namespace {

using Axes = std::array<TapAxis, 2>;

Axes tap_axes(const IntList& inputs, const IntList& kernel, const IntList& stride,
              const IntList& padding, const IntList& dilation, bool ceil_mode) {
  Axes axes;
  for (size_t i = 0; i < 2; ++i) {
    const auto a = axis_arguments(kernel, stride, padding, dilation, ceil_mode, i);
    axes[i] = {inputs[i], output_size(inputs[i], a), a.kernel, a.stride, a.padding, a.dilation};
  }
  require(axes[0].kernel < kNoTap && axes[1].kernel < kNoTap &&
              axes[0].kernel * axes[1].kernel < kNoTap,
          "max_pool2d_taps: a window of more than 254 taps");
  return axes;
}

int64_t span(const TapAxis& a) { return (a.kernel - 1) * a.dilation + 1; }

template <class T>
void taps_of_planes(const T* x, int64_t planes, const TapAxis& h, const TapAxis& w, T* y,
                    uint8_t* taps) {
  const auto& table = NNARCH_SELECT(tap_table<T>());
  const int64_t in = h.inputs * w.inputs, out = h.outputs * w.outputs;
  const int64_t row = std::max(w.padding + w.inputs, (w.outputs - 1) * w.stride + span(w));
  const int64_t pitch = row + 64;  // whole vectors are read
  const int64_t rows = std::max(span(h), std::min<int64_t>(h.inputs, 8192 / pitch));
  over_units<Denormals::keep>(planes, h.outputs, ceil_div(in, h.outputs),
                              [&](int64_t first, int64_t last, int64_t from, int64_t to) {
                                Scratch<T> buffer(rows * pitch);
                                std::fill_n(buffer.get(), rows * pitch,
                                            -std::numeric_limits<T>::infinity());
                                for (int64_t p = first; p < last; ++p)
                                  table.plane(x + p * in, h, w, from, to, y + p * out,
                                              taps + p * out, buffer.get(), pitch, rows);
                              });
}

template <class T>
void taps_of_images(const T* x, int64_t images, int64_t channels, const TapAxis& h,
                    const TapAxis& w, T* y, uint8_t* taps) {
  const auto& table = NNARCH_SELECT(tap_table<T>());
  const int64_t in = h.inputs * w.inputs * channels, out = h.outputs * w.outputs * channels;
  over_rows<Denormals::keep>(
      images, h.outputs, ceil_div(in, h.outputs), [&](int64_t n, int64_t from, int64_t to) {
        table.rows(x + n * in, channels, h, w, from, to, y + n * out, taps + n * out);
      });
}

std::tuple<Tensor, Tensor> max_pool2d_taps(const Tensor& x, IntList kernel, IntList stride,
                                           IntList padding, IntList dilation, bool ceil_mode) {
  check_images(x);
  const auto [h, w] =
      tap_axes({x.size(2), x.size(3)}, kernel, stride, padding, dilation, ceil_mode);
  const Tensor input = in_order_of(x, to_compute_type(x));
  const Tensor y = new_images(x, h.outputs, w.outputs, input.scalar_type());
  const Tensor taps = new_images(x, h.outputs, w.outputs, ScalarType::Byte);
  if (y.numel() == 0) return {to_type(y, x.scalar_type()), taps};
  const bool channels_last = follows_channels_last(x);
  set_algorithm(channels_last ? "channels_last" : "planes");
  with_scalar_type(input.scalar_type(), "max_pool2d_taps", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t planes = checked_product(x.size(0), x.size(1));
    const T* from = data<T>(input);
    T* to = mutable_data<T>(y);
    if (channels_last)
      taps_of_images<T>(from, x.size(0), x.size(1), h, w, to, mutable_data<uint8_t>(taps));
    else if (w.stride <= 2 && span(w) <= 64 && span(h) <= 64)
      taps_of_planes<T>(from, planes, h, w, to, mutable_data<uint8_t>(taps));
    else  // one by one
      taps_of_images<T>(from, planes, 1, h, w, to, mutable_data<uint8_t>(taps));
  });
  return {to_type(y, x.scalar_type()), taps};
}

template <class T>
void grad_of_planes(const T* grad, const uint8_t* taps, int64_t planes, const TapAxis& h,
                    const TapAxis& w, T* dx) {
  const auto& table = NNARCH_SELECT(tap_table<T>());
  const int64_t in = h.inputs * w.inputs, out = h.outputs * w.outputs;
  const int64_t pitch = w.outputs + 2 * kTapMargin;
  over_units<Denormals::keep>(
      planes, h.inputs, w.inputs, [&](int64_t first, int64_t last, int64_t from, int64_t to) {
        // The windows that hold any of these rows.
        const int64_t top = h.first_window(from);
        const int64_t bottom = std::min(h.outputs, (to - 1 + h.padding) / h.stride + 1);
        const int64_t rows = std::max<int64_t>(0, bottom - top);
        Scratch<T> padded(rows * pitch);
        Scratch<uint8_t> padded_taps(rows * pitch);
        std::fill_n(padded.get(), rows * pitch, T{0});
        std::fill_n(padded_taps.get(), rows * pitch, static_cast<uint8_t>(kNoTap));
        for (int64_t p = first; p < last; ++p) {
          for (int64_t i = 0; i < rows; ++i) {
            const int64_t at = p * out + (top + i) * w.outputs, to_row = i * pitch + kTapMargin;
            std::copy_n(grad + at, w.outputs, padded.get() + to_row);
            std::copy_n(taps + at, w.outputs, padded_taps.get() + to_row);
          }
          table.grad_plane(padded.get() - top * pitch, padded_taps.get() - top * pitch, pitch, h, w,
                           from, to, dx + p * in);
        }
      });
}

template <class T>
void grad_of_images(const T* grad, const uint8_t* taps, int64_t images, int64_t channels,
                    const TapAxis& h, const TapAxis& w, T* dx) {
  const auto& table = NNARCH_SELECT(tap_table<T>());
  const int64_t in = h.inputs * w.inputs * channels, out = h.outputs * w.outputs * channels;
  over_rows<Denormals::keep>(
      images, h.inputs, w.inputs * channels, [&](int64_t n, int64_t from, int64_t to) {
        table.grad_rows(grad + n * out, taps + n * out, channels, h, w, from, to, dx + n * in);
      });
}

// Any window, one gradient after the other. What no tap of a window lies under is dropped.
template <class T>
void scatter_grad(const T* grad, const uint8_t* taps, int64_t images, int64_t channels,
                  const TapAxis& h, const TapAxis& w, T* dx) {
  const int64_t in = h.inputs * w.inputs * channels, out = h.outputs * w.outputs * channels;
  pooling_tasks<Denormals::keep>(images, [&](int64_t n) {
    T* to = dx + n * in;
    std::fill_n(to, in, T{0});
    for (int64_t i = 0; i < out; ++i) {
      const int64_t tap = taps[n * out + i], c = i % channels, pixel = i / channels;
      const int64_t row = h.at(pixel / w.outputs, tap / w.kernel);
      const int64_t column = w.at(pixel % w.outputs, tap % w.kernel);
      const bool inside = row >= 0 && row < h.inputs && column >= 0 && column < w.inputs;
      if (inside && tap < h.kernel * w.kernel)
        to[(row * w.inputs + column) * channels + c] += grad[n * out + i];
    }
  });
}

Tensor max_pool2d_taps_grad(const Tensor& grad, const Tensor& taps, IntList input_size,
                            IntList kernel, IntList stride, IntList padding, IntList dilation,
                            bool ceil_mode) {
  require(grad.dim() == 4 && input_size.size() == 4, "max_pool2d_taps_grad: 4 dimensions expected");
  require(taps.scalar_type() == ScalarType::Byte, "max_pool2d_taps_grad: taps must be uint8");
  require(same_sizes(grad, taps), "max_pool2d_taps_grad: taps must have the shape of grad");
  require(input_size[0] == grad.size(0) && input_size[1] == grad.size(1) && input_size[2] > 0 &&
              input_size[3] > 0,
          "max_pool2d_taps_grad: input_size does not fit");
  const auto [h, w] =
      tap_axes({input_size[2], input_size[3]}, kernel, stride, padding, dilation, ceil_mode);
  require(grad.size(2) == h.outputs && grad.size(3) == w.outputs,
          "max_pool2d_taps_grad: grad does not have the size of the output");
  const bool channels_last = follows_channels_last(grad);
  const Tensor g = in_order_of(grad, to_compute_type(grad));
  const Tensor where = indices_in_order_of(grad, taps);
  const Tensor dx = new_images(grad, h.inputs, w.inputs, g.scalar_type());
  if (dx.numel() == 0) return to_type(dx, grad.scalar_type());
  const bool neighbours = h.dilation == 1 && w.dilation == 1;
  const int64_t windows = ceil_div(h.kernel, h.stride) * ceil_div(w.kernel, w.stride);
  const int64_t images = channels_last ? grad.size(0) : checked_product(grad.size(0), grad.size(1));
  const int64_t channels = channels_last ? grad.size(1) : 1;
  with_scalar_type(g.scalar_type(), "max_pool2d_taps_grad", [&](auto scalar) {
    using T = decltype(scalar);
    const uint8_t* t = data<uint8_t>(where);
    if (!neighbours || windows > kMostWindowsOfPixel)
      scatter_grad<T>(data<T>(g), t, images, channels, h, w, mutable_data<T>(dx));
    else if (channels_last || w.stride > 2 || w.kernel > 15)
      grad_of_images<T>(data<T>(g), t, images, channels, h, w, mutable_data<T>(dx));
    else
      grad_of_planes<T>(data<T>(g), t, images, h, w, mutable_data<T>(dx));
  });
  return to_type(dx, grad.scalar_type());
}

}  // namespace

NNARCH_OPS(max_pooling_taps, ops) {
  ops.impl("max_pool2d_taps", TORCH_BOX(&max_pool2d_taps));
  ops.impl("max_pool2d_taps_grad", TORCH_BOX(&max_pool2d_taps_grad));
}

}  // namespace nnarch
