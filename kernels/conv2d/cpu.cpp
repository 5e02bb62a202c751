// conv2d on the CPU: the convolution and its packed weights. The gradients are in cpu_grad.cpp.
#include <type_traits>

#include "conv2d/cpu_grouped.h"
#include "conv2d/cpu_pairs.h"
#include "conv2d/cpu_parts.h"
#include "conv2d/cpu_product.h"
#include "conv2d/cpu_shape.h"
#include "conv2d/cpu_signal.h"
#include "conv2d/cpu_stem.h"
#include "conv2d/cpu_views.h"
#include "conv2d/cpu_winograd_strided.h"
#include "cpu/epilogue_fold.h"
#include "cpu/half.h"
#include "cpu/image_parts.h"
#include "cpu/registry.h"
#include "cpu/tensor.h"

namespace nnarch {
namespace {

constexpr const char* kForeign = "conv2d: packed does not belong to this weight";

// Whether the weight is packed for narrow groups, whatever the convolution's steps.
template <class T>
bool packs_narrow_groups(const ConvShape& p) {
  return grouped_serves<T>(p.groups, p.group_c(), p.group_k());
}

template <class T>
bool has_narrow_groups(const ConvShape& p) {
  return packs_narrow_groups<T>(p) && grouped_rows_fit<T>(p);
}

template <class T>
int64_t group_size(const ConvShape& p, const WinogradTile& tile) {
  return conv_packed_size<T>(p.group_k(), p.taps(), p.group_c(), tile);
}

template <class T>
int64_t all_groups_size(const ConvShape& p, const WinogradTile& tile) {
  if (tile.m == 0 && packs_narrow_groups<T>(p))
    return grouped_packed_size<T>(p.k, p.taps(), p.group_c());
  return checked_product(group_size<T>(p, tile), p.groups);
}

template <class T>
Tensor pack_groups(const Tensor& weight, const ConvShape& p, const WinogradTile& tile) {
  const int64_t size = group_size<T>(p, tile);
  Tensor packed = new_packed(all_groups_size<T>(p, tile), weight.scalar_type());
  if (tile.m == 0 && packs_narrow_groups<T>(p)) {
    grouped_pack<T>(grouped_weight(data<T>(weight), weight, p.groups), mutable_data<T>(packed));
    return packed;
  }
  for (int64_t g = 0; g < p.groups; ++g)
    conv_pack(forward_weight<T>(weight, p, g), tile, mutable_data<T>(packed) + g * size);
  return packed;
}

// Whether an output is to be NCHW, and can be written so; others are converted afterwards. (Images
// of one channel are dense both ways.)
template <class T>
bool writes_planes(const ConvShape& p, const Tensor& x) {
  return stem_serves(p) ? !follows_channels_last(x) : has_narrow_groups<T>(p) && is_planar(x);
}

// How a weight that is packed for this convolution should be packed.
template <class T>
WinogradTile forward_tile(const ConvShape& p, bool packed) {
  if (stem_serves(p) || packs_narrow_groups<T>(p) || (p.taps() == 1 && signal_serves(p))) return {};
  const auto kernel = winograd_kernel(forward_image<T>(nullptr, p, 0));
  if (!kernel) return {};
  return choose_tile({p.n, p.oh, p.ow, p.group_c(), p.group_k(), packed, *kernel});
}

// A tile as conv2d_pack is told of it: m, and 20 more for a stride of 2.
constexpr int64_t kStrided = 20;

int64_t code_of(const WinogradTile& tile) {
  return tile.m > 0 && tile.stride == 2 ? kStrided + tile.m : tile.m;
}

WinogradTile tile_of_code(int64_t code, int64_t rows, int64_t columns) {
  return {code % kStrided, rows, columns, code / kStrided + 1};
}

// How a packed weight was packed; throws where it does not belong to this convolution.
template <class T>
WinogradTile tile_of(const Tensor& packed, const ConvShape& p) {
  if (packed.numel() == all_groups_size<T>(p, {})) return {};
  if (auto tile = winograd_kernel(forward_image<T>(nullptr, p, 0)))
    for (tile->m = 2; tile->m <= 6; ++tile->m)
      if (tile_serves(*tile, p.group_k(), p.group_c()) &&
          packed.numel() == all_groups_size<T>(p, *tile))
        return *tile;
  throw std::runtime_error(kForeign);
}

// Winograd with a stride of 2.
void strided_forward(const Tensor& x, const Tensor& weight, const Tensor& y, const ConvShape& p,
                     const Epilogue<float>& epilogue) {
  set_algorithm("winograd_strided");
  const bool planar = is_planar(x) && StridedWinograd::serves_planar(p);
  const Tensor image = planar ? x : as_channels_last(x);
  for (int64_t g = 0; g < p.groups; ++g)
    StridedWinograd(p, g, planar)
        .forward(data<float>(image), forward_weight<float>(weight, p, g),
                 mutable_data<float>(y) + g * p.group_k(), epilogue.from_channel(g * p.group_k()));
}

// `packed` may be null.
template <class T>
void forward(const Tensor& x, const Tensor& weight, const T* packed, const WinogradTile& tile,
             const Tensor& y, const ConvShape& p, const Epilogue<T>& epilogue) {
  if (stem_serves(p) && tile.m == 0) {
    set_algorithm("stem");
    const OptTensor own = packed ? std::nullopt : OptTensor(pack_groups<T>(weight, p, {}));
    return stem_forward<T>(x, own ? data<T>(*own) : packed, mutable_data<T>(y), is_planar(y), p,
                           epilogue);
  }
  if (tile.m == 0 && has_narrow_groups<T>(p)) {
    set_algorithm("narrow_groups");
    const Tensor image = is_planar(x) ? x : as_channels_last(x);
    const OptTensor own = packed ? std::nullopt : OptTensor(pack_groups<T>(weight, p, {}));
    return grouped_forward<T>(data<T>(image), is_planar(x), own ? data<T>(*own) : packed,
                              mutable_data<T>(y), is_planar(y), p, epilogue);
  }
  if (tile.m == 0 && packs_narrow_groups<T>(p)) packed = nullptr;  // has another form
  if constexpr (std::is_same_v<T, float>)
    if (!packed && strided_winograd_serves<T>(p)) return strided_forward(x, weight, y, p, epilogue);
  set_algorithm(algorithm_name(p, tile));
  const Tensor image = as_channels_last(x);
  const OutputGrid out{p.oh * p.ow * p.k, p.ow * p.k, p.k};
  for (int64_t g = 0; g < p.groups; ++g)
    conv_product<T>(forward_image<T>(data<T>(image), p, g, tile.is_pair()), tile,
                    packed ? packed + g * group_size<T>(p, tile) : nullptr,
                    forward_weight<T>(weight, p, g), mutable_data<T>(y) + g * p.group_k(), out,
                    epilogue.from_channel(g * p.group_k()));
}

Tensor conv2d_pack(const Tensor& weight_in, int64_t groups, int64_t code) {
  require(weight_in.dim() == 4 && groups > 0 && weight_in.size(0) % groups == 0,
          "conv2d_pack: weight must be 4-D and groups must divide its first size");
  const IntList size = sizes_of(weight_in);
  if (pairs_pack(weight_in.scalar_type(), groups, code)) return pack_conv_pairs(weight_in);
  const Tensor weight = to_compute_type(weight_in);
  const WinogradTile tile = tile_of_code(code, size[2], size[3]);
  require(
      code == 0 || (tile_serves(tile, size[0] / groups, size[1]) &&
                    weight.scalar_type() == ScalarType::Float),
      "conv2d_pack: tile must be 0, or in float32 for 3x3 2, 4, 5, 6, for 5x5 2, for 1x3 and 3x1 "
      "2 or 4, and but for 5x5, where 16 divides the input channels, 22, 23 or 24; for 1x1 2, "
      "where 32 divides the input channels and two panels the output channels");
  ConvShape p{};  // packing asks for nothing but the weight's sizes
  p.c = size[1] * groups, p.k = size[0], p.r = size[2], p.s = size[3], p.groups = groups;
  return with_scalar_type(weight.scalar_type(), "conv2d_pack", [&](auto scalar) {
    return pack_groups<decltype(scalar)>(weight, p, tile);
  });
}

// What a convolution is given beside x and the residual, in the type that is computed in.
struct ConvArguments {
  Tensor weight;
  OptTensor bias, scale, shift, packed;
  int64_t activation;
  double alpha;
};

// Signals are read as they lie, unless Winograd saves more than bringing them to channels_last and
// back costs. One of them decides: parts of a batch must go the way of the whole, which says
// whether the weight is read beside its packed form.
bool runs_as_signal(const Tensor& x, const ConvShape& p) {
  const int64_t wide = p.stride_w > 1 ? 128 : 48;
  if (!signal_serves(p) || !x.is_contiguous() || StayChannelsLast::holds()) return false;
  const bool is_double = x.scalar_type() == ScalarType::Double;
  if (is_double || std::min(p.c, p.k) < wide) return true;
  ConvShape one = p;
  one.n = 1;
  return forward_tile<float>(one, true).m == 0;
}

// Whether an algorithm reads and writes planes: the others want channels_last.
template <class T>
bool serves_planes(const Tensor& x, const ConvShape& p, const WinogradTile& tile, bool packed) {
  if (!is_planar(x) || tile.m != 0) return false;
  if (stem_serves(p) || has_narrow_groups<T>(p)) return true;
  return !packed && strided_winograd_serves<T>(p) && StridedWinograd::serves_planar(p);
}

// The weight for an algorithm that wants it packed, once for all parts of the images.
template <class T>
void pack_for_parts(ConvArguments& a, const ConvShape& p) {
  if (a.packed) return;
  const WinogradTile tile = forward_tile<T>(p, false);
  if (tile.m > 0 || !strided_winograd_serves<T>(p)) a.packed = pack_groups<T>(a.weight, p, tile);
}

// In the memory format of x.
template <class T>
Tensor conv2d_of(const Tensor& x, const OptTensor& residual, const ConvArguments& a,
                 const ConvShape& p) {
  const bool signal = runs_as_signal(x, p);
  OptTensor res = residual;
  if (res) res = signal ? as_contiguous(*res) : as_channels_last(*res);
  const FoldedEpilogue<T> epilogue({a.bias, a.scale, a.shift, res, a.activation, a.alpha}, p.k);
  const WinogradTile tile = a.packed ? tile_of<T>(*a.packed, p) : forward_tile<T>(p, false);
  if (signal) {
    set_algorithm("signal");
    const Tensor y = new_contiguous(p.output_size(), x.scalar_type());
    signal_forward<T>(data<T>(x), a.weight, mutable_data<T>(y), p, epilogue.get());
    return y;
  }
  const bool planar = tile.m == 0 && !res && writes_planes<T>(p, x) && !StayChannelsLast::holds();
  const Tensor y = planar ? new_contiguous(p.output_size(), x.scalar_type())
                          : new_channels_last(p.output_size(), x.scalar_type());
  forward<T>(x, a.weight, a.packed ? data<T>(*a.packed) : nullptr, tile, y, p, epilogue.get());
  return in_format_of(y, x);
}

// Large planar images that the kernels want channels_last, a part at a time: no copy of a whole
// one.
template <class T>
bool takes_parts(const Tensor& x, const ConvArguments& a, const ConvShape& p) {
  if (!goes_in_parts(x, p.n * p.oh * part_row_bytes(p)) || runs_as_signal(x, p)) return false;
  const WinogradTile tile = a.packed ? tile_of<T>(*a.packed, p) : forward_tile<T>(p, false);
  return !serves_planes<T>(x, p, tile, a.packed.has_value());
}

template <class T>
Tensor conv2d_in_parts(const Tensor& x, const OptTensor& residual, ConvArguments a,
                       const ConvShape& p) {
  const Tensor y = new_contiguous(p.output_size(), x.scalar_type());
  pack_for_parts<T>(a, p);
  over_image_parts(
      p.n, p.oh, part_row_bytes(p), may_cut_rows(p), kFloatPartBytes, [&](const ImagePart& out) {
        const ConvPart part(p, out);
        const OptTensor added =
            residual ? OptTensor(part_channels_last(*residual, out)) : std::nullopt;
        const Tensor image = part_channels_last(x, part.input);
        put_planar(y, out, as_channels_last(conv2d_of<T>(image, added, a, part.shape)));
      });
  return y;
}

// Half types, a part of the images at a time (cpu/half.h): the parts are cut so that every one
// reads some of the image. The weight is packed once for all of them.
Tensor conv2d_of_half(const Tensor& x, const OptTensor& residual, ConvArguments a,
                      const ConvShape& p) {
  const bool channels_last = StayChannelsLast::holds() || follows_channels_last(x);
  const Tensor y = channels_last ? new_channels_last(p.output_size(), x.scalar_type())
                                 : new_contiguous(p.output_size(), x.scalar_type());
  const bool many = p.n * p.oh * part_row_bytes(p) > kPartBytes;
  if (many && !runs_as_signal(x, p)) pack_for_parts<float>(a, p);
  over_image_parts(
      p.n, p.oh, part_row_bytes(p), may_cut_rows(p), kPartBytes, [&](const ImagePart& out) {
        const ConvPart part(p, out);
        round_into(y, out,
                   conv2d_of<float>(widened(x, part.input), widened(residual, out), a, part.shape));
      });
  return y;
}

// Bfloat16 by bfloat16.
Tensor conv2d_of_pairs(const Tensor& x, const Tensor& weight, const OptTensor& packed,
                       const ConvShape& p, const EpilogueTensors& e) {
  const OptTensor bias = to_compute_type(e.bias), scale = to_compute_type(e.scale),
                  shift = to_compute_type(e.shift);
  const FoldedEpilogue<float> epilogue({bias, scale, shift, std::nullopt, e.activation, e.alpha},
                                       p.k);
  require(!packed || packed->numel() == pairs_packed_size(p.k, p.taps() * p.c), kForeign);
  const Tensor columns = packed ? *packed : pack_conv_pairs(weight);
  return conv_pairs(x, e.residual, data<uint16_t>(columns), epilogue.get(), p);
}

Tensor conv2d(const Tensor& x, const Tensor& weight, const OptTensor& bias, const OptTensor& scale,
              const OptTensor& shift, const OptTensor& residual, const OptTensor& packed,
              const IntList& stride, const IntList& padding, const IntList& dilation,
              int64_t groups, int64_t activation, double alpha) {
  const ScalarType type = x.scalar_type();
  require(weight.scalar_type() == type, "conv2d: x and weight must have one dtype");
  const ConvShape p = conv_shape(sizes_of(x), sizes_of(weight), stride, padding, dilation, groups);
  if (residual)
    require(sizes_of(*residual) == p.output_size() && residual->scalar_type() == type,
            "conv2d: residual must have the shape and dtype of the output");
  check_epilogue({bias, scale, shift, residual, activation, alpha}, p.k, type);
  const bool of_pairs = packed && packed->scalar_type() == ScalarType::BFloat16;
  require(!packed || (packed->is_contiguous() && (packed->scalar_type() == compute_type(type) ||
                                                  (of_pairs && pairs_pack(type, groups, 0)))),
          kForeign);
  std::optional<StayChannelsLast> stay;
  if (follows_channels_last(x, weight)) stay.emplace();
  const bool signal = runs_as_signal(x, p);
  if (!signal && pairs_pack(type, groups, 0) &&
      (packed ? of_pairs : forward_tile<float>(p, false).m == 0))
    return conv2d_of_pairs(x, weight, packed, p, {bias, scale, shift, residual, activation, alpha});
  // A packed weight stands for the weight, but for signals, and where groups are narrow.
  const bool reads_weight = !packed || signal || packs_narrow_groups<float>(p);
  const ConvArguments a{reads_weight ? to_compute_type(weight) : weight,
                        to_compute_type(bias),
                        to_compute_type(scale),
                        to_compute_type(shift),
                        of_pairs ? std::nullopt : packed,
                        activation,
                        alpha};
  if (is_half(type)) return conv2d_of_half(x, residual, a, p);
  return with_scalar_type(type, "conv2d", [&](auto scalar) {
    using T = decltype(scalar);
    return takes_parts<T>(x, a, p) ? conv2d_in_parts<T>(x, residual, a, p)
                                   : conv2d_of<T>(x, residual, a, p);
  });
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(conv2d, ops) {
  ops.impl("conv2d", TORCH_BOX(&nnarch::conv2d));
  ops.impl("conv2d_pack", TORCH_BOX(&nnarch::conv2d_pack));
}

// How conv2d_pack should pack a float32 weight for an input of this size: sizes of input and
// weight, stride, padding, dilation and groups, 4 + 4 + 2 + 4 + 2 + 1 numbers. −1: they make no
// convolution.
extern "C" __attribute__((visibility("default"))) int64_t nnarch_conv2d_tile(const int64_t* n) {
  using nnarch::IntList;
  try {
    return nnarch::code_of(nnarch::forward_tile<float>(
        nnarch::conv_shape(IntList(n, n + 4), IntList(n + 4, n + 8), IntList(n + 8, n + 10),
                           IntList(n + 10, n + 14), IntList(n + 14, n + 16), n[16]),
        true));
  } catch (const std::exception&) {
    return -1;
  }
}
