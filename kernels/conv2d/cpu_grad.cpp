// conv2d's gradients on the CPU.
#include <algorithm>
#include <tuple>
#include <type_traits>

#include "conv2d/cpu_grouped_grad.h"
#include "conv2d/cpu_parts.h"
#include "conv2d/cpu_product.h"
#include "conv2d/cpu_shape.h"
#include "conv2d/cpu_stem.h"
#include "conv2d/cpu_views.h"
#include "conv2d/cpu_winograd_grad.h"
#include "conv2d/cpu_winograd_strided.h"
#include "conv_transpose2d/cpu_parts.h"
#include "conv_transpose2d/cpu_transposed.h"
#include "cpu/image_parts.h"
#include "cpu/registry.h"
#include "cpu/tensor.h"
#include "cpu/weight_grad.h"
#include "normalization/cpu_sum.h"

namespace nnarch {
namespace {

// The gradient of the input is the transposed convolution of the gradient of the output.
TransposedShape transposed_of(const ConvShape& p) {
  return {p.n,        p.k,   p.oh,   p.ow,         p.c,          p.r,      p.s, p.stride_h,
          p.stride_w, p.top, p.left, p.dilation_h, p.dilation_w, p.groups, p.h, p.w};
}

// Narrow groups: channels_last to channels_last.
template <class T>
Tensor narrow_input_grad(const Tensor& grad, const Tensor& weight, const TransposedShape& p) {
  set_algorithm("narrow_groups");
  const Tensor dx = new_channels_last({p.n, p.k, p.oh, p.ow}, grad.scalar_type());
  const Tensor image = as_channels_last(grad);
  if (dx.numel() > 0) transposed_groups<T>(data<T>(image), weight, mutable_data<T>(dx), p);
  return dx;
}

// Winograd with a stride of 2, in the format of the gradient.
Tensor strided_input_grad(const Tensor& grad, const Tensor& weight, const ConvShape& p) {
  set_algorithm("winograd_strided");
  const bool planar = !follows_channels_last(grad) && StridedWinograd::serves_planar(p);
  const Tensor dx = planar ? new_contiguous(p.input_size(), grad.scalar_type())
                           : new_channels_last(p.input_size(), grad.scalar_type());
  const Tensor image = as_channels_last(grad);
  for (int64_t g = 0; g < p.groups; ++g)
    StridedWinograd(p, g, planar)
        .input_grad(data<float>(image), forward_weight<float>(weight, p, g),
                    mutable_data<float>(dx));
  return dx;
}

// In the memory format of grad.
template <class T>
Tensor input_grad_of(const Tensor& grad, const Tensor& weight, const ConvShape& p) {
  const TransposedShape t = transposed_of(p);
  if (transposed_groups_serve<T>(t))
    return in_format_of(narrow_input_grad<T>(grad, weight, t), grad);
  if constexpr (std::is_same_v<T, float>)
    if (strided_winograd_serves<T>(p))
      return in_format_of(strided_input_grad(grad, weight, p), grad);
  const int64_t layout = choose_layout(t, sizeof(T) == sizeof(float), false);
  const bool pixel = layout == kPixel;
  const Tensor dx = pixel ? new_contiguous(p.input_size(), grad.scalar_type())
                          : new_channels_last(p.input_size(), grad.scalar_type());
  set_algorithm(transposed_algorithm(t, layout));
  const Tensor image = pixel ? as_contiguous(grad) : as_channels_last(grad);
  if (dx.numel() > 0)
    transposed<T>(data<T>(image), weight, nullptr, layout, mutable_data<T>(dx), t, {});
  return in_format_of(dx, grad);
}

// Whether planar images are so large that they are copied to channels_last in parts.
bool takes_parts(const Tensor& grad, const ConvShape& p) {
  return goes_in_parts(grad, p.n * p.oh * part_row_bytes(p));
}

// Half types go through the gradients some images at a time (cpu/half.h), which repack the weight,
// or add to its gradient: larger parts than the convolution's.
constexpr int64_t kGradPartBytes = 2 * kPartBytes;

ConvShape of_images(const ConvShape& p, int64_t images) {
  ConvShape part = p;
  part.n = images;
  return part;
}

// The convolution whose input gradient is a part of another's.
ConvShape of_part(const ConvShape& p, const TransposedPart& part) {
  ConvShape shape = p;
  shape.n = part.input.images, shape.oh = part.input.rows;
  shape.h = part.shape.oh, shape.top = part.shape.top;
  const int64_t end = (shape.oh - 1) * p.stride_h + p.dilation_h * (p.r - 1) + 1;
  shape.bottom = std::max<int64_t>(0, end - shape.h - shape.top);
  return shape;
}

template <class T>
Tensor input_grad_in_parts(const Tensor& grad, const Tensor& weight, const ConvShape& p) {
  const Tensor dx = new_contiguous(p.input_size(), grad.scalar_type());
  const TransposedShape t = transposed_of(p);
  over_image_parts(t.n, t.oh, part_row_bytes(t), true, kFloatPartBytes, [&](const ImagePart& out) {
    const TransposedPart part(t, out);
    const Tensor image = part_channels_last(grad, part.input);
    put_planar(dx, out, as_channels_last(input_grad_of<T>(image, weight, of_part(p, part))));
  });
  return dx;
}

Tensor conv2d_input_grad(const Tensor& grad, const Tensor& weight_in, const IntList& input_size,
                         const IntList& stride, const IntList& padding, const IntList& dilation,
                         int64_t groups) {
  const ScalarType type = grad.scalar_type();
  require(weight_in.scalar_type() == type,
          "conv2d_input_grad: grad and weight must have one dtype");
  const ConvShape p =
      conv_shape(input_size, sizes_of(weight_in), stride, padding, dilation, groups);
  require(sizes_of(grad) == p.output_size(),
          "conv2d_input_grad: grad must have the shape of the output");
  const Tensor weight = to_compute_type(weight_in);
  if (!is_half(type))
    return with_scalar_type(type, "conv2d_input_grad", [&](auto scalar) {
      using T = decltype(scalar);
      return takes_parts(grad, p) ? input_grad_in_parts<T>(grad, weight, p)
                                  : input_grad_of<T>(grad, weight, p);
    });
  const bool channels_last = StayChannelsLast::holds() || follows_channels_last(grad);
  const Tensor dx =
      channels_last ? new_channels_last(input_size, type) : new_contiguous(input_size, type);
  over_image_parts(p.n, p.oh, part_row_bytes(p), false, kGradPartBytes, [&](const ImagePart& n) {
    const Tensor part = input_grad_of<float>(widened(grad, n), weight, of_images(p, n.images));
    round_into(dx, {n.image, n.images, 0, p.h}, part);
  });
  return dx;
}

// sums[k][tap][c] of one group to dw[k][c][tap].
template <class T>
void unpack_weight_grad(const T* sums, const ConvShape& p, T* dw) {
  const int64_t c = p.group_c(), each = p.taps() * c;
  const WeightRows<T> rows(dw, p.group_k(), p.taps(), c, false);
  parallel_tasks(p.group_k(), [&](int64_t k) { rows.put(sums + k * each, c, k, 0, c); });
}

// How the weight's gradient is computed: Winograd's tile, or none.
template <class T>
WinogradTile weight_grad_tile(const ConvShape& p) {
  const auto kernel = winograd_kernel(forward_image<T>(nullptr, p, 0));
  if (!kernel || kernel->rows == 5) return {};
  return choose_weight_grad_tile(
      {p.n, p.oh, p.ow, p.group_c(), p.group_k(), false, *kernel, stem_serves(p)});
}

template <class T>
void weight_grad_group(const Tensor& grad, const Tensor& x, const ConvShape& p, int64_t group,
                       T* sums) {
  const int64_t plane = p.oh * p.ow;
  const bool planar = is_planar(grad);  // a stem's only: it has one group
  const GradView<T> view{data<T>(grad) + group * p.group_k(), p.k, p.n * plane, p.group_k(),
                         planar ? plane : 0};
  if (stem_serves(p))
    return weight_grad<T>(
        view, 1, p.r * p.s * p.c, [&] { return StemWindows<T>(x, p, WeightGradPlan::positions); },
        sums);
  const GridImage<T> image = forward_image<T>(data<T>(x), p, group);
  weight_grad<T>(
      view, p.taps(), p.group_c(), [&] { return TapRows<T>(image, WeightGradPlan::positions); },
      sums);
}

// Winograd with a stride of 2.
void strided_weight_grad(const Tensor& grad, const Tensor& x_in, const ConvShape& p,
                         bool channels_last, float* dw) {
  set_algorithm("winograd_strided_weight_grad");
  const bool planar = is_planar(x_in) && StridedWinograd::serves_planar(p);
  const Tensor x = planar ? x_in : as_channels_last(x_in);
  const int64_t taps = p.taps(), depth = p.group_c();
  for (int64_t g = 0; g < p.groups; ++g)
    StridedWinograd(p, g, planar)
        .weight_grad(data<float>(x), data<float>(grad), channels_last,
                     dw + g * p.group_k() * taps * depth);
}

void winograd_weight_grad(const Tensor& grad_in, const Tensor& x_in, const ConvShape& p,
                          const WinogradTile& tile, bool channels_last, float* dw) {
  set_algorithm("winograd_weight_grad");
  const Tensor x = as_channels_last(x_in), grad = as_channels_last(grad_in);
  for (int64_t g = 0; g < p.groups; ++g)
    WinogradWeightGrad(forward_image<float>(data<float>(x), p, g),
                       grad_image(data<float>(grad), p, g), tile, channels_last)
        .run(dw + g * p.group_k() * p.taps() * p.group_c());
}

template <class T>
void weight_grad_groups(const Tensor& grad_in, const Tensor& x_in, const ConvShape& p,
                        bool channels_last, T* dw) {
  if constexpr (std::is_same_v<T, float>)
    if (const WinogradTile tile = weight_grad_tile<T>(p); tile.m > 0)
      return winograd_weight_grad(grad_in, x_in, p, tile, channels_last, dw);
  const bool stem = stem_serves(p);
  set_algorithm(stem ? "stem_weight_grad" : "weight_grad_gemm");
  const Tensor x = stem ? x_in : as_channels_last(x_in);
  // A planar gradient's rows serve as they lie, where an image is long enough for a product.
  const bool planar = stem && is_planar(grad_in) && p.oh * p.ow >= 128;
  const Tensor grad = planar ? grad_in : as_channels_last(grad_in);
  const int64_t each = p.group_k() * p.taps() * p.group_c();
  const bool in_place = channels_last || p.taps() == 1;  // then sums have the order of dw
  Scratch<T> sums(in_place ? 0 : each);
  for (int64_t g = 0; g < p.groups; ++g) {
    weight_grad_group<T>(grad, x, p, g, in_place ? dw + g * each : sums.get());
    if (!in_place) unpack_weight_grad(sums.get(), p, dw + g * each);
  }
}

template <class T>
Tensor weight_grad_of(const Tensor& grad, const Tensor& x, const IntList& weight_size,
                      const ConvShape& p, bool channels_last) {
  const Tensor dw = channels_last ? new_channels_last(weight_size, grad.scalar_type())
                                  : new_contiguous(weight_size, grad.scalar_type());
  if (dw.numel() == 0) return dw;
  if (has_narrow_weight_grad<T>(p))
    weight_grad_of_narrow_groups<T>(as_channels_last(grad), x, p, dw);
  else if (std::is_same_v<T, float> && strided_winograd_serves<T>(p))
    strided_weight_grad(as_channels_last(grad), x, p, channels_last,
                        reinterpret_cast<float*>(mutable_data<T>(dw)));
  else
    weight_grad_groups<T>(grad, x, p, channels_last, mutable_data<T>(dw));
  return dw;
}

// sum += term, element by element of two dense tensors in one order.
template <class T>
void add_to(const Tensor& sum, const Tensor& term) {
  constexpr int64_t run = 16384;
  const T* from = data<T>(term);
  T* to = mutable_data<T>(sum);
  parallel_tasks(ceil_div(sum.numel(), run), [&](int64_t task) {
    const int64_t end = std::min(sum.numel(), (task + 1) * run);
    for (int64_t i = task * run; i < end; ++i) to[i] += from[i];
  });
}

// Added up over parts of the images, each of about `most` bytes of floats; of_part(out) is the
// gradient of one.
template <class T, class F>
Tensor weight_grad_in_parts(const ConvShape& p, bool may_cut, int64_t most, const F& of_part) {
  OptTensor sum;
  over_image_parts(p.n, p.oh, part_row_bytes(p), may_cut, most, [&](const ImagePart& out) {
    const Tensor part = of_part(out);
    if (sum)
      add_to<T>(*sum, part);
    else
      sum = part;
  });
  return *sum;
}

Tensor weight_grad_of_half(const Tensor& grad, const Tensor& x, const IntList& weight_size,
                           const ConvShape& p, bool channels_last) {
  const int64_t weight_bytes = p.k * p.group_c() * p.taps() * int64_t{sizeof(float)};
  const int64_t most = std::clamp(2 * weight_bytes, kGradPartBytes, 2 * kGradPartBytes);
  const Tensor sum = weight_grad_in_parts<float>(p, false, most, [&](const ImagePart& n) {
    return weight_grad_of<float>(widened(grad, n), widened(x, {n.image, n.images, 0, p.h}),
                                 weight_size, of_images(p, n.images), channels_last);
  });
  return to_type(sum, grad.scalar_type());
}

template <class T>
Tensor weight_grad_of_float(const Tensor& grad, const Tensor& x, const IntList& weight_size,
                            const ConvShape& p, bool channels_last) {
  if (!takes_parts(grad, p) || follows_channels_last(x) ||
      (stem_serves(p) && weight_grad_tile<T>(p).m == 0))
    return weight_grad_of<T>(grad, x, weight_size, p, channels_last);
  return weight_grad_in_parts<T>(p, may_cut_rows(p), kFloatPartBytes, [&](const ImagePart& out) {
    const ConvPart part(p, out);
    return weight_grad_of<T>(part_channels_last(grad, out), part_channels_last(x, part.input),
                             weight_size, part.shape, channels_last);
  });
}

Tensor conv2d_weight_grad(const Tensor& grad, const Tensor& x, const IntList& weight_size,
                          const IntList& stride, const IntList& padding, const IntList& dilation,
                          int64_t groups, bool channels_last) {
  const ScalarType type = grad.scalar_type();
  require(x.scalar_type() == type, "conv2d_weight_grad: grad and x must have one dtype");
  const ConvShape p = conv_shape(sizes_of(x), weight_size, stride, padding, dilation, groups);
  require(sizes_of(grad) == p.output_size(),
          "conv2d_weight_grad: grad must have the shape of the output");
  if (is_half(type) && p.n > 0) return weight_grad_of_half(grad, x, weight_size, p, channels_last);
  return with_scalar_type(type, "conv2d_weight_grad", [&](auto scalar) {
    const Tensor dw = weight_grad_of_float<decltype(scalar)>(
        to_compute_type(grad), to_compute_type(x), weight_size, p, channels_last);
    return to_type(dw, type);
  });
}

// The gradients of x, weight and bias where there is no more of an epilogue; those that `wanted`
// (bits 1, 2 and 4) leaves out are empty.
std::tuple<Tensor, Tensor, Tensor> conv2d_backward(const Tensor& grad, const Tensor& x,
                                                   const Tensor& weight, const IntList& stride,
                                                   const IntList& padding, const IntList& dilation,
                                                   int64_t groups, int64_t wanted) {
  const auto empty = [&] { return new_contiguous({0}, grad.scalar_type()); };
  return std::make_tuple(
      wanted & 1 ? conv2d_input_grad(grad, weight, sizes_of(x), stride, padding, dilation, groups)
                 : empty(),
      wanted & 2 ? conv2d_weight_grad(grad, x, sizes_of(weight), stride, padding, dilation, groups,
                                      follows_channels_last(weight))
                 : empty(),
      wanted & 4 ? channel_sum(grad) : empty());
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(conv2d_grad, ops) {
  ops.impl("conv2d_backward", TORCH_BOX(&nnarch::conv2d_backward));
  ops.impl("conv2d_input_grad", TORCH_BOX(&nnarch::conv2d_input_grad));
  ops.impl("conv2d_weight_grad", TORCH_BOX(&nnarch::conv2d_weight_grad));
}
