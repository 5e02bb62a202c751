// conv2d on the CPU: entry points, and the choice of the algorithm.
#include "conv2d/cpu_shape.h"
#include "conv2d/cpu_stem.h"
#include "conv2d/cpu_weight_grad.h"
#include "cpu/epilogue_fold.h"
#include "cpu/gather_gemm.h"
#include "cpu/pack_weight.h"
#include "cpu/registry.h"
#include "cpu/tensor.h"

namespace nnarch {
namespace {

std::vector<Tap> forward_taps(const ConvShape& p) {
  std::vector<Tap> taps;
  for (int64_t r = 0; r < p.r; ++r)
    for (int64_t s = 0; s < p.s; ++s)
      taps.push_back({r * p.dilation_h - p.top, s * p.dilation_w - p.left});
  return taps;
}

// The weight of one group with output channels as columns.
template <class T>
WeightView<T> forward_weight(const Tensor& weight, const ConvShape& p, int64_t group) {
  WeightView<T> view{.data = data<T>(weight) + group * p.group_k() * weight.stride(0),
                     .columns = p.group_k(),
                     .depth = p.group_c(),
                     .column_stride = weight.stride(0),
                     .depth_stride = weight.stride(1),
                     .tap_offset = {}};
  for (int64_t r = 0; r < p.r; ++r)
    for (int64_t s = 0; s < p.s; ++s)
      view.tap_offset.push_back(r * weight.stride(2) + s * weight.stride(3));
  return view;
}

template <class T>
void pack_groups(const Tensor& weight, const ConvShape& p, T* dst) {
  const int64_t size = packed_size<T>(p.group_k(), p.taps(), p.group_c());
  for (int64_t g = 0; g < p.groups; ++g)
    pack_weight(forward_weight<T>(weight, p, g), dst + g * size);
}

// The image of a forward convolution as seen by one group.
template <class T>
GridImage<T> forward_image(const T* x, const ConvShape& p, int64_t group) {
  GridImage<T> image{.data = x + group * p.group_c(),
                     .h = p.h,
                     .w = p.w,
                     .pixel = p.c,
                     .n = p.n,
                     .grid_h = p.oh,
                     .grid_w = p.ow,
                     .step_y = p.stride_h,
                     .step_x = p.stride_w,
                     .taps = forward_taps(p),
                     .depth = p.group_c()};
  if (p.pointwise()) {  // every pixel for itself: one long row
    image.h = image.grid_h = image.n = 1;
    image.w = image.grid_w = p.n * p.h * p.w;
  }
  return image;
}

template <class T>
void forward(const Tensor& x, const T* packed, const Tensor& y, const ConvShape& p,
             const Epilogue<T>& epilogue) {
  if (stem_serves(p)) {
    set_algorithm("stem");
    return stem_forward<T>(x, packed, mutable_data<T>(y), p, epilogue);
  }
  set_algorithm(p.pointwise() ? "gemm_1x1" : "implicit_gemm");
  const Tensor image = as_channels_last(x);
  const int64_t size = packed_size<T>(p.group_k(), p.taps(), p.group_c());
  const OutputGrid out{p.oh * p.ow * p.k, p.ow * p.k, p.k};
  for (int64_t g = 0; g < p.groups; ++g)
    gather_gemm<T>(forward_image<T>(data<T>(image), p, g), packed + g * size, p.group_k(),
                   mutable_data<T>(y) + g * p.group_k(), out,
                   epilogue.from_channel(g * p.group_k()));
}

Tensor conv2d_pack(const Tensor& weight_in, int64_t groups) {
  const Tensor weight = to_compute_type(weight_in);
  require(weight.dim() == 4 && groups > 0 && weight.size(0) % groups == 0,
          "conv2d_pack: weight must be 4-D and groups must divide its first size");
  const IntList size = sizes_of(weight);
  ConvShape p{};  // packing asks for nothing but the weight's sizes
  p.c = size[1] * groups, p.k = size[0], p.r = size[2], p.s = size[3], p.groups = groups;
  return with_scalar_type(weight.scalar_type(), "conv2d_pack", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t each = packed_size<T>(p.group_k(), p.taps(), p.group_c());
    Tensor packed = new_contiguous({checked_product(each, groups)}, weight.scalar_type());
    pack_groups<T>(weight, p, mutable_data<T>(packed));
    return packed;
  });
}

Tensor conv2d(const Tensor& x_in, const Tensor& weight_in, const OptTensor& bias,
              const OptTensor& scale, const OptTensor& shift, const OptTensor& residual,
              const OptTensor& packed_in, const IntList& stride, const IntList& padding,
              const IntList& dilation, int64_t groups, int64_t activation, double alpha) {
  const ScalarType type = x_in.scalar_type();
  require(weight_in.scalar_type() == type, "conv2d: x and weight must have one dtype");
  const ConvShape p =
      conv_shape(sizes_of(x_in), sizes_of(weight_in), stride, padding, dilation, groups);
  if (residual)
    require(sizes_of(*residual) == p.output_size() && residual->scalar_type() == type,
            "conv2d: residual must have the shape and dtype of the output");
  check_epilogue({bias, scale, shift, residual, activation, alpha}, p.k, type);
  const Tensor x = to_compute_type(x_in), weight = to_compute_type(weight_in);
  const OptTensor b = to_compute_type(bias), sc = to_compute_type(scale),
                  sh = to_compute_type(shift);
  const OptTensor res =
      residual ? OptTensor(as_channels_last(to_compute_type(*residual))) : std::nullopt;
  const Tensor y = new_channels_last(p.output_size(), x.scalar_type());
  with_scalar_type(x.scalar_type(), "conv2d", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t size = p.groups * packed_size<T>(p.group_k(), p.taps(), p.group_c());
    const bool usable = packed_in && packed_in->numel() == size && packed_in->is_contiguous() &&
                        packed_in->scalar_type() == x.scalar_type();
    require(usable || !packed_in, "conv2d: packed does not belong to this weight");
    const Tensor packed = usable ? *packed_in : conv2d_pack(weight, groups);
    const FoldedEpilogue<T> epilogue({b, sc, sh, res, activation, alpha}, p.k);
    forward<T>(x, data<T>(packed), y, p, epilogue.get());
  });
  return to_type(in_format_of(y, x_in), type);
}

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
    for (int64_t r = 0; r < kernel; ++r) {
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
  GridImage<T> image{.data = grad + group * p.group_k(),
                     .h = p.oh,
                     .w = p.ow,
                     .pixel = p.k,
                     .n = p.n,
                     .grid_h = rows.count,
                     .grid_w = columns.count,
                     .step_y = 1,
                     .step_x = 1,
                     .taps = {},
                     .depth = p.group_k()};
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
  const Tensor packed =
      new_contiguous({packed_size<T>(view.columns, view.taps(), view.depth)}, weight.scalar_type());
  pack_weight(view, mutable_data<T>(packed));
  T* first = dx + group * p.group_c() + (rows.first * p.w + columns.first) * p.c;
  gather_gemm<T>(image, data<T>(packed), p.group_c(), first,
                 {p.h * p.w * p.c, p.stride_h * p.w * p.c, p.stride_w * p.c}, {});
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
        for (int64_t g = 0; g < p.groups; ++g)
          input_grad_phase<T>(data<T>(grad), weight, mutable_data<T>(dx), p, g, rows, columns);
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

template <class T>
void weight_grad_group(const Tensor& grad, const Tensor& x, const ConvShape& p, int64_t group,
                       T* sums) {
  const GradView<T> view{data<T>(grad) + group * p.group_k(), p.k, p.n * p.oh * p.ow, p.group_k()};
  if (stem_serves(p))
    return weight_grad<T>(
        view, p.r, p.s * p.c, [&] { return StemRows<T>(x, p, WeightGradPlan::positions); }, sums);
  const GridImage<T> image = forward_image<T>(data<T>(x), p, group);
  weight_grad<T>(
      view, p.taps(), p.group_c(), [&] { return TapRows<T>(image, WeightGradPlan::positions); },
      sums);
}

template <class T>
void weight_grad_groups(const Tensor& grad, const Tensor& x_in, const ConvShape& p, T* dw) {
  const bool stem = stem_serves(p);
  set_algorithm(stem ? "stem_weight_grad" : "weight_grad_gemm");
  const Tensor x = stem ? x_in : as_channels_last(x_in);
  const int64_t each = p.group_k() * p.taps() * p.group_c();
  const bool in_place = p.taps() == 1;  // then sums have the order of dw
  Scratch<T> sums(in_place ? 0 : each);
  for (int64_t g = 0; g < p.groups; ++g) {
    weight_grad_group<T>(grad, x, p, g, in_place ? dw + g * each : sums.get());
    if (!in_place) unpack_weight_grad(sums.get(), p, dw + g * each);
  }
}

Tensor conv2d_weight_grad(const Tensor& grad_in, const Tensor& x_in, const IntList& weight_size,
                          const IntList& stride, const IntList& padding, const IntList& dilation,
                          int64_t groups) {
  const ScalarType type = grad_in.scalar_type();
  require(x_in.scalar_type() == type, "conv2d_weight_grad: grad and x must have one dtype");
  const ConvShape p = conv_shape(sizes_of(x_in), weight_size, stride, padding, dilation, groups);
  require(sizes_of(grad_in) == p.output_size(),
          "conv2d_weight_grad: grad must have the shape of the output");
  const Tensor grad = as_channels_last(to_compute_type(grad_in));
  const Tensor dw = new_contiguous(weight_size, grad.scalar_type());
  with_scalar_type(grad.scalar_type(), "conv2d_weight_grad", [&](auto scalar) {
    using T = decltype(scalar);
    if (dw.numel() > 0) weight_grad_groups<T>(grad, to_compute_type(x_in), p, mutable_data<T>(dw));
  });
  return to_type(dw, type);
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(conv2d, ops) {
  ops.impl("conv2d", TORCH_BOX(&nnarch::conv2d));
  ops.impl("conv2d_input_grad", TORCH_BOX(&nnarch::conv2d_input_grad));
  ops.impl("conv2d_weight_grad", TORCH_BOX(&nnarch::conv2d_weight_grad));
  ops.impl("conv2d_pack", TORCH_BOX(&nnarch::conv2d_pack));
}
