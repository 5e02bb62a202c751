// The product behind a convolution and behind the gradient of its input: direct, by Winograd in
// tiles, whose m is 0 for the direct product (cpu/gather_gemm.h), or by Strassen in pairs of pixels
// (cpu/strassen_product.h). The tile says which form the packed weight has.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "conv2d/cpu_winograd.h"
#include "conv2d/winograd_choice.h"
#include "cpu/gather_gemm.h"
#include "cpu/pack_weight.h"
#include "cpu/rows_product.h"
#include "cpu/strassen_product.h"

namespace nnarch {

// A line behind transformed 5×5 weights: F(2×2, 5×5) and F(4×4, 3×3) have 36 values each, and a
// packed weight is known by its size.
inline int64_t line_behind(const WinogradTile& tile) {
  return tile.m > 0 && tile.taps() == 25 ? 16 : 0;
}

template <class T>
int64_t conv_packed_size(int64_t columns, int64_t taps, int64_t depth, const WinogradTile& tile) {
  if (tile.m == 0) return packed_size<T>(columns, taps, depth);
  if (tile.is_pair()) return strassen_packed_size(columns, depth);
  return checked_sum(winograd_packed_size(columns, depth, tile), line_behind(tile));
}

template <class T>
void conv_pack(const WeightView<T>& weight, const WinogradTile& tile, T* dst) {
  if constexpr (std::is_same_v<T, float>) {
    if (tile.is_pair()) return strassen_pack(weight, dst);
    if (tile.m > 0) {
      const int64_t line = line_behind(tile);
      const int64_t size = conv_packed_size<T>(weight.columns, tile.taps(), weight.depth, tile);
      std::fill_n(dst + size - line, line, T{0});
      return winograd_pack(weight, tile, dst);
    }
  }
  pack_weight(weight, dst);
}

// Panels of columns that are packed together right before their product, in the second-level cache,
// or 0: where large weights meet an image that stays there beside them. A packed copy in memory
// would be written and read again.
template <class T>
int64_t panels_packed_late(const GridImage<T>& image, const WeightView<T>& weight) {
  constexpr int64_t wanted_tasks = 8;
  const int64_t l2 = l2_bytes(), nr = gemm<T>().nr, panels = ceil_div(weight.columns, nr);
  const int64_t panel = packed_size<T>(nr, weight.taps(), weight.depth) * int64_t{sizeof(T)};
  const int64_t pixels = image.n * image.h * image.w * image.pixel * int64_t{sizeof(T)};
  if (panels * panel <= l2 / 2 || pixels > l2 / 4 || panel > l2 * 5 / 8) return 0;
  return std::max<int64_t>(1, std::min(l2 / 3 / panel, panels / wanted_tasks));
}

template <class T>
void pack_late(const GridImage<T>& image, const WeightView<T>& weight, int64_t panels, T* y,
               const OutputGrid& out, const Epilogue<T>& epilogue) {
  const int64_t columns = panels * gemm<T>().nr;
  parallel_tasks(ceil_div(weight.columns, columns), [&](int64_t task) {
    const int64_t first = task * columns;
    const WeightView<T> part = weight.columns_from(first, columns);
    Scratch<T> packed(packed_size<T>(part.columns, part.taps(), part.depth));
    pack_weight(part, packed.get());
    gather_gemm<T>(image, packed.get(), part.columns, y + first, out, epilogue.from_channel(first));
  });
}

// Whether the pixels of a 1×1 convolution lie evenly, and its outputs, too: those of one row of an
// image, or all of them.
template <class T>
bool is_one_row(const GridImage<T>& image, const OutputGrid& out) {
  if (!reads_inside(image)) return false;
  if (image.n == 1 && image.grid_h == 1) return true;
  return image.step_y == 1 && image.step_x == 1 && image.grid_h == image.h &&
         image.grid_w == image.w && out.row_step == image.grid_w * out.column_step &&
         (image.n == 1 || out.image_step == image.grid_h * out.row_step);
}

// Few such pixels against a weight that comes unpacked: linear's products of rows, by their names.
// False, and nothing is computed, where another way serves better: with panels of 16 columns (AVX2)
// and 49 pixels, `late` ones were 3 to 6 % faster.
template <class T>
bool multiply_pixels(const GridImage<T>& image, const WeightView<T>& weight, int64_t late, T* y,
                     const OutputGrid& out, const Epilogue<T>& epilogue) {
  if (!is_one_row(image, out) || image.positions() > kManyRows) return false;
  if (late > 0 && isa() != Isa::avx512 && image.positions() > kFewUnpackedRows) return false;
  const T* pixels = image.data + (image.taps[0].dy * image.w + image.taps[0].dx) * image.pixel;
  set_algorithm(multiply_rows<T>({pixels, image.step_x * image.pixel, image.positions(), weight, y,
                                  out.column_step, epilogue}));
  return true;
}

// y[position][column] = epilogue(Σ_tap image · weight); `packed` is what conv_pack made of the
// weight, or null.
template <class T>
void conv_product(const GridImage<T>& image, const WinogradTile& tile, const T* packed,
                  const WeightView<T>& weight, T* y, const OutputGrid& out,
                  const Epilogue<T>& epilogue) {
  if constexpr (std::is_same_v<T, float>) {
    if (tile.is_pair()) return strassen_gemm(image, packed, weight.columns, y, out, epilogue);
    if (tile.m > 0) return winograd_gemm(image, tile, packed, weight, y, out, epilogue);
  }
  if (packed) return gather_gemm<T>(image, packed, weight.columns, y, out, epilogue);
  const int64_t late = panels_packed_late(image, weight);
  if (multiply_pixels(image, weight, late, y, out, epilogue)) return;
  if (late > 0) return pack_late(image, weight, late, y, out, epilogue);
  Scratch<T> own(packed_size<T>(weight.columns, weight.taps(), weight.depth));
  pack_weight(weight, own.get());
  gather_gemm<T>(image, own.get(), weight.columns, y, out, epilogue);
}

}  // namespace nnarch
