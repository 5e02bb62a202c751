// From an image to transformed values: the windows of tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "conv2d/winograd_taps.h"
#include "conv2d/winograd_tiles.h"
#include "cpu/arena.h"
#include "cpu/grid_image.h"

namespace nnarch {

// Rows a multiple of 4 KB apart share a set of the L1 cache, as do planes: an odd number of lines.
inline int64_t winograd_row(int64_t channels) {
  return round_up(channels, 16) + (channels % 256 == 0 ? 16 : 0);
}
inline int64_t winograd_plane(int64_t elements) {
  const int64_t lines = ceil_div(elements, 16);
  return (lines + (lines % 2 == 0)) * 16;
}

template <bool ForWriting>
void prefetch_line(const float* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(p + i, ForWriting, 2);
}

// The windows of an image that tiles transform, and where they put them:
// V[xi][tile][slot][channel].
struct WinogradWindows {
  const GridImage<float>& image;
  // A tile's window begins at its first output times these, and then (dy, dx) away.
  int64_t row_step, column_step, dy, dx;
  // Of a window, and of one at the end of a column or row.
  int64_t rows, columns, end_rows, end_columns;
  decltype(WinogradTransforms::input) transform;
  const decltype(WinogradTransforms::input)* of_ends;
  int64_t row, plane;  // elements of V from tile to tile, from plane to plane

  // Some tiles of a block, channels [from, from + channels), to v and on.
  void run(const TileBlock& block, const TileBlock::Range& range, int64_t from, int64_t channels,
           float* v) const {
    Scratch<float> zeros(channels);
    std::memset(zeros.get(), 0, static_cast<size_t>(channels) * sizeof(float));
    constexpr int64_t most_pixels = 81;
    const float* pixels[most_pixels];
    float* to = v + from;
    block.for_each(range, [&](const TilePlace& at, int64_t kind) {
      const float* base = image.data + at.image * image.h * image.w * image.pixel + from;
      const float** next = pixels;
      const int64_t top = at.y * row_step + dy, left = at.x * column_step + dx;
      const int64_t y_end = top + (kind & 2 ? end_rows : rows);
      const int64_t x_end = left + (kind & 1 ? end_columns : columns);
      for (int64_t y = top; y < y_end; ++y)
        for (int64_t x = left; x < x_end; ++x)
          *next++ = y >= 0 && y < image.h && x >= 0 && x < image.w
                        ? base + (y * image.w + x) * image.pixel
                        : zeros.get();
      (kind ? of_ends[kind - 1] : transform)(pixels, channels, to, plane, image.depth);
      to += row;
    });
  }

  // Brings what run() will read first of a tile into L2, channels [from, from + channels).
  void prefetch(const WinogradTiles& tiles, const TilePlace& at, int64_t from,
                int64_t channels) const {
    const float* base = image.data + at.image * image.h * image.w * image.pixel + from;
    const int64_t top = at.y * row_step, left = at.x * column_step;
    const int64_t y_end = std::min(top + tiles.tile.output_rows() * row_step, image.h),
                  x_end = std::min(left + tiles.tile.output_columns() * column_step, image.w);
    for (int64_t y = top; y < y_end; ++y)
      for (int64_t x = left; x < x_end; ++x)
        prefetch_line<false>(base + (y * image.w + x) * image.pixel, channels);
  }
};

inline WinogradWindows input_windows(const WinogradTiles& tiles, int64_t row, int64_t plane) {
  const Tap& corner = tiles.image.taps.front();
  const WinogradTile& tile = tiles.tile;
  return {.image = tiles.image,
          .row_step = tile.row_step(),
          .column_step = tile.column_step(),
          .dy = corner.dy,
          .dx = corner.dx,
          .rows = tile.window_rows(),
          .columns = tile.window_columns(),
          .end_rows = tiles.end_rows() + tile.rows - 1,
          .end_columns = tiles.end_columns() + tile.columns - 1,
          .transform = winograd_transforms(tile).input,
          .of_ends = tiles.ends() ? tiles.ends()->input : nullptr,
          .row = row,
          .plane = plane};
}

}  // namespace nnarch
