// Depthwise convolution on the CPU: forward and input gradient.
#include <numeric>

#include "cpu/epilogue_fold.h"
#include "cpu/registry.h"
#include "cpu/streaming.h"
#include "depthwise/cpu_image.h"
#include "depthwise/cpu_plan.h"
#include "depthwise/cpu_weight_grad.h"

namespace nnarch {
namespace {

// Runs a convolution that is given for its first image on all of them.
template <class T>
void run_images(const DepthwiseConv<T>& conv, int64_t images, int64_t x_image, int64_t y_image) {
  const DepthwisePlanner<T> planner(conv, images, /*weight_grad=*/false);
  DepthwisePlan plan = planner.plan();
  const DepthwisePass<T>& pass = *conv.passes;
  plan.stream = plan.blocks && conv.y_channel == 1 && conv.epilogue.activation <= kRelu6 &&
                outgrows_caches(conv.y, images * pass.oh * pass.ow, conv.channels);
  const bool staged = conv.y_channel != 1 || conv.group > 1;
  const bool residual_staged = conv.epilogue.residual && conv.y_channel != 1;
  const auto run = NNARCH_SELECT(depthwise_run<T>());
  parallel_tasks(images * planner.tasks(), [&](int64_t i) {
    const Scratch<T> tile(plan.tile_size()), stage(staged ? plan.stage_size() : 0),
        residual(residual_staged ? plan.stage_size() : 0);
    const Scratch<const T*> rows(planner.row_pointers());
    const int64_t image = i / planner.tasks();
    DepthwiseConv<T> mine = conv;
    mine.x += image * x_image;
    mine.y += image * y_image;
    if (mine.epilogue.residual) mine.epilogue.residual += image * y_image;
    run(mine, plan, planner.task(i % planner.tasks()),
        {tile.get(), staged ? stage.get() : nullptr, residual_staged ? residual.get() : nullptr,
         rows.get()});
  });
}

// `plane`: the first one. Each of `inputs` planes gives `multiplier` planes of the output, in
// every image; packed weights and the epilogue start at channel 0.
template <class T>
void run_planes(const DepthwisePlane<T>& plane, int64_t images, int64_t inputs,
                int64_t multiplier) {
  const int64_t channels = inputs * multiplier, taps = plane.s * plane.s;
  const int64_t work = std::max<int64_t>(1, plane.oh * plane.ow * taps);
  const int64_t share = std::max<int64_t>(1, kTaskWork / work), planes = images * channels;
  const auto run = NNARCH_SELECT(depthwise_plane_run<T>());
  parallel_tasks(ceil_div(planes, share), [&](int64_t task) {
    for (int64_t i = task * share; i < std::min(planes, (task + 1) * share); ++i) {
      const int64_t k = i % channels;
      DepthwisePlane<T> mine = plane;
      mine.x += i / multiplier * plane.h * plane.w;
      mine.y += i * plane.oh * plane.ow;
      mine.weight += k / kDepthwiseBlock * taps * kDepthwiseBlock + k % kDepthwiseBlock;
      mine.epilogue = plane.epilogue.from_channel(k);
      if (plane.epilogue.residual)
        mine.epilogue.residual = plane.epilogue.residual + i * plane.oh * plane.ow;
      run(mine);
    }
  });
}

const char* algorithm(const ConvShape& p) {
  if (p.r == p.s && p.stride_w / std::gcd(p.stride_w, p.dilation_w) <= 2) {
    if (p.s == 3) return "depthwise_3x3";
    if (p.s == 5) return "depthwise_5x5";
    if (p.s == 7) return "depthwise_7x7";
  }
  return "depthwise_general";
}

template <class T>
void set_output(DepthwiseConv<T>* conv, const Tensor& y, const Layout& layout) {
  conv->y = mutable_data<T>(y);
  conv->y_row = layout.row, conv->y_pixel = layout.pixel, conv->y_channel = layout.channel;
}

template <class T>
void forward(const Tensor& x, const T* packed, const Tensor& y, const ConvShape& p,
             const Layout& out, const Epilogue<T>& epilogue) {
  const int64_t multiplier = p.k / p.c;
  if (is_planar(x) && out.pixel == 1 && has_plane_code(p))
    return run_planes<T>({data<T>(x), p.h, p.w, mutable_data<T>(y), p.oh, p.ow, packed, p.s,
                          p.stride_h, -p.top, -p.left, epilogue},
                         p.n, p.c, multiplier);
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
  run_images(conv, p.n, image.layout.image, out.image);
}

Tensor depthwise_conv2d_pack(const Tensor& weight_in) {
  const Tensor weight = to_compute_type(weight_in);
  require(weight.dim() == 4 && weight.size(1) == 1,
          "depthwise_conv2d_pack: weight must be [C * m, 1, R, S]");
  return with_scalar_type(weight.scalar_type(), "depthwise_conv2d_pack", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t taps = weight.size(2) * weight.size(3);
    Tensor packed =
        new_contiguous({packed_depthwise_size(weight.size(0), taps)}, weight.scalar_type());
    pack_depthwise<T>(weight, TapList::whole(weight.size(2), weight.size(3)),
                      mutable_data<T>(packed));
    return packed;
  });
}

Tensor depthwise_conv2d(const Tensor& x_in, const Tensor& weight_in, const OptTensor& bias,
                        const OptTensor& scale, const OptTensor& shift, const OptTensor& residual,
                        const OptTensor& packed, const IntList& stride, const IntList& padding,
                        const IntList& dilation, int64_t activation, double alpha) {
  const ScalarType type = x_in.scalar_type();
  const ConvShape p =
      depthwise_shape(sizes_of(x_in), sizes_of(weight_in), stride, padding, dilation);
  require(weight_in.scalar_type() == type, "depthwise_conv2d: x and weight must have one dtype");
  if (residual)
    require(sizes_of(*residual) == p.output_size() && residual->scalar_type() == type,
            "depthwise_conv2d: residual must have the shape and dtype of the output");
  check_epilogue({bias, scale, shift, residual, activation, alpha}, p.k, type);
  set_algorithm(algorithm(p));

  const Tensor x = to_compute_type(x_in), weight = to_compute_type(weight_in);
  const OptTensor b = to_compute_type(bias), sc = to_compute_type(scale),
                  sh = to_compute_type(shift);
  const bool channels_last = follows_channels_last(x_in);
  const Tensor y = channels_last ? new_channels_last(p.output_size(), x.scalar_type())
                                 : new_contiguous(p.output_size(), x.scalar_type());
  OptTensor res = to_compute_type(residual);
  if (res) res = channels_last ? as_channels_last(*res) : as_contiguous(*res);
  with_scalar_type(x.scalar_type(), "depthwise_conv2d", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t size = packed_depthwise_size(p.k, p.taps());
    if (packed)
      require(packed->numel() == size && packed->is_contiguous() &&
                  packed->scalar_type() == x.scalar_type(),
              "depthwise_conv2d: packed does not belong to this weight");
    const Scratch<T> own(packed ? 0 : size);
    if (!packed) pack_depthwise<T>(weight, TapList::whole(p.r, p.s), own.get());
    const FoldedEpilogue<T> epilogue({b, sc, sh, res, activation, alpha}, p.k);
    forward<T>(x, packed ? data<T>(*packed) : own.get(), y, p,
               Layout::of(p.output_size(), channels_last), epilogue.get());
  });
  return to_type(y, type);
}

