// Depthwise convolution on the CPU: the operations.
#include <numeric>
#include <tuple>

#include "conv2d/cpu_parts.h"
#include "cpu/epilogue_fold.h"
#include "cpu/half.h"
#include "cpu/registry.h"
#include "depthwise/cpu_input_grad.h"
#include "depthwise/cpu_run.h"
#include "depthwise/cpu_weight_grad.h"
#include "normalization/cpu_sum.h"

namespace nnarch {
namespace {

const char* algorithm(const ConvShape& p) {
  if (p.r == p.s && p.stride_w / std::gcd(p.stride_w, p.dilation_w) <= 2) {
    if (p.s == 3) return "depthwise_3x3";
    if (p.s == 5) return "depthwise_5x5";
    if (p.s == 7) return "depthwise_7x7";
  }
  return "depthwise_general";
}

template <class T>
void forward(const Tensor& x, const T* packed, const Tensor& y, const ConvShape& p,
             const Layout& out, const Epilogue<T>& epilogue) {
  const int64_t multiplier = p.k / p.c;
  if (is_planar(x) && out.pixel == 1) {
    DepthwisePlane<T> plane{data<T>(x), p.h,      p.w, mutable_data<T>(y), p.oh,
                            p.ow,       packed,   p.s, p.stride_h,         -p.top,
                            -p.left,    epilogue, {}};
    if (run_plane_code(plane, p, multiplier)) return;
  }
  const SourceImage image(x, multiplier);
  const ChannelSource<T> source(p.k, multiplier);
  const DepthwisePass<T> pass{packed, p.r, p.s, -p.top, -p.left, p.oh, p.ow, 0};
  DepthwiseConv<T> conv = input_of<T>(image, p);
  source.set(&conv);
  set_output(&conv, y, out);
  conv.channels = p.k, conv.group = 1;
  conv.stride_h = p.stride_h, conv.stride_w = p.stride_w;
  conv.dilation_h = p.dilation_h, conv.dilation_w = p.dilation_w;
  conv.passes = &pass, conv.pass_count = 1;
  conv.epilogue = epilogue;
  if constexpr (std::is_same_v<T, float>)
    if (row_winograd_serves(conv, p.n)) set_algorithm("depthwise_winograd");
  run_images(conv, p.n, image.layout.image, out.image);
}

Tensor depthwise_conv2d_pack(const Tensor& weight_in) {
  const Tensor weight = to_compute_type(weight_in);
  require(weight.dim() == 4 && weight.size(1) == 1,
          "depthwise_conv2d_pack: weight must be [C * m, 1, R, S]");
  return with_scalar_type(weight.scalar_type(), "depthwise_conv2d_pack", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t taps = weight.size(2) * weight.size(3);
    Tensor packed = new_packed(packed_depthwise_size(weight.size(0), taps), weight.scalar_type());
    pack_depthwise<T>(weight, TapList::whole(weight.size(2), weight.size(3)),
                      mutable_data<T>(packed));
    return packed;
  });
}

// What a convolution is given beside x and the residual, in the type that is computed in.
struct DepthwiseArguments {
  OptTensor bias, scale, shift;
  int64_t activation;
  double alpha;
};

// In the memory format of x.
template <class T>
Tensor depthwise_of(const Tensor& x, const OptTensor& residual, const T* packed,
                    const DepthwiseArguments& a, const ConvShape& p) {
  const bool channels_last = follows_channels_last(x);
  const Tensor y = channels_last ? new_channels_last(p.output_size(), x.scalar_type())
                                 : new_contiguous(p.output_size(), x.scalar_type());
  OptTensor res = residual;
  if (res) res = channels_last ? as_channels_last(*res) : as_contiguous(*res);
  const FoldedEpilogue<T> epilogue({a.bias, a.scale, a.shift, res, a.activation, a.alpha}, p.k);
  forward<T>(x, packed, y, p, Layout::of(p.output_size(), channels_last), epilogue.get());
  return y;
}

// Half types, a part of the images at a time (cpu/half.h).
Tensor depthwise_of_half(const Tensor& x, const OptTensor& residual, const float* packed,
                         const DepthwiseArguments& a, const ConvShape& p) {
  const Tensor y = follows_channels_last(x) ? new_channels_last(p.output_size(), x.scalar_type())
                                            : new_contiguous(p.output_size(), x.scalar_type());
  over_image_parts(p.n, p.oh, part_row_bytes(p), may_cut_rows(p), kMemoryPartBytes,
                   [&](const ImagePart& out) {
                     const ConvPart part(p, out);
                     round_into(y, out,
                                depthwise_of<float>(widened(x, part.input), widened(residual, out),
                                                    packed, a, part.shape));
                   });
  return y;
}

Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                        const OptTensor& scale, const OptTensor& shift, const OptTensor& residual,
                        const OptTensor& packed, const IntList& stride, const IntList& padding,
                        const IntList& dilation, int64_t activation, double alpha) {
  const ScalarType type = x.scalar_type();
  const ConvShape p = depthwise_shape(sizes_of(x), sizes_of(weight), stride, padding, dilation);
  require(weight.scalar_type() == type, "depthwise_conv2d: x and weight must have one dtype");
  if (residual)
    require(sizes_of(*residual) == p.output_size() && residual->scalar_type() == type,
            "depthwise_conv2d: residual must have the shape and dtype of the output");
  check_epilogue({bias, scale, shift, residual, activation, alpha}, p.k, type);
  set_algorithm(algorithm(p));

  const DepthwiseArguments a{to_compute_type(bias), to_compute_type(scale), to_compute_type(shift),
                             activation, alpha};
  return with_scalar_type(type, "depthwise_conv2d", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t size = packed_depthwise_size(p.k, p.taps());
    if (packed)
      require(packed->numel() == size && packed->is_contiguous() &&
                  packed->scalar_type() == compute_type(type),
              "depthwise_conv2d: packed does not belong to this weight");
    const Scratch<T> own(packed ? 0 : size);
    if (!packed) pack_depthwise<T>(to_compute_type(weight), TapList::whole(p.r, p.s), own.get());
    const T* taps = packed ? data<T>(*packed) : own.get();
    if constexpr (std::is_same_v<T, float>)
      if (is_half(type)) return depthwise_of_half(x, residual, taps, a, p);
    return depthwise_of<T>(x, residual, taps, a, p);
  });
}

