// Winograd convolution: blocks of tiles are transformed, multiplied and transformed back while they
// are in cache.
//
// A block of tiles becomes V[xi][tile][slot][channel], a small matrix for every plane (xi) of
// values (winograd_tile.h); with stride 1 there is one slot. Panel by panel of output channels,
// each is multiplied by the panel's transformed weights, [panel][xi][slot][channel][nr] in memory
// and read strictly in that order (of those that come as they are, a part of the channels at a
// time: cpu_winograd_late.h); the products [xi][tile][nr] become outputs at once.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv2d/cpu_shape.h"
#include "conv2d/cpu_winograd_blocks.h"
#include "conv2d/cpu_winograd_late.h"
#include "conv2d/cpu_winograd_weights.h"
#include "conv2d/winograd.h"
#include "conv2d/winograd_tiles.h"
#include "conv2d/winograd_windows.h"
#include "cpu/arena.h"
#include "cpu/gather_gemm.h"
#include "cpu/machine.h"
#include "cpu/parallel.h"

namespace nnarch {

// Panels [first, last) of output channels, their transformed weights one behind the other.
struct WinogradPanels {
  int64_t first, last;
  const float* weights;
};

// Outputs of a block in some panels of the channels. Between the products, meanwhile(begin, end)
// may prefetch for that part of as many other tiles: the memory would wait. `far`: V has left L2.
template <class Meanwhile>
void multiply_panels(const WinogradTiles& tiles, const WinogradBlocking& blocking, const float* v,
                     const WinogradPanels& panels, const TileBlock& block,
                     const WinogradOutput& output, bool far, const Meanwhile& meanwhile) {
  const WinogradTable& table = winograd();
  const WinogradPanel panel(tiles.image.depth);
  const int64_t planes = tiles.planes(), sums = planes * blocking.product_plane;
  const int64_t weights = panel.size(tiles.tile);
  Scratch<float> products((panels.last - panels.first) * sums);
  const auto rows_of = [&](int64_t xi) {
    return v + xi * blocking.plane + block.with_plane(xi).begin * blocking.row;
  };
  const float* b = panels.weights;
  for (int64_t xi = 0; xi < planes; b += panel.plane(tiles.tile, xi), ++xi) {
    const int64_t begin = block.all().count * xi / planes,
                  end = block.all().count * (xi + 1) / planes;
    const TileBlock::Range range = block.with_plane(xi);
    meanwhile(begin, end);
    for (int64_t p = panels.first; p < panels.last; ++p) {
      const int64_t i = p - panels.first, channel = p * table.nr;
      prefetch_outputs(tiles, block, xi, channel, output);
      table.panel_product(
          {.a = rows_of(xi),
           .a_step = blocking.row,
           .b = b + i * weights,
           .depth = tiles.tile.slots(xi) * tiles.image.depth,
           .c = products.get() + i * sums + xi * blocking.product_plane + range.begin * table.nr,
           .c_step = table.nr,
           .rows = range.count,
           .columns = output.channels - channel,
           .far = far_l3(),
           .a_next = far && p + 1 == panels.last ? rows_of(xi + 1) : nullptr});
    }
  }
  for (int64_t p = panels.first; p < panels.last; ++p)
    put_panel(tiles, blocking, products.get() + (p - panels.first) * sums, block, p, output);
}

// A block of tiles for a task, which goes through all panels.
inline void winograd_by_blocks(const WinogradTiles& tiles, const WinogradBlocking& blocking,
                               const WinogradWindows& windows, const float* packed,
                               const WinogradOutput& output) {
  const int64_t panel = WinogradPanel(tiles.image.depth).size(tiles.tile);
  parallel_tasks(blocking.count(tiles), [&](int64_t b) {
    const int64_t first = b * blocking.tiles,
                  count = std::min(blocking.tiles, tiles.count() - first);
    const TileBlock block(tiles, first, count);
    Scratch<float> v(tiles.planes() * blocking.plane);
    windows.run(block, block.all(), 0, tiles.image.depth, v.get());
    const int64_t panels = output.panels(), depth = tiles.image.depth;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t from = depth * p / panels, channels = depth * (p + 1) / panels - from;
      const auto next_block = [&](int64_t begin, int64_t end) {
        for_each_tile(tiles, first + count + begin, std::min(first + count + end, tiles.count()),
                      [&](const TilePlace& at) { windows.prefetch(tiles, at, from, channels); });
      };
      multiply_panels(tiles, blocking, v.get(), {p, p + 1, packed + p * panel}, block, output,
                      false, next_block);
    }
  });
}

// A few panels of output channels for a task, which goes through the blocks [first, last) of tiles.
inline void winograd_group_by_panels(const WinogradTiles& tiles, const WinogradBlocking& blocking,
                                     int64_t first, int64_t last, const WinogradWindows& windows,
                                     const float* packed, const WeightView<float>& view,
                                     const WinogradOutput& output) {
  constexpr int64_t channels = 64;
  const int64_t depth = tiles.image.depth, panel = WinogradPanel(depth).size(tiles.tile);
  const TileBlocks blocks{tiles, blocking.tiles, first, last - first};
  const int64_t each = tiles.planes() * blocking.plane, parts = ceil_div(depth, channels);
  Scratch<float> v(blocks.count * each);
  parallel_tasks(blocks.count * parts, [&](int64_t task) {
    const int64_t b = task / parts, from = task % parts * channels;
    const TileBlock block = blocks.at(b);
    windows.run(block, block.all(), from, std::min(channels, depth - from), v.get() + b * each);
  });
  // Of a few tiles the weights alone are as much as a core can wait for.
  const bool far =
      blocks.count * each * int64_t{sizeof(float)} > l2_bytes() && blocking.tiles >= 56;
  if (!packed && !far) return multiply_late(tiles, blocking, v.get(), blocks, view, output);
  const int64_t panels = output.panels();
  const int64_t at_once = packed ? blocking.panels_at_once(tiles, panels) : 1;
  parallel_tasks(ceil_div(panels, at_once), [&](int64_t task) {
    const int64_t p = task * at_once;
    Scratch<float> transformed(packed ? 0 : panel);
    if (!packed) winograd_pack_panel(view, tiles.tile, p, transformed.get());
    const WinogradPanels some{p, std::min(p + at_once, panels),
                              packed ? packed + p * panel : transformed.get()};
    for (int64_t b = 0; b < blocks.count; ++b)
      multiply_panels(tiles, blocking, v.get() + b * each, some, blocks.at(b), output, far,
                      [](int64_t, int64_t) {});
  });
}