// The input gradient is a convolution of grad by the flipped kernel. With a stride, the input
// positions fall into phases, each reached by some of the taps only: no product with a zero.
template <class T>
void input_grad(const Tensor& grad, const Tensor& weight, const Tensor& dx, const ConvShape& p,
                const Layout& out) {
  const auto rows = gradient_phases(p.h, p.stride_h, p.top, p.r, p.dilation_h);
  const auto columns = gradient_phases(p.w, p.stride_w, p.left, p.s, p.dilation_w);
  const Scratch<T> packed(packed_depthwise_size(p.k, p.taps()));
  std::vector<DepthwisePass<T>> passes;
  T* next = packed.get();
  for (const Phase& row : rows)
    for (const Phase& column : columns) {
      const TapList taps{row.taps, column.taps};
      const bool none = taps.count() == 0;
      pack_depthwise<T>(weight, taps, next);
      passes.push_back({next, none ? 0 : static_cast<int64_t>(row.taps.size()),
                        none ? 0 : static_cast<int64_t>(column.taps.size()), row.offset,
                        column.offset, row.count, column.count,
                        row.first * out.row + column.first * out.pixel});
      next += packed_depthwise_size(p.k, taps.count());
    }

  if (is_planar(grad) && out.pixel == 1 && has_plane_code(p) && p.stride_h == 1 && p.k == p.c) {
    const DepthwisePass<T>& pass = passes.front();
    return run_planes<T>({data<T>(grad),
                          p.oh,
                          p.ow,
                          mutable_data<T>(dx),
                          p.h,
                          p.w,
                          pass.weight,
                          p.s,
                          1,
                          pass.row,
                          pass.column,
                          {}},
                         p.n, p.c, 1);
  }
  const SourceImage image(grad, 1);
  DepthwiseConv<T> conv = input_of<T>(image, p);
  conv.h = p.oh, conv.w = p.ow, conv.x_channels = p.k;
  set_output(&conv, dx, out);
  conv.y_row *= p.stride_h, conv.y_pixel *= p.stride_w;
  conv.channels = p.k, conv.group = p.k / p.c;
  conv.stride_h = conv.stride_w = 1;
  conv.dilation_h = p.dilation_h / std::gcd(p.dilation_h, p.stride_h);
  conv.dilation_w = p.dilation_w / std::gcd(p.dilation_w, p.stride_w);
  conv.passes = passes.data(), conv.pass_count = static_cast<int64_t>(passes.size());
  run_images(conv, p.n, image.layout.image, out.image);
}

