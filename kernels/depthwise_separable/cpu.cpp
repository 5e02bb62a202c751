// Depthwise-separable convolutions and inverted residuals on the CPU: checks, and the choice
// between one fused kernel and a kernel a stage.
#include <optional>

#include "conv2d/cpu_parts.h"
#include "cpu/epilogue_fold.h"
#include "cpu/half.h"
#include "cpu/image_parts.h"
#include "cpu/pack_weight.h"
#include "cpu/registry.h"
#include "cpu/tensor.h"
#include "depthwise/cpu_weight_grad.h"
#include "depthwise_separable/cpu_fused.h"

namespace nnarch {
namespace {

// Values that a stage keeps in scratch memory for the next one, at most; more come from the pool.
constexpr int64_t kScratchBytes = int64_t{1} << 20;

struct StageTensors {
  const char* op;  // the operation's name, for errors
  Tensor weight;
  OptTensor scale, shift, packed;
  int64_t activation;
  double alpha;

  StageTensors computed() const {
    return {op,
            to_compute_type(weight),
            to_compute_type(scale),
            to_compute_type(shift),
            packed,
            activation,
            alpha};
  }
};

// The packed weight of a stage, or null where it is not packed yet.
template <class T>
const T* given(const StageTensors& stage, int64_t size) {
  if (!stage.packed) return nullptr;
  const Tensor& packed = *stage.packed;
  if (packed.scalar_type() == ScalarType::BFloat16) return nullptr;  // in pairs (cpu/pairs.h)
  if (packed.numel() != size || !packed.is_contiguous() ||
      packed.scalar_type() != stage.weight.scalar_type())
    throw std::runtime_error(std::string(stage.op) + ": packed does not belong to its weight");
  return data<T>(packed);
}

// Whether a weight is packed for Strassen's product.
template <class T>
bool packed_for_pairs(const StageTensors& stage, int64_t columns, int64_t depth) {
  return std::is_same_v<T, float> && stage.packed &&
         stage.packed->scalar_type() == ScalarType::Float && strassen_serves(columns, depth) &&
         stage.packed->numel() == strassen_packed_size(columns, depth);
}

// A weight of a 1x1 convolution, packed now unless it is already.
template <class T>
class Pointwise {
 public:
  Pointwise(const StageTensors& stage, int64_t columns, int64_t depth)
      : pairs_(packed_for_pairs<T>(stage, columns, depth)),
        packed_(given<T>(stage, pairs_ ? strassen_packed_size(columns, depth)
                                       : packed_size<T>(columns, 1, depth))),
        own_(packed_ ? 0 : packed_size<T>(columns, 1, depth)) {
    if (packed_) return;
    const Tensor& w = stage.weight;
    pack_weight<T>({data<T>(w), columns, depth, w.stride(0), w.stride(1), {0}}, own_.get());
    packed_ = own_.get();
  }
  const T* get() const { return packed_; }
  bool pairs() const { return pairs_; }

 private:
  const bool pairs_;
  const T* packed_;
  Scratch<T> own_;
};

template <class T>
class Depthwise {
 public:
  Depthwise(const StageTensors& stage, const ConvShape& p)
      : packed_(given<T>(stage, packed_depthwise_size(p.k, p.taps()))),
        own_(packed_ ? 0 : packed_depthwise_size(p.k, p.taps())) {
    if (packed_) return;
    pack_depthwise<T>(stage.weight, TapList::whole(p.r, p.s), own_.get());
    packed_ = own_.get();
  }
  const T* get() const { return packed_; }

