// conv_transpose2d on the CPU: the transposed convolution and its packed weights. Its gradients are
// those of conv2d.
#include <algorithm>
#include <type_traits>

#include "conv_transpose2d/cpu_parts.h"
#include "conv_transpose2d/cpu_transposed.h"
#include "cpu/epilogue_fold.h"
#include "cpu/half.h"
#include "cpu/image_parts.h"
#include "cpu/registry.h"
#include "cpu/tensor.h"

namespace nnarch {
namespace {

constexpr const char* kForeign = "conv_transpose2d: packed does not belong to this weight";

// A packed weight begins with a line that says its layout.
constexpr int64_t kHeader = 16;

template <class T>
int64_t layout_of(const Tensor& packed, const TransposedShape& p, ScalarType type) {
  require(packed.dim() == 1 && packed.is_contiguous() && packed.numel() > kHeader &&
              packed.scalar_type() == type,
          kForeign);
  const T layout = data<T>(packed)[0];
  require(layout >= 0 && layout <= 7 && layout == static_cast<T>(static_cast<int64_t>(layout)),
          kForeign);
  const auto known = static_cast<int64_t>(layout);
  require(packed.numel() == kHeader + transposed_packed_size<T>(p, known), kForeign);
  return known;
}

// Tensors in the type that is computed in, x and the residual in the order that `layout` reads.
struct Inputs {
  Tensor x, weight;
  OptTensor residual;
};

bool is_one_pixel(const TransposedShape& p) {
  return p.h == 1 && p.w == 1 && p.top == 0 && p.left == 0 && p.oh == p.r && p.ow == p.s;
}

template <class T>
Tensor forward(const Tensor& x, const Tensor& weight, const OptTensor& residual, const T* packed,
               int64_t layout, const TransposedShape& p, const EpilogueTensors& tensors) {
  require(layout != kPixel || is_one_pixel(p), kForeign);
  require(layout != kTaps || taps_serve(p, sizeof(T) == sizeof(float)), kForeign);
  const bool pixel = layout == kPixel;
  const Tensor y = pixel ? new_contiguous(p.output_size(), x.scalar_type())
                         : new_channels_last(p.output_size(), x.scalar_type());
  set_algorithm(transposed_algorithm(p, layout));
  if (y.numel() == 0) return y;
  const Tensor image = pixel ? as_contiguous(x) : as_channels_last(x);
  const OptTensor res = !residual ? std::nullopt
                        : pixel   ? OptTensor(as_contiguous(*residual))
                                  : OptTensor(as_channels_last(*residual));
  const FoldedEpilogue<T> epilogue(
      {tensors.bias, tensors.scale, tensors.shift, res, tensors.activation, tensors.alpha}, p.k);
  transposed<T>(data<T>(image), weight, packed, layout, mutable_data<T>(y), p, epilogue.get());
  return y;
}

// A part of the images at a time, where they are of half types or large and planar.
template <class T>
Tensor transposed_in_parts(const Tensor& x, const Tensor& weight, const OptTensor& residual,
                           const T* packed, int64_t layout, const TransposedShape& p,
                           const EpilogueTensors& tensors) {
  const bool half = is_half(x.scalar_type());
  const bool channels_last = StayChannelsLast::holds() || follows_channels_last(x);
  const Tensor y = channels_last ? new_channels_last(p.output_size(), x.scalar_type())
                                 : new_contiguous(p.output_size(), x.scalar_type());
  const int64_t row_bytes = part_row_bytes(p), most = half ? kPartBytes : kFloatPartBytes;
  OptTensor own;
  if (!packed && p.n * p.oh * row_bytes > most) {  // for all parts
    own = new_contiguous({transposed_packed_size<T>(p, layout)}, weight.scalar_type());
    pack_transposed<T>(weight, p, layout, mutable_data<T>(*own));
    packed = data<T>(*own);
  }
  const auto read = [&](const Tensor& t, const ImagePart& part) {
    return half ? widened(t, part) : part_channels_last(t, part);
  };
  over_image_parts(p.n, p.oh, row_bytes, layout != kPixel, most, [&](const ImagePart& rows) {
    const TransposedPart part(p, rows);
    const OptTensor added = residual ? OptTensor(read(*residual, rows)) : std::nullopt;
    const Tensor of_part =
        forward<T>(read(x, part.input), weight, added, packed, layout, part.shape, tensors);
    if (half)
      round_into(y, rows, of_part);
    else
      put_planar(y, rows, of_part);
  });
  return y;
}

Tensor conv_transpose2d(const Tensor& x, const Tensor& weight_in, const OptTensor& bias,
                        const OptTensor& scale, const OptTensor& shift, const OptTensor& residual,
                        const OptTensor& packed, const IntList& stride, const IntList& padding,
                        const IntList& output_padding, const IntList& dilation, int64_t groups,
                        int64_t activation, double alpha) {
  const ScalarType type = x.scalar_type();
  require(weight_in.scalar_type() == type, "conv_transpose2d: x and weight must have one dtype");
  const TransposedShape p = transposed_shape(sizes_of(x), sizes_of(weight_in), stride, padding,
                                             output_padding, dilation, groups);
  if (residual)
    require(sizes_of(*residual) == p.output_size() && residual->scalar_type() == type,
            "conv_transpose2d: residual must have the shape and dtype of the output");
  check_epilogue({bias, scale, shift, residual, activation, alpha}, p.k, type);
  std::optional<StayChannelsLast> stay;
  if (follows_channels_last(x, weight_in)) stay.emplace();
  const Tensor weight = packed ? weight_in : to_compute_type(weight_in);
  const OptTensor b = to_compute_type(bias), sc = to_compute_type(scale),
                  sh = to_compute_type(shift);
  return with_scalar_type(type, "conv_transpose2d", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t layout = packed ? layout_of<T>(*packed, p, compute_type(type))
                                  : choose_layout(p, sizeof(T) == sizeof(float), false);
    const T* from = packed ? data<T>(*packed) + kHeader : nullptr;
    const EpilogueTensors tensors{b, sc, sh, residual, activation, alpha};
    const bool large = layout != kPixel && goes_in_parts(x, p.n * p.oh * part_row_bytes(p));
    if (is_half(type) || large)
      return transposed_in_parts<T>(x, weight, residual, from, layout, p, tensors);
    const Tensor y = forward<T>(x, weight, residual, from, layout, p, tensors);
    return stay ? as_channels_last(y) : in_format_of(y, x);
  });
}

// Packing asks for nothing but the weight's sizes and the steps.
TransposedShape weight_shape(const IntList& weight, const IntList& stride, const IntList& dilation,
                             int64_t groups) {
  require(weight.size() == 4 && groups > 0 && weight[0] % groups == 0,
          "conv_transpose2d_pack: weight must be 4-D and groups must divide its first size");
  require(stride.size() == 2 && dilation.size() == 2 && stride[0] > 0 && stride[1] > 0 &&
              dilation[0] > 0 && dilation[1] > 0,
          "conv_transpose2d_pack: stride and dilation must be 2 positive numbers");
  TransposedShape p{};
  p.c = weight[0], p.k = checked_product(weight[1], groups), p.r = weight[2], p.s = weight[3];
  p.stride_h = stride[0], p.stride_w = stride[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1], p.groups = groups;
  return p;
}

Tensor conv_transpose2d_pack(const Tensor& weight_in, const IntList& stride,
                             const IntList& dilation, int64_t groups, int64_t layout) {
  const Tensor weight = to_compute_type(weight_in);
  const TransposedShape p = weight_shape(sizes_of(weight), stride, dilation, groups);
  require(is_layout(layout) && (layout == kPhases || layout == kPixel || layout == kTaps ||
                                weight.scalar_type() == ScalarType::Float),
          "conv_transpose2d_pack: layout must be 0 to 7, and 2 to 6 need float32");
  require(layout != kTaps || groups == 1, "conv_transpose2d_pack: layout 7 is for one group");
  return with_scalar_type(weight.scalar_type(), "conv_transpose2d_pack", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t size = transposed_packed_size<T>(p, layout);
    const Tensor packed = new_packed(checked_sum(size, kHeader), weight.scalar_type());
    T* to = mutable_data<T>(packed);
    std::fill_n(to, kHeader, T{0});
    to[0] = static_cast<T>(layout);
    if (size > 0) pack_transposed<T>(weight, p, layout, to + kHeader);
    return packed;
  });
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(conv_transpose2d, ops) {
  ops.impl("conv_transpose2d", TORCH_BOX(&nnarch::conv_transpose2d));
  ops.impl("conv_transpose2d_pack", TORCH_BOX(&nnarch::conv_transpose2d_pack));
}

// How conv_transpose2d_pack should pack a weight for an input of this size: whether it is float64,
// then sizes of input and weight, stride, padding, output padding, dilation and groups, 1 + 4 + 4 +
// 2 + 2 + 2 + 2 + 1 numbers. −1: they make no transposed convolution.
extern "C" __attribute__((visibility("default"))) int64_t
nnarch_conv_transpose2d_layout(const int64_t* n) {
  using nnarch::IntList;
  try {
    return nnarch::choose_layout(
        nnarch::transposed_shape(IntList(n + 1, n + 5), IntList(n + 5, n + 9),
                                 IntList(n + 9, n + 11), IntList(n + 11, n + 13),
                                 IntList(n + 13, n + 15), IntList(n + 15, n + 17), n[17]),
        n[0] == 0, true);
  } catch (const std::exception&) {
    return -1;
  }
}
