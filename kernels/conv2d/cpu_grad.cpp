// conv2d's gradients on the CPU.
#include <type_traits>

#include "conv2d/cpu_grouped.h"
#include "conv2d/cpu_product.h"
#include "conv2d/cpu_shape.h"
#include "conv2d/cpu_stem.h"
#include "conv2d/cpu_views.h"
#include "conv2d/cpu_weight_grad.h"
#include "conv2d/cpu_winograd_grad.h"
#include "cpu/registry.h"
#include "cpu/tensor.h"

namespace nnarch {
namespace {

// One phase of the input rows or columns: the positions phase, phase + stride, … and the taps that
// reach them.
struct Phase {
  int64_t first, count;
  std::vector<int64_t> taps;    // r or s
  std::vector<int64_t> offset;  // dy or dx of each: output position = index in the phase + offset
};

std::vector<Phase> phases(int64_t size, int64_t stride, int64_t pad, int64_t kernel,
                          int64_t dilation) {
  std::vector<Phase> all;
  for (int64_t first = 0; first < std::min(stride, size); ++first) {
    Phase phase{first, ceil_div(size - first, stride), {}, {}};
    for (int64_t r = kernel - 1; r >= 0; --r) {  // so that the upper left tap comes first
      const int64_t at = first + pad - r * dilation;
      if (at % stride != 0) continue;
      phase.taps.push_back(r);
      phase.offset.push_back(at / stride);
    }
    all.push_back(phase);
  }
  return all;
}

template <class T>
void input_grad_phase(const T* grad, const Tensor& weight, T* dx, const ConvShape& p, int64_t group,
                      const Phase& rows, const Phase& columns) {
  GridImage<T> image = grad_image(grad, p, group);
  image.grid_h = rows.count, image.grid_w = columns.count;
  WeightView<T> view{.data = data<T>(weight) + group * p.group_k() * weight.stride(0),
                     .columns = p.group_c(),  // the channels of the input
                     .depth = p.group_k(),
                     .column_stride = weight.stride(1),
                     .depth_stride = weight.stride(0),
                     .tap_offset = {}};
  for (size_t i = 0; i < rows.taps.size(); ++i)
    for (size_t j = 0; j < columns.taps.size(); ++j) {
      image.taps.push_back({rows.offset[i], columns.offset[j]});
      view.tap_offset.push_back(rows.taps[i] * weight.stride(2) +
                                columns.taps[j] * weight.stride(3));
    }
  const int64_t tile =
      winograd_serves(image)
          ? choose_tile({p.n, rows.count, columns.count, view.depth, view.columns, false})
          : 0;
  T* first = dx + group * p.group_c() + (rows.first * p.w + columns.first) * p.c;
  conv_product<T>(image, tile, nullptr, view, first,
                  {p.h * p.w * p.c, p.stride_h * p.w * p.c, p.stride_w * p.c}, {});
  if (tile > 0) set_algorithm(algorithm_name(p, tile));
}

// The phase for all groups at once, where they are narrow: a convolution of grad. Its taps follow
// each other at even distances, from the last one of the kernel on.
template <class T>
void input_grad_phase_of_groups(const T* grad, const Tensor& weight, T* dx, const ConvShape& p,
                                const Phase& rows, const Phase& columns) {
  const auto step = [](const std::vector<int64_t>& v) { return v.size() > 1 ? v[1] - v[0] : 1; };
  ConvShape q{p.n, p.k, p.oh, p.ow, p.c, std::ssize(rows.taps), std::ssize(columns.taps)};
  q.stride_h = q.stride_w = 1;
  q.dilation_h = step(rows.offset), q.dilation_w = step(columns.offset);
  q.top = -rows.offset[0], q.left = -columns.offset[0];
  q.groups = p.groups, q.oh = rows.count, q.ow = columns.count;
  GroupedWeight<const T> w = grouped_weight(data<T>(weight), weight, p.groups);
  std::swap(w.outputs, w.depth), std::swap(w.output_stride, w.depth_stride);
  w.data += rows.taps[0] * w.r_stride + columns.taps[0] * w.s_stride;
  w.r = q.r, w.r_stride *= step(rows.taps);
  w.s = q.s, w.s_stride *= step(columns.taps);
  Scratch<T> packed(grouped_packed_size<T>(q.k, q.taps(), q.group_c()));
  grouped_pack<T>(w, packed.get());
  GroupedImages<T> images =
      grouped_images(q, grad, false, dx + (rows.first * p.w + columns.first) * p.c, false);
  images.conv.y_row = p.stride_h * p.w * p.c, images.conv.y_pixel = p.stride_w * p.c;
  images.y_image = p.h * p.w * p.c;
  grouped_product<T>(images, packed.get());
}

template <class T>
void input_grad_phase_of_all(const T* grad, const Tensor& weight, T* dx, const ConvShape& p,
                             const Phase& rows, const Phase& columns) {
  if (grouped_serves<T>(p.groups, p.group_k(), p.group_c()) && !rows.taps.empty() &&
      !columns.taps.empty()) {
    set_algorithm("narrow_groups");
    return input_grad_phase_of_groups<T>(grad, weight, dx, p, rows, columns);
  }
  for (int64_t g = 0; g < p.groups; ++g) input_grad_phase<T>(grad, weight, dx, p, g, rows, columns);
}

Tensor conv2d_input_grad(const Tensor& grad_in, const Tensor& weight_in, const IntList& input_size,
                         const IntList& stride, const IntList& padding, const IntList& dilation,
                         int64_t groups) {
  const ScalarType type = grad_in.scalar_type();
  require(weight_in.scalar_type() == type,
          "conv2d_input_grad: grad and weight must have one dtype");
  const ConvShape p =
      conv_shape(input_size, sizes_of(weight_in), stride, padding, dilation, groups);
  require(sizes_of(grad_in) == p.output_size(),
          "conv2d_input_grad: grad must have the shape of the output");
  const Tensor grad = as_channels_last(to_compute_type(grad_in));
  const Tensor weight = to_compute_type(weight_in);
  const Tensor dx = new_channels_last(input_size, grad.scalar_type());
  set_algorithm(p.stride_h * p.stride_w > 1 ? "implicit_gemm_phases" : "implicit_gemm");
  with_scalar_type(grad.scalar_type(), "conv2d_input_grad", [&](auto scalar) {
    using T = decltype(scalar);
    for (const Phase& rows : phases(p.h, p.stride_h, p.top, p.r, p.dilation_h))
      for (const Phase& columns : phases(p.w, p.stride_w, p.left, p.s, p.dilation_w))
        input_grad_phase_of_all<T>(data<T>(grad), weight, mutable_data<T>(dx), p, rows, columns);
  });
  return to_type(in_format_of(dx, grad_in), type);
}

// sums[k][tap][c] of one group to dw[k][c][tap].
template <class T>
void unpack_weight_grad(const T* sums, const ConvShape& p, T* dw) {
  const int64_t taps = p.taps(), c = p.group_c();
  parallel_tasks(p.group_k(), [&](int64_t k) {
    transpose_fn<T>()(sums + k * taps * c, c, dw + k * taps * c, taps, taps, c);
  });
}

// How the weight's gradient is computed: Winograd's tile, or 0.
template <class T>
int64_t weight_grad_tile(const ConvShape& p) {
  if (!winograd_serves(forward_image<T>(nullptr, p, 0))) return 0;
  return choose_weight_grad_tile({p.n, p.oh, p.ow, p.group_c(), p.group_k(), false});
}

template <class T>
void weight_grad_group(const Tensor& grad, const Tensor& x, const ConvShape& p, int64_t tile,
                       int64_t group, T* sums) {
  const GradView<T> view{data<T>(grad) + group * p.group_k(), p.k, p.n * p.oh * p.ow, p.group_k()};
  if (stem_serves(p) && tile == 0)
    return weight_grad<T>(
        view, p.r, p.s * p.c, [&] { return StemRows<T>(x, p, WeightGradPlan::positions); }, sums);
  const GridImage<T> image = forward_image<T>(data<T>(x), p, group);
  if constexpr (std::is_same_v<T, float>)
    if (tile > 0)
      return WinogradWeightGrad(image, grad_image(data<T>(grad), p, group), tile).run(sums);
  weight_grad<T>(
      view, p.taps(), p.group_c(), [&] { return TapRows<T>(image, WeightGradPlan::positions); },
      sums);
}

// Whether narrow groups have a weight gradient of their own for this kernel.
template <class T>
bool has_narrow_weight_grad(const ConvShape& p) {
  return grouped_serves<T>(p.groups, p.group_c(), p.group_k()) &&
         NNARCH_SELECT(grouped_grad_scratch<T>(
             grouped_images<T>(p, nullptr, false, nullptr, false).conv)) > 0;
}

template <class T>
void weight_grad_of_narrow_groups(const Tensor& grad, const Tensor& x_in, const ConvShape& p,
                                  const Tensor& dw) {
  set_algorithm("narrow_groups_weight_grad");
  const Tensor x = is_planar(x_in) ? x_in : as_channels_last(x_in);
  // The kernel reads what it calls y.
  const auto images = grouped_images<T>(p, data<T>(x), is_planar(x), mutable_data<T>(grad), false);
  Scratch<T> sums(images.vectors() * images.weights());
  grouped_weight_grad(images, sums.get());
  grouped_unpack<T>(sums.get(), grouped_weight(mutable_data<T>(dw), dw, p.groups));
}

template <class T>
void weight_grad_groups(const Tensor& grad, const Tensor& x_in, const ConvShape& p,
                        bool channels_last, T* dw) {
  const int64_t tile = weight_grad_tile<T>(p);
  const bool stem = stem_serves(p) && tile == 0;
  set_algorithm(stem ? "stem_weight_grad" : tile > 0 ? "winograd_weight_grad" : "weight_grad_gemm");
  const Tensor x = stem ? x_in : as_channels_last(x_in);
  const int64_t each = p.group_k() * p.taps() * p.group_c();
  const bool in_place = channels_last || p.taps() == 1;  // then sums have the order of dw
  Scratch<T> sums(in_place ? 0 : each);
  for (int64_t g = 0; g < p.groups; ++g) {
    weight_grad_group<T>(grad, x, p, tile, g, in_place ? dw + g * each : sums.get());
    if (!in_place) unpack_weight_grad(sums.get(), p, dw + g * each);
  }
}

Tensor conv2d_weight_grad(const Tensor& grad_in, const Tensor& x_in, const IntList& weight_size,
                          const IntList& stride, const IntList& padding, const IntList& dilation,
                          int64_t groups, bool channels_last) {
  const ScalarType type = grad_in.scalar_type();
  require(x_in.scalar_type() == type, "conv2d_weight_grad: grad and x must have one dtype");
  const ConvShape p = conv_shape(sizes_of(x_in), weight_size, stride, padding, dilation, groups);
  require(sizes_of(grad_in) == p.output_size(),
          "conv2d_weight_grad: grad must have the shape of the output");
  const Tensor grad = as_channels_last(to_compute_type(grad_in));
  const Tensor dw = channels_last ? new_channels_last(weight_size, grad.scalar_type())
                                  : new_contiguous(weight_size, grad.scalar_type());
  with_scalar_type(grad.scalar_type(), "conv2d_weight_grad", [&](auto scalar) {
    using T = decltype(scalar);
    if (dw.numel() == 0) return;
    if (has_narrow_weight_grad<T>(p))
      weight_grad_of_narrow_groups<T>(grad, to_compute_type(x_in), p, dw);
    else
      weight_grad_groups<T>(grad, to_compute_type(x_in), p, channels_last, mutable_data<T>(dw));
  });
  return to_type(dw, type);
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(conv2d_grad, ops) {
  ops.impl("conv2d_input_grad", TORCH_BOX(&nnarch::conv2d_input_grad));
  ops.impl("conv2d_weight_grad", TORCH_BOX(&nnarch::conv2d_weight_grad));
}
