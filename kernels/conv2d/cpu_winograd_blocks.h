// Blocks of tiles in Winograd convolution: how large they are, and their outputs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv2d/winograd.h"
#include "conv2d/winograd_taps.h"
#include "conv2d/winograd_tiles.h"
#include "conv2d/winograd_windows.h"
#include "cpu/gather_gemm.h"
#include "cpu/machine.h"
#include "cpu/streaming.h"

namespace nnarch {

// Which of two passes over all that a product reads goes through cache again and again. By blocks,
// V stays in L2, and every block of tiles reads all weights; by panels, these are read once, and V
// for every panel of columns.
enum class WinogradOrder { by_blocks, by_panels };

// How many tiles a block has, in whole register tiles: as many as V allows, by blocks in L2, by
// panels in memory.
struct WinogradBlocking {
  int64_t tiles, row, plane, product_plane;

  static constexpr int64_t in_cache = int64_t{512} << 10, in_memory = int64_t{8} << 20;

  WinogradBlocking(const WinogradTiles& all, WinogradOrder order)
      : row(winograd_row(all.tile.most_slots() * all.image.depth)) {
    const int64_t bytes = order == WinogradOrder::by_panels ? in_memory : in_cache;
    const int64_t mr = winograd().mr, nr = winograd().nr, most = round_up(112, mr);
    tiles = std::clamp(bytes / tile_bytes(all) / mr * mr, mr, most);
    const int64_t count = std::max<int64_t>(1, all.count());
    tiles = ceil_div(count, ceil_div(count, tiles));
    plane = winograd_plane(tiles * row);
    product_plane = winograd_plane(tiles * nr);
  }

  int64_t tile_bytes(const WinogradTiles& all) const {
    return all.tile.values() * row / all.tile.most_slots() * int64_t{sizeof(float)};
  }
  int64_t count(const WinogradTiles& all) const { return ceil_div(all.count(), tiles); }

  // By panels: groups of blocks whose V is in memory together; each reads all weights.
  int64_t groups(const WinogradTiles& all) const {
    return ceil_div(count(all), std::max<int64_t>(1, in_memory / (tiles * tile_bytes(all))));
  }

  // Panels whose products a block makes together, where V comes from beyond L2 and is read once for
  // all of them: as many as leave most of it, and work for some threads.
  int64_t panels_at_once(const WinogradTiles& all, int64_t panels) const {
    constexpr int64_t tasks = 4;
    const int64_t bytes = all.planes() * product_plane * int64_t{sizeof(float)};
    if (all.count() * tile_bytes(all) <= l2_bytes() / 2) return 1;
    return std::max<int64_t>(1, std::min(l2_bytes() * 3 / 8 / bytes, panels / tasks));
  }
};

// Some blocks of tiles, from the one of number `first` on.
struct TileBlocks {
  const WinogradTiles& tiles;
  int64_t each, first, count;

  TileBlock at(int64_t b) const {
    const int64_t from = (first + b) * each;
    return {tiles, from, std::min(each, tiles.count() - from)};
  }
};

// Where the outputs go and what is done to them.
struct WinogradOutput {
  float* y;
  int64_t channels;
  const OutputGrid& grid;
  const Epilogue<float>& epilogue;
  bool stream;

  int64_t panels() const { return ceil_div(channels, winograd().nr); }

  int64_t offset(const TilePlace& at) const {
    return at.image * grid.image_step + at.y * grid.row_step + at.x * grid.column_step;
  }

  void prefetch(const WinogradTiles& tiles, const TilePlace& at, int64_t channel) const {
    const int64_t rows = std::min(tiles.tile.output_rows(), tiles.image.grid_h - at.y);
    const int64_t columns = std::min(tiles.tile.output_columns(), tiles.image.grid_w - at.x);
    const int64_t from = offset(at) + channel;
    const int64_t count = std::min(winograd().nr, channels - channel);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t at_pixel = from + i * grid.row_step + j * grid.column_step;
        prefetch_line<true>(y + at_pixel, count);
        if (epilogue.residual) prefetch_line<false>(epilogue.residual + at_pixel, count);
      }
  }
};

// Outputs of a block, back from the products of one panel.
inline void put_panel(const WinogradTiles& tiles, const WinogradBlocking& blocking,
                      const float* products, const TileBlock& block, int64_t p,
                      const WinogradOutput& output) {
  const int64_t nr = winograd().nr, channel = p * nr;
  const auto transform = winograd_transforms(tiles.tile).output;
  const Epilogue<float> epilogue = output.epilogue.from_channel(channel);
  const OutputGrid& grid = output.grid;
  const WinogradEnds* const ends = tiles.ends();
  block.for_each(block.all(), [&](const TilePlace& at, int64_t kind) {
    const OutputTile place{
        .offset = output.offset(at),
        .row_step = grid.row_step,
        .column_step = grid.column_step,
        .rows = std::min(tiles.tile.output_rows(), tiles.image.grid_h - at.y),
        .columns = std::min(tiles.tile.output_columns(), tiles.image.grid_w - at.x)};
    (kind ? ends->output[kind - 1] : transform)(products, blocking.product_plane,
                                                output.channels - channel, epilogue, place,
                                                output.y + channel, output.stream);
    products += nr;
  });
  finish_past_caches(output.stream);
}

// Of a part of the block's tiles, that of plane xi: lines of y that will be written.
inline void prefetch_outputs(const WinogradTiles& tiles, const TileBlock& block, int64_t xi,
                             int64_t channel, const WinogradOutput& output) {
  if (output.stream) return;
  const int64_t count = block.all().count, planes = tiles.planes(), begin = count * xi / planes;
  block.for_each({begin, count * (xi + 1) / planes - begin},
                 [&](const TilePlace& at, int64_t) { output.prefetch(tiles, at, channel); });
}

}  // namespace nnarch
