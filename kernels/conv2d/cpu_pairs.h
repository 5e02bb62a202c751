// 1×1 convolutions of bfloat16 where the CPU multiplies pairs (cpu/pairs.h): pixels are the rows of
// linear's product.
#pragma once

#include <cstring>

#include "conv2d/cpu_parts.h"
#include "linear/cpu_half.h"

namespace nnarch {

inline bool pairs_pack(ScalarType type, int64_t groups, int64_t taps) {
  return takes_pairs(type) && groups == 1 && taps == 1;
}
inline bool pairs_serve(const ConvShape& p, ScalarType type) {
  const bool padded = p.top > 0 || p.left > 0 || p.bottom > 0 || p.right > 0;
  return pairs_pack(type, p.groups, p.taps()) && !padded;
}

inline Tensor pack_pointwise_pairs(const Tensor& weight) {
  const int64_t k = weight.size(0), c = weight.size(1), nr = pairs()->nr;
  const Tensor packed = new_contiguous({pairs_packed_size(k, c)}, ScalarType::BFloat16);
  uint16_t* to = mutable_data<uint16_t>(packed);
  const HalfMatrix view{Stored(weight), 0, weight.stride(0), weight.stride(1), c};
  parallel_tasks(ceil_div(k, nr), [&](int64_t p) {
    pack_pairs(view, p * nr, std::min(nr, k - p * nr), to + p * nr * round_up(c, 2));
  });
  return packed;
}

// The pixels that a part of the output reads, side by side, from x in any order.
class PointwisePixels {
 public:
  PointwisePixels(const Tensor& x, const ConvShape& p, const ImagePart& out)
      : pixels_(out.images * out.rows * p.ow * p.c) {
    const ConvPart part(p, out);
    const bool in_place = is_channels_last(x);
    const Tensor wide = in_place ? x : as_channels_last(widened(x, part.input));
    const HalfTable& half = half_table(x.scalar_type());
    parallel_tasks(out.images * out.rows, [&](int64_t task) {
      const int64_t n = task / out.rows, row = task % out.rows * p.stride_h;
      uint16_t* to = pixels_.get() + task * p.ow * p.c;
      if (in_place) {
        const int64_t y = part.input.row + row;
        const uint16_t* from = data<uint16_t>(x) + ((out.image + n) * p.h + y) * p.w * p.c;
        for (int64_t i = 0; i < p.ow; ++i)
          std::memcpy(to + i * p.c, from + i * p.stride_w * p.c, p.c * sizeof(uint16_t));
        return;
      }
      const float* from = data<float>(wide) + (n * part.input.rows + row) * p.w * p.c;
      if (p.stride_w == 1) return half.narrow(from, to, p.ow * p.c);
      for (int64_t i = 0; i < p.ow; ++i)
        half.narrow(from + i * p.stride_w * p.c, to + i * p.c, p.c);
    });
  }
  Stored stored(ScalarType type) const {
    Stored s;
    s.memory = reinterpret_cast<char*>(pixels_.get()), s.half = &half_table(type);
    return s;
  }

 private:
  Scratch<uint16_t> pixels_;
};

// The whole convolution as one product, or, where x or y is planar or strided, by parts.
inline Tensor pointwise_pairs(const Tensor& x, const OptTensor& residual, const uint16_t* packed,
                              const Epilogue<float>& epilogue, const ConvShape& p) {
  const ScalarType type = x.scalar_type();
  const bool channels_last = StayChannelsLast::holds() || follows_channels_last(x);
  const Tensor y = channels_last ? new_channels_last(p.output_size(), type)
                                 : new_contiguous(p.output_size(), type);
  if (p.pointwise() && is_channels_last(x) && is_channels_last(y)) {
    const OptTensor added = residual ? OptTensor(as_channels_last(*residual)) : std::nullopt;
    packed_pairs({Stored(x), Stored(added), Stored(y), p.n * p.h * p.w, p.c, p.c, p.k, epilogue},
                 packed);
    return y;
  }
  over_image_parts(p.n, p.oh, part_row_bytes(p), true, kPartBytes, [&](const ImagePart& out) {
    const Tensor of_part = new_channels_last({out.images, p.k, out.rows, p.ow}, ScalarType::Float);
    const OptTensor added =
        residual ? OptTensor(as_channels_last(widened(*residual, out))) : std::nullopt;
    const PointwisePixels pixels(x, p, out);
    packed_pairs({pixels.stored(type), Stored(added), Stored(of_part), out.images * out.rows * p.ow,
                  p.c, p.c, p.k, epilogue},
                 packed);
    round_into(y, out, of_part);
  });
  return y;
}

}  // namespace nnarch
