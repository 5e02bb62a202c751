// conv2d on the CPU: entry points, and the choice of the algorithm.
#include "conv2d/cpu_product.h"
#include "conv2d/cpu_shape.h"
#include "conv2d/cpu_stem.h"
#include "conv2d/cpu_weight_grad.h"
#include "conv2d/cpu_winograd_grad.h"
#include "cpu/epilogue_fold.h"
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
int64_t group_size(const ConvShape& p, int64_t tile) {
  return conv_packed_size<T>(p.group_k(), p.taps(), p.group_c(), tile);
}

template <class T>
Tensor pack_groups(const Tensor& weight, const ConvShape& p, int64_t tile) {
  const int64_t size = group_size<T>(p, tile);
  Tensor packed = new_contiguous({checked_product(size, p.groups)}, weight.scalar_type());
  for (int64_t g = 0; g < p.groups; ++g)
    conv_pack(forward_weight<T>(weight, p, g), tile, mutable_data<T>(packed) + g * size);
  return packed;
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

// How a weight that is packed for this convolution should be packed.
template <class T>
int64_t forward_tile(const ConvShape& p, bool packed) {
  if (stem_serves(p) || !winograd_serves(forward_image<T>(nullptr, p, 0))) return 0;
  return choose_tile({p.n, p.oh, p.ow, p.group_c(), p.group_k(), packed});
}

// How a packed weight was packed; throws where it does not belong to this convolution.
template <class T>
int64_t tile_of(const Tensor& packed, const ConvShape& p) {
  const bool may_be_transformed = winograd_serves(forward_image<T>(nullptr, p, 0));
  for (int64_t tile : {0, 2, 4, 5, 6})
    if (packed.numel() == p.groups * group_size<T>(p, tile) && (tile == 0 || may_be_transformed))
      return tile;
  throw std::runtime_error("conv2d: packed does not belong to this weight");
}

const char* algorithm_name(const ConvShape& p, int64_t tile) {
  switch (tile) {
    case 2: return "winograd_2x2";
    case 4: return "winograd_4x4";
    case 5: return "winograd_5x5";
    case 6: return "winograd_6x6";
    default: return p.pointwise() ? "gemm_1x1" : "implicit_gemm";
  }
}

// `packed` may be null.
template <class T>
void forward(const Tensor& x, const Tensor& weight, const T* packed, int64_t tile, const Tensor& y,
             const ConvShape& p, const Epilogue<T>& epilogue) {
  if (stem_serves(p) && tile == 0) {
    set_algorithm("stem");
    const OptTensor own = packed ? std::nullopt : OptTensor(pack_groups<T>(weight, p, 0));
    return stem_forward<T>(x, own ? data<T>(*own) : packed, mutable_data<T>(y), p, epilogue);
  }
  set_algorithm(algorithm_name(p, tile));
  const Tensor image = as_channels_last(x);
  const OutputGrid out{p.oh * p.ow * p.k, p.ow * p.k, p.k};
  for (int64_t g = 0; g < p.groups; ++g)
    conv_product<T>(forward_image<T>(data<T>(image), p, g), tile,
                    packed ? packed + g * group_size<T>(p, tile) : nullptr,
                    forward_weight<T>(weight, p, g), mutable_data<T>(y) + g * p.group_k(), out,
                    epilogue.from_channel(g * p.group_k()));
}

Tensor conv2d_pack(const Tensor& weight_in, int64_t groups, int64_t tile) {
  const Tensor weight = to_compute_type(weight_in);
  require(weight.dim() == 4 && groups > 0 && weight.size(0) % groups == 0,
          "conv2d_pack: weight must be 4-D and groups must divide its first size");
  const IntList size = sizes_of(weight);
  require(tile == 0 || ((tile == 2 || (tile >= 4 && tile <= 6)) && size[2] == 3 && size[3] == 3 &&
                        weight.scalar_type() == ScalarType::Float),
          "conv2d_pack: tile must be 0, or 2, 4, 5 or 6 for a 3x3 weight in float32");
  ConvShape p{};  // packing asks for nothing but the weight's sizes
  p.c = size[1] * groups, p.k = size[0], p.r = size[2], p.s = size[3], p.groups = groups;
  return with_scalar_type(weight.scalar_type(), "conv2d_pack", [&](auto scalar) {
    return pack_groups<decltype(scalar)>(weight, p, tile);
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
  require(!packed_in || (packed_in->is_contiguous() && packed_in->scalar_type() == x.scalar_type()),
          "conv2d: packed does not belong to this weight");
  const Tensor y = new_channels_last(p.output_size(), x.scalar_type());
  with_scalar_type(x.scalar_type(), "conv2d", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t tile = packed_in ? tile_of<T>(*packed_in, p) : forward_tile<T>(p, false);
    const FoldedEpilogue<T> epilogue({b, sc, sh, res, activation, alpha}, p.k);
    forward<T>(x, weight, packed_in ? data<T>(*packed_in) : nullptr, tile, y, p, epilogue.get());
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
  const int64_t tile =
      winograd_serves(image)
          ? choose_tile({p.n, rows.count, columns.count, view.depth, view.columns, false})
          : 0;
  T* first = dx + group * p.group_c() + (rows.first * p.w + columns.first) * p.c;
  conv_product<T>(image, tile, nullptr, view, first,
                  {p.h * p.w * p.c, p.stride_h * p.w * p.c, p.stride_w * p.c}, {});
  if (tile > 0) set_algorithm(algorithm_name(p, tile));
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

// How the weight's gradient is computed: Winograd's tile, or 0.
template <class T>
int64_t weight_grad_tile(const ConvShape& p) {
  if (!winograd_serves(forward_image<T>(nullptr, p, 0))) return 0;
  return choose_weight_grad_tile({p.n, p.oh, p.ow, p.group_c(), p.group_k(), false});
}

// The gradient of one group's outputs, as an image.
template <class T>
GridImage<T> grad_image(const T* grad, const ConvShape& p, int64_t group) {
  return {.data = grad + group * p.group_k(),
          .h = p.oh,
          .w = p.ow,
          .pixel = p.k,
          .n = p.n,
          .grid_h = p.oh,
          .grid_w = p.ow,
          .step_y = 1,
          .step_x = 1,
          .taps = {},
          .depth = p.group_k()};
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

template <class T>
void weight_grad_groups(const Tensor& grad, const Tensor& x_in, const ConvShape& p, T* dw) {
  const int64_t tile = weight_grad_tile<T>(p);
  const bool stem = stem_serves(p) && tile == 0;
  set_algorithm(stem       ? "stem_weight_grad"
                : tile > 0 ? "winograd_weight_grad"
                           : "weight_grad_gemm");
  const Tensor x = stem ? x_in : as_channels_last(x_in);
  const int64_t each = p.group_k() * p.taps() * p.group_c();
  const bool in_place = p.taps() == 1;  // then sums have the order of dw
  Scratch<T> sums(in_place ? 0 : each);
  for (int64_t g = 0; g < p.groups; ++g) {
    weight_grad_group<T>(grad, x, p, tile, g, in_place ? dw + g * each : sums.get());
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

// How conv2d_pack should pack a float32 weight for an input of this size: sizes of input and weight,
// stride, padding, dilation and groups, 4 + 4 + 2 + 4 + 2 + 1 numbers. −1: they make no convolution.
extern "C" __attribute__((visibility("default"))) int64_t nnarch_conv2d_tile(const int64_t* n) {
  using nnarch::IntList;
  try {
    return nnarch::forward_tile<float>(
        nnarch::conv_shape(IntList(n, n + 4), IntList(n + 4, n + 8), IntList(n + 8, n + 10),
                           IntList(n + 10, n + 14), IntList(n + 14, n + 16), n[16]),
        true);
  } catch (const std::exception&) {
    return -1;
  }
}
