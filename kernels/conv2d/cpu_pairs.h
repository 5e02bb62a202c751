// Direct convolution of bfloat16 where the CPU multiplies pairs (cpu/pairs.h), as linear's product:
// a row is what an output pixel reads, copied together in cache for a block of them, or for 1×1 the
// pixel itself.
#pragma once

#include <algorithm>
#include <cstring>

#include "conv2d/cpu_parts.h"
#include "linear/cpu_half.h"

namespace nnarch {

// Whether a weight that Winograd does not take is packed for it.
inline bool pairs_pack(ScalarType type, int64_t groups, int64_t tile) {
  return takes_pairs(type) && groups == 1 && tile == 0;
}

// The weight [k][c, r, s] as columns [k][r, s, c], packed.
inline Tensor pack_conv_pairs(const Tensor& weight) {
  const int64_t k = weight.size(0), c = weight.size(1), nr = pairs()->nr;
  const int64_t taps = weight.size(2) * weight.size(3), depth = taps * c;
  const Tensor packed = new_packed(pairs_packed_size(k, depth), ScalarType::BFloat16);
  uint16_t* to = mutable_data<uint16_t>(packed);
  const uint16_t* from = data<uint16_t>(weight);
  const HalfTable& half = half_table(ScalarType::BFloat16);
  parallel_tasks(ceil_div(k, nr), [&](int64_t p) {
    const int64_t columns = std::min(nr, k - p * nr);
    const Scratch<uint16_t> ordered(columns * depth);
    uint16_t* next = ordered.get();
    for (int64_t j = p * nr; j < p * nr + columns; ++j)
      for (int64_t r = 0; r < weight.size(2); ++r)
        for (int64_t s = 0; s < weight.size(3); ++s) {
          const uint16_t* tap =
              from + j * weight.stride(0) + r * weight.stride(2) + s * weight.stride(3);
          for (int64_t i = 0; i < c; ++i) *next++ = tap[i * weight.stride(1)];
        }
    Stored rows;
    rows.memory = reinterpret_cast<char*>(ordered.get()), rows.half = &half;
    pack_pairs({rows, 0, depth, 1, depth}, 0, columns, to + p * nr * round_up(depth, 2));
  });
  return packed;
}

// What the output pixels [first, first + count) read of an image [n][h][w][c]: [r, s, c] for each.
inline void copy_patches(const uint16_t* image, const ConvShape& p, int64_t first, int64_t count,
                         uint16_t* to) {
  constexpr size_t bytes = sizeof(uint16_t);
  const int64_t line = p.s * p.c;
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t n = i / (p.oh * p.ow), x = i % p.ow * p.stride_w - p.left;
    const int64_t y = i / p.ow % p.oh * p.stride_h - p.top;
    for (int64_t r = 0; r < p.r; ++r, to += line) {
      const int64_t row = y + r * p.dilation_h;
      if (row < 0 || row >= p.h) {
        std::memset(to, 0, line * bytes);
        continue;
      }
      const uint16_t* from = image + (n * p.h + row) * p.w * p.c;
      if (p.dilation_w == 1) {  // the taps of a row lie side by side
        const int64_t begin = std::clamp<int64_t>(-x, 0, p.s);
        const int64_t end = std::clamp<int64_t>(p.w - x, begin, p.s);
        if (begin > 0) std::memset(to, 0, begin * p.c * bytes);
        std::memcpy(to + begin * p.c, from + (x + begin) * p.c, (end - begin) * p.c * bytes);
        if (end < p.s) std::memset(to + end * p.c, 0, (p.s - end) * p.c * bytes);
        continue;
      }
      for (int64_t s = 0; s < p.s; ++s) {
        const int64_t column = x + s * p.dilation_w;
        if (column < 0 || column >= p.w)
          std::memset(to + s * p.c, 0, p.c * bytes);
        else
          std::memcpy(to + s * p.c, from + column * p.c, p.c * bytes);
      }
    }
  }
}

// `all`: the product, whose x is not read but for its type.
inline void multiply_patches(const HalfProduct& all, const uint16_t* image, const ConvShape& p,
                             const uint16_t* packed) {
  set_algorithm("bfloat16_pairs_patches");
  if (all.m == 0) return;
  constexpr int64_t most_columns = 256, wanted = 8, register_rows = 14;
  const int64_t rows =
      std::min(rows_of_pairs(all.depth), round_up(ceil_div(all.m, wanted), register_rows));
  parallel_tasks(ceil_div(all.m, rows), [&](int64_t task) {
    const int64_t row = task * rows, count = std::min(rows, all.m - row);
    const Scratch<uint16_t> patches(count * all.depth);
    copy_patches(image, p, row, count, patches.get());
    for (int64_t column = 0; column < all.n; column += most_columns)
      multiply_pairs(all, patches.get(), all.depth, row, count,
                     packed + column * round_up(all.depth, 2), column,
                     std::min(most_columns, all.n - column));
  });
}

// Rows of x, in any order, as bfloat16 pixels.
class PartPixels {
 public:
  PartPixels(const Tensor& x, const ImagePart& part)
      : pixels_(part.images * part.rows * x.size(1) * x.size(3)) {
    constexpr int64_t run = 16384;
    const Tensor wide = as_channels_last(widened(x, part));
    const HalfTable& half = half_table(x.scalar_type());
    const float* from = data<float>(wide);
    parallel_tasks(ceil_div(wide.numel(), run), [&](int64_t task) {
      const int64_t first = task * run;
      half.narrow(from + first, pixels_.get() + first, std::min(run, wide.numel() - first));
    });
  }
  const uint16_t* get() const { return pixels_.get(); }

 private:
  Scratch<uint16_t> pixels_;
};

// The whole convolution as one product, or, where x or y is planar, by parts of the images.
inline Tensor conv_pairs(const Tensor& x, const OptTensor& residual, const uint16_t* packed,
                         const Epilogue<float>& epilogue, const ConvShape& p) {
  const ScalarType type = x.scalar_type();
  const bool channels_last = StayChannelsLast::holds() || follows_channels_last(x);
  const Tensor y = channels_last ? new_channels_last(p.output_size(), type)
                                 : new_contiguous(p.output_size(), type);
  const int64_t depth = p.taps() * p.c;
  if (is_channels_last(x) && is_channels_last(y)) {
    const OptTensor added = residual ? OptTensor(as_channels_last(*residual)) : std::nullopt;
    const HalfProduct all{Stored(x), Stored(added), Stored(y), p.n * p.oh * p.ow,
                          depth,     depth,         p.k,       epilogue};
    if (p.pointwise())
      packed_pairs(all, packed);
    else
      multiply_patches(all, data<uint16_t>(x), p, packed);
    return y;
  }
  over_image_parts(
      p.n, p.oh, part_row_bytes(p), may_cut_rows(p), kPartBytes, [&](const ImagePart& out) {
        const ConvPart part(p, out);
        const Tensor of_part =
            new_channels_last({out.images, p.k, out.rows, p.ow}, ScalarType::Float);
        const OptTensor added =
            residual ? OptTensor(as_channels_last(widened(*residual, out))) : std::nullopt;
        const PartPixels pixels(x, part.input);
        multiply_patches({Stored(x), Stored(added), Stored(of_part), out.images * out.rows * p.ow,
                          depth, depth, p.k, epilogue},
                         pixels.get(), part.shape, packed);
        round_into(y, out, of_part);
      });
  return y;
}

}  // namespace nnarch