// The checks of all gradients.
ConvShape checked_grad_shape(const char* op, const Tensor& grad, const Tensor& other,
                             const IntList& input_size, const IntList& weight_size,
                             const IntList& stride, const IntList& padding,
                             const IntList& dilation) {
  const ConvShape p = depthwise_shape(input_size, weight_size, stride, padding, dilation);
  if (sizes_of(grad) != p.output_size())
    throw std::runtime_error(std::string(op) + ": grad must have the shape of the output");
  if (other.scalar_type() != grad.scalar_type())
    throw std::runtime_error(std::string(op) + ": all tensors must have one dtype");
  set_algorithm(algorithm(p));
  return p;
}

Tensor new_input_grad(const Tensor& grad, const Tensor& weight, const ConvShape& p) {
  const bool channels_last = follows_channels_last(grad);
  const IntList size{p.n, p.c, p.h, p.w};
  const Tensor dx = channels_last ? new_channels_last(size, grad.scalar_type())
                                  : new_contiguous(size, grad.scalar_type());
  with_scalar_type(grad.scalar_type(), "depthwise_conv2d_input_grad", [&](auto scalar) {
    using T = decltype(scalar);
    input_grad<T>(grad, weight, dx, p, Layout::of(size, channels_last));
  });
  return dx;
}

Tensor new_weight_grad(const Tensor& grad, const Tensor& x, const OptTensor& db,
                       const ConvShape& p) {
  const Tensor dw = new_contiguous({p.k, 1, p.r, p.s}, grad.scalar_type());
  with_scalar_type(grad.scalar_type(), "depthwise_conv2d_weight_grad", [&](auto scalar) {
    using T = decltype(scalar);
    weight_grad<T>(grad, x, dw, db ? mutable_data<T>(*db) : nullptr, p);
  });
  return dw;
}

Tensor depthwise_conv2d_input_grad(const Tensor& grad, const Tensor& weight,
                                   const IntList& input_size, const IntList& stride,
                                   const IntList& padding, const IntList& dilation) {
  const ConvShape p = checked_grad_shape("depthwise_conv2d_input_grad", grad, weight, input_size,
                                         sizes_of(weight), stride, padding, dilation);
  return to_type(new_input_grad(to_compute_type(grad), to_compute_type(weight), p),
                 grad.scalar_type());
}

Tensor depthwise_conv2d_weight_grad(const Tensor& grad, const Tensor& x, const IntList& weight_size,
                                    const IntList& stride, const IntList& padding,
                                    const IntList& dilation) {
  const ConvShape p = checked_grad_shape("depthwise_conv2d_weight_grad", grad, x, sizes_of(x),
                                         weight_size, stride, padding, dilation);
  return to_type(new_weight_grad(to_compute_type(grad), to_compute_type(x), {}, p),
                 grad.scalar_type());
}

// The gradients of x, weight and bias; those that `wanted` (bits 1, 2 and 4) leaves out are empty.
// All in one call: three calls cost 10 µs more, and the bias another pass over grad.
std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(
    const Tensor& grad_in, const Tensor& x_in, const Tensor& weight_in, const IntList& stride,
    const IntList& padding, const IntList& dilation, int64_t wanted) {
  const ScalarType type = grad_in.scalar_type();
  const ConvShape p = checked_grad_shape("depthwise_conv2d_backward", grad_in, x_in, sizes_of(x_in),
                                         sizes_of(weight_in), stride, padding, dilation);
  require(weight_in.scalar_type() == type,
          "depthwise_conv2d_backward: all tensors must have one dtype");
  const Tensor grad = to_compute_type(grad_in), empty = new_contiguous({0}, type);
  const bool with_weight = wanted & 2, with_bias = wanted & 4;
  Tensor dx = empty, dw = empty, db = empty;
  if (wanted & 1) dx = to_type(new_input_grad(grad, to_compute_type(weight_in), p), type);
  if (with_bias && !with_weight) db = to_type(channel_sum(grad), type);
  if (with_weight) {
    OptTensor sums;
    if (with_bias) sums = new_contiguous({p.k}, grad.scalar_type());
    dw = to_type(new_weight_grad(grad, to_compute_type(x_in), sums, p), type);
    if (sums) db = to_type(*sums, type);
  }
  return {dx, dw, db};
}

NNARCH_OPS(depthwise, ops) {
  ops.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  ops.impl("depthwise_conv2d_input_grad", TORCH_BOX(&depthwise_conv2d_input_grad));
  ops.impl("depthwise_conv2d_weight_grad", TORCH_BOX(&depthwise_conv2d_weight_grad));
  ops.impl("depthwise_conv2d_backward", TORCH_BOX(&depthwise_conv2d_backward));
  ops.impl("depthwise_conv2d_pack", TORCH_BOX(&depthwise_conv2d_pack));
}

}  // namespace
}  // namespace nnarch