inline void winograd_by_panels(const WinogradTiles& tiles, const WinogradBlocking& blocking,
                               const WinogradWindows& windows, const float* packed,
                               const WeightView<float>& view, const WinogradOutput& output) {
  const int64_t blocks = blocking.count(tiles), groups = blocking.groups(tiles);
  for (int64_t g = 0; g < groups; ++g)
    winograd_group_by_panels(tiles, blocking, blocks * g / groups, blocks * (g + 1) / groups,
                             windows, packed, view, output);
}

// What an order reads from beyond L2: the weights so many times, and of V, of which so much is in
// memory at once, so much in all. Bytes.
struct WinogradReads {
  WinogradOrder order;
  int64_t weights, passes;
  int64_t v_at_once, v;
};

// By panels where that is a few blocks or reads less.
inline WinogradReads winograd_reads(const WinogradTiles& tiles, int64_t panels, bool packed) {
  constexpr int64_t few = 4;  // blocks or panels
  const WinogradBlocking block(tiles, WinogradOrder::by_blocks);
  const int64_t blocks = block.count(tiles), v = tiles.count() * block.tile_bytes(tiles);
  const int64_t weights =
      panels * WinogradPanel(tiles.image.depth).size(tiles.tile) * int64_t{sizeof(float)};
  const WinogradReads by_blocks{WinogradOrder::by_blocks, weights, blocks, 0, 0};
  const WinogradBlocking wide(tiles, WinogradOrder::by_panels);
  const int64_t groups = wide.groups(tiles);
  // Several groups take their weights transformed.
  const bool ready = packed || groups > 1;
  const int64_t passes = ready ? ceil_div(panels, wide.panels_at_once(tiles, panels)) : panels;
  const bool v_stays = v <= l2_bytes() / 2;
  const WinogradReads by_panels{WinogradOrder::by_panels, weights, groups, v_stays ? 0 : v / groups,
                                v_stays ? 0 : passes * v};
  if (blocks < few || (!ready && panels >= few)) return by_panels;
  // A near last-level cache brings weights as fast as they are multiplied; V that outgrows L2 by
  // far is written and read beside that.
  if (groups > 1 && !far_l3() && weights <= l3_bytes() / 2) return by_blocks;
  const int64_t again = weights > l2_bytes() * 5 / 4 ? blocks : 1;  // what fits L2 stays there
  const int64_t once = v_stays ? 0 : v;
  return groups * weights + by_panels.v < again * weights + once ? by_panels : by_blocks;
}

inline WinogradOrder winograd_order(const WinogradTiles& tiles, int64_t panels, bool packed) {
  return winograd_reads(tiles, panels, packed).order;
}

// Rows of a register tile, on average.
inline double winograd_height(const WinogradTiles& tiles, int64_t columns, bool packed) {
  const int64_t panels = ceil_div(columns, winograd().nr);
  const WinogradBlocking block(tiles, winograd_order(tiles, panels, packed));
  return double(block.tiles) / double(ceil_div(block.tiles, winograd().mr));
}

// As gather_gemm (cpu/gather_gemm.h): y[position][column] = epilogue(Σ_tap image · weights). The
// weights are what winograd_pack made, or, where that is null, those of the view.
inline void winograd_gemm(const GridImage<float>& image, const WinogradTile& tile,
                          const float* packed, const WeightView<float>& view, float* y,
                          const OutputGrid& out, const Epilogue<float>& epilogue) {
  const WinogradTiles tiles{image, tile};
  if (tiles.count() == 0 || view.columns == 0) return;
  // A tile's vectors of one channel block, past the caches, must be whole lines: halves of 16
  // pixels' lines, and then the others, took 1.2 times as long (64 channels of 56×56, N 8, AVX2).
  const bool whole_lines = winograd().nr / 2 * int64_t{sizeof(float)} == 64;
  const WinogradOutput output{y, view.columns, out, epilogue,
                              whole_lines && outgrows_caches<float>(y, image.positions(), out)};
  const WinogradOrder order = winograd_order(tiles, output.panels(), packed);
  const WinogradBlocking block(tiles, order);
  const WinogradWindows windows = input_windows(tiles, block.row, block.plane);
  const bool by_panels = order == WinogradOrder::by_panels;
  const bool now = !packed && !(by_panels && block.groups(tiles) == 1);
  Scratch<float> transformed(now ? winograd_packed_size(view.columns, view.depth, tile) : 0);
  if (now) winograd_pack(view, tile, transformed.get());
  const float* const weights = now ? transformed.get() : packed;
  if (by_panels) return winograd_by_panels(tiles, block, windows, weights, view, output);
  winograd_by_blocks(tiles, block, windows, weights, output);
}

}  // namespace nnarch