Tensor depthwise_conv2d_input_grad(const Tensor& grad_in, const Tensor& weight_in,
                                   const IntList& input_size, const IntList& stride,
                                   const IntList& padding, const IntList& dilation) {
  const ScalarType type = grad_in.scalar_type();
  const ConvShape p = depthwise_shape(input_size, sizes_of(weight_in), stride, padding, dilation);
  require(sizes_of(grad_in) == p.output_size(),
          "depthwise_conv2d_input_grad: grad must have the shape of the output");
  require(weight_in.scalar_type() == type,
          "depthwise_conv2d_input_grad: grad and weight must have one dtype");
  set_algorithm(algorithm(p));
  const Tensor grad = to_compute_type(grad_in), weight = to_compute_type(weight_in);
  const bool channels_last = follows_channels_last(grad_in);
  const Tensor dx = channels_last ? new_channels_last(input_size, grad.scalar_type())
                                  : new_contiguous(input_size, grad.scalar_type());
  with_scalar_type(grad.scalar_type(), "depthwise_conv2d_input_grad", [&](auto scalar) {
    using T = decltype(scalar);
    input_grad<T>(grad, weight, dx, p, Layout::of(input_size, channels_last));
  });
  return to_type(dx, type);
}

Tensor depthwise_conv2d_weight_grad(const Tensor& grad_in, const Tensor& x_in,
                                    const IntList& weight_size, const IntList& stride,
                                    const IntList& padding, const IntList& dilation) {
  const ScalarType type = grad_in.scalar_type();
  const ConvShape p = depthwise_shape(sizes_of(x_in), weight_size, stride, padding, dilation);
  require(sizes_of(grad_in) == p.output_size(),
          "depthwise_conv2d_weight_grad: grad must have the shape of the output");
  require(x_in.scalar_type() == type,
          "depthwise_conv2d_weight_grad: grad and x must have one dtype");
  set_algorithm(algorithm(p));
  const Tensor grad = to_compute_type(grad_in), x = to_compute_type(x_in);
  const Tensor dw = new_contiguous(weight_size, grad.scalar_type());
  with_scalar_type(grad.scalar_type(), "depthwise_conv2d_weight_grad", [&](auto scalar) {
    using T = decltype(scalar);
    weight_grad<T>(grad, x, dw, p);
  });
  return to_type(dw, type);
}

NNARCH_OPS(depthwise, ops) {
  ops.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  ops.impl("depthwise_conv2d_input_grad", TORCH_BOX(&depthwise_conv2d_input_grad));
  ops.impl("depthwise_conv2d_weight_grad", TORCH_BOX(&depthwise_conv2d_weight_grad));
  ops.impl("depthwise_conv2d_pack", TORCH_BOX(&depthwise_conv2d_pack));
}

}  // namespace
}  // namespace nnarch