 private:
  const T* packed_;
  Scratch<T> own_;
};

template <class T>
void run_stages_in_memory(const SeparableConv<T>& s, const SeparablePlanner<T>& planner,
                          ScalarType type) {
  const int64_t pixels = s.p.n * s.plane(), pitch = planner.pitch();
  const int64_t count = checked_product(pixels, pitch);
  if (count * static_cast<int64_t>(sizeof(T)) <= kScratchBytes) {
    const Scratch<T> values(count);
    return run_stages(s, values.get(), pitch);
  }
  const Tensor values = new_contiguous({pixels, pitch}, type);
  run_stages(s, mutable_data<T>(values), pitch);
}

template <class T>
void run_separable(const SeparableConv<T>& s, ScalarType type) {
  const SeparablePlanner<T> planner(s);
  const SeparablePlan plan = planner.plan();
  if (plan.fused) {
    set_algorithm(plan.expanded ? "fused_expand_depthwise_project" : "fused_depthwise_project");
    return run_fused(s, plan, planner);
  }
  if (s.in == 0) {
    set_algorithm("stages");
    return run_stages_in_memory(s, planner, type);
  }
  const Tensor wide = new_channels_last(s.p.input_size(), type);
  const int64_t pixels = s.p.n * s.p.h * s.p.w;
  gather_gemm<T>(positions_of<T>(s.x, 1, pixels, s.in, s.in), s.expand.packed, s.p.c,
                 mutable_data<T>(wide), {0, 0, s.p.c}, s.expand.epilogue);
  SeparableConv<T> rest = s;
  rest.in = 0, rest.x = data<T>(wide);
  run_separable(rest, type);
}

void check_stage(const StageTensors& stage, int64_t channels, ScalarType type) {
  require(stage.weight.scalar_type() == type, "x and weights must have one dtype");
  check_epilogue(
      {std::nullopt, stage.scale, stage.shift, std::nullopt, stage.activation, stage.alpha},
      channels, type);
}

void check_pointwise(const Tensor& weight, int64_t depth) {
  require(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == depth &&
              weight.size(2) == 1 && weight.size(3) == 1,
          "the weight of a 1x1 convolution does not fit");
}

template <class T>
FoldedEpilogue<T> fold(const StageTensors& stage, const OptTensor& residual, int64_t channels) {
  return FoldedEpilogue<T>(
      {std::nullopt, stage.scale, stage.shift, residual, stage.activation, stage.alpha}, channels);
}

// `expand` may be null.
Tensor separable(const Tensor& x, const StageTensors* expand_in, const StageTensors& depthwise_in,
                 const StageTensors& project_in, const OptTensor& residual, const IntList& stride,
                 const IntList& padding, const IntList& dilation) {
  const ScalarType type = x.scalar_type();
  require(x.dim() == 4, "x must be 4-D");
  IntList wide = sizes_of(x);
  if (expand_in) {
    check_pointwise(expand_in->weight, wide[1]);
    wide[1] = expand_in->weight.size(0);
    check_stage(*expand_in, wide[1], type);
  }
  const ConvShape p =
      depthwise_shape(wide, sizes_of(depthwise_in.weight), stride, padding, dilation);
  check_stage(depthwise_in, p.k, type);
  check_pointwise(project_in.weight, p.k);
  const int64_t out = project_in.weight.size(0);
  check_stage(project_in, out, type);
  const IntList size{p.n, out, p.oh, p.ow};
  if (residual)
    require(sizes_of(*residual) == size && residual->scalar_type() == type,
            "residual must have the shape and dtype of the output");

  const StageTensors depthwise = depthwise_in.computed(), project = project_in.computed();
  const StageTensors expand = expand_in ? expand_in->computed() : StageTensors(project);
  const int64_t in = expand_in ? x.size(1) : 0;
  return with_scalar_type(type, "depthwise_separable_conv2d", [&](auto scalar) {
    using T = decltype(scalar);
    const Depthwise<T> depthwise_weight(depthwise, p);
    const Pointwise<T> project_weight(project, out, p.k);
    std::optional<Pointwise<T>> expand_weight;
    if (expand_in) expand_weight.emplace(expand, p.c, in);
    require(!expand_weight || !expand_weight->pairs(),
            "inverted_residual: packed does not belong to its weight");
    // Of a part of the images, in the memory format of x.
    const auto run = [&](const Tensor& x_part, const OptTensor& added, const ConvShape& shape) {
      const Tensor image = as_channels_last(x_part);
      const OptTensor res = added ? OptTensor(as_channels_last(*added)) : std::nullopt;
      const Tensor y = new_channels_last({shape.n, out, shape.oh, shape.ow}, x_part.scalar_type());
      if (shape.n == 0) return in_format_of(y, x_part);
      const FoldedEpilogue<T> after_depthwise = fold<T>(depthwise, std::nullopt, p.k),
                              after_project = fold<T>(project, res, out);
      SeparableConv<T> s{
          .p = shape,
          .in = in,
          .out = out,
          .x = data<T>(image),
          .y = mutable_data<T>(y),
          .expand = {},
          .depthwise = {depthwise_weight.get(), after_depthwise.get()},
          .project = {project_weight.get(), after_project.get(), project_weight.pairs()}};
      if (!expand_in) {
        run_separable(s, y.scalar_type());
        return in_format_of(y, x_part);
      }
      const FoldedEpilogue<T> after_expand = fold<T>(expand, std::nullopt, p.c);
      s.expand = {expand_weight->get(), after_expand.get()};
      run_separable(s, y.scalar_type());
      return in_format_of(y, x_part);
    };
    const bool half = is_half(type);
    if (!half && !goes_in_parts(x, p.n * p.oh * part_row_bytes(p))) return run(x, residual, p);
    const auto read = [&](const Tensor& t, const ImagePart& part) {
      return half ? widened(t, part) : part_channels_last(t, part);
    };
    const bool channels_last = StayChannelsLast::holds() || follows_channels_last(x);
    const Tensor y = channels_last ? new_channels_last(size, type) : new_contiguous(size, type);
    over_image_parts(p.n, p.oh, part_row_bytes(p), may_cut_rows(p),
                     half ? kPartBytes : kFloatPartBytes, [&](const ImagePart& rows) {
                       const ConvPart part(p, rows);
                       const OptTensor added =
                           residual ? OptTensor(read(*residual, rows)) : std::nullopt;
                       const Tensor of_part = run(read(x, part.input), added, part.shape);
                       if (half)
                         round_into(y, rows, of_part);
                       else
                         put_planar(y, rows, as_channels_last(of_part));
                     });
    return y;
  });
}

Tensor depthwise_separable_conv2d(const Tensor& x, const Tensor& depthwise_weight,
                                  const Tensor& pointwise_weight, const OptTensor& depthwise_scale,
                                  const OptTensor& depthwise_shift, const OptTensor& scale,
                                  const OptTensor& shift, const OptTensor& residual,
                                  const OptTensor& depthwise_packed,
                                  const OptTensor& pointwise_packed, const IntList& stride,
                                  const IntList& padding, const IntList& dilation,
                                  int64_t depthwise_activation, double depthwise_alpha,
                                  int64_t activation, double alpha) {
  const char* op = "depthwise_separable_conv2d";
  return separable(x, nullptr,
                   {op, depthwise_weight, depthwise_scale, depthwise_shift, depthwise_packed,
                    depthwise_activation, depthwise_alpha},
                   {op, pointwise_weight, scale, shift, pointwise_packed, activation, alpha},
                   residual, stride, padding, dilation);
}

Tensor inverted_residual(const Tensor& x, const Tensor& expand_weight,
                         const Tensor& depthwise_weight, const Tensor& project_weight,
                         const OptTensor& expand_bias, const OptTensor& depthwise_bias,
                         const OptTensor& project_bias, const OptTensor& residual,
                         const OptTensor& expand_packed, const OptTensor& depthwise_packed,
                         const OptTensor& project_packed, const IntList& stride,
                         const IntList& padding, const IntList& dilation, int64_t expand_activation,
                         double expand_alpha, int64_t depthwise_activation, double depthwise_alpha,
                         int64_t activation, double alpha) {
  const char* op = "inverted_residual";
  const StageTensors expand{
      op, expand_weight, std::nullopt, expand_bias, expand_packed, expand_activation, expand_alpha};
  return separable(
      x, &expand,
      {op, depthwise_weight, std::nullopt, depthwise_bias, depthwise_packed, depthwise_activation,
       depthwise_alpha},
      {op, project_weight, std::nullopt, project_bias, project_packed, activation, alpha}, residual,
      stride, padding, dilation);
}

}  // namespace

NNARCH_OPS(depthwise_separable, ops) {
  ops.impl("depthwise_separable_conv2d", TORCH_BOX(&depthwise_separable_conv2d));
  ops.impl("inverted_residual", TORCH_BOX(&inverted_residual));
}

}  // namespace nnarch
