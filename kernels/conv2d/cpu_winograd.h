// Winograd convolution, 2×2, 3×3 or 5×5 with stride 1: blocks of tiles are transformed, multiplied
// and transformed back while they are in cache.
//
// A block of tiles becomes V[xi][tile][channel], (m + r − 1)² small matrices for r × r taps. Panel
// by panel of output channels, each is multiplied by the panel's transformed weights,
// [panel][xi][channel][nr] in memory and read strictly in that order; the products [xi][tile][nr]
// become outputs at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "conv2d/cpu_shape.h"
#include "conv2d/winograd.h"
#include "conv2d/winograd_taps.h"
#include "cpu/arena.h"
#include "cpu/gather_gemm.h"
#include "cpu/machine.h"
#include "cpu/pack_weight.h"
#include "cpu/parallel.h"

namespace nnarch {

// The grid of m × m tiles that covers the outputs of such a convolution with step 1. The image's
// first tap is the upper left one.
struct WinogradTiles {
  const GridImage<float>& image;
  int64_t m;
  int64_t taps = 3;

  int64_t size() const { return m + taps - 1; }
  int64_t planes() const { return size() * size(); }
  int64_t rows() const { return ceil_div(image.grid_h, m); }
  int64_t columns() const { return ceil_div(image.grid_w, m); }
  int64_t count() const { return image.n * rows() * columns(); }
};

// The first output of a tile.
struct TilePlace {
  int64_t image, y, x;
  TilePlace(const WinogradTiles& tiles, int64_t tile)
      : image(tile / (tiles.rows() * tiles.columns())),
        y(tile / tiles.columns() % tiles.rows() * tiles.m),
        x(tile % tiles.columns() * tiles.m) {}
};

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

// The windows of an image that tiles transform, and where they put them: V[xi][tile][channel].
struct WinogradWindows {
  const GridImage<float>& image;
  int64_t dy, dx, size;  // of a tile's window, from its first output on
  void (*transform)(const float* const* pixels, int64_t channels, float* planes, int64_t plane);
  int64_t row, plane;  // elements of V from tile to tile, from plane to plane

  // The tiles from `first` on, channels [from, from + channels).
  void run(const WinogradTiles& tiles, int64_t first, int64_t count, int64_t from, int64_t channels,
           float* v) const {
    Scratch<float> zeros(channels);
    std::memset(zeros.get(), 0, static_cast<size_t>(channels) * sizeof(float));
    const float* pixels[64];
    for (int64_t t = 0; t < count; ++t) {
      const TilePlace at(tiles, first + t);
      const float* base = image.data + at.image * image.h * image.w * image.pixel + from;
      const float** next = pixels;
      for (int64_t y = at.y + dy; y < at.y + dy + size; ++y)
        for (int64_t x = at.x + dx; x < at.x + dx + size; ++x)
          *next++ = y >= 0 && y < image.h && x >= 0 && x < image.w
                        ? base + (y * image.w + x) * image.pixel
                        : zeros.get();
      transform(pixels, channels, v + t * row + from, plane);
    }
  }

  // Brings what run() will read first of a tile into L2, channels [from, from + channels).
  void prefetch(const WinogradTiles& tiles, int64_t tile, int64_t from, int64_t channels) const {
    const TilePlace at(tiles, tile);
    const float* base = image.data + at.image * image.h * image.w * image.pixel + from;
    const int64_t y_end = std::min(at.y + tiles.m, image.h),
                  x_end = std::min(at.x + tiles.m, image.w);
    for (int64_t y = at.y; y < y_end; ++y)
      for (int64_t x = at.x; x < x_end; ++x)
        prefetch_line<false>(base + (y * image.w + x) * image.pixel, channels);
  }
};

inline WinogradWindows input_windows(const WinogradTiles& tiles, int64_t row, int64_t plane) {
  const Tap& corner = tiles.image.taps.front();
  const auto transform = winograd_transforms(tiles.m, tiles.taps).input;
  return {tiles.image, corner.dy, corner.dx, tiles.size(), transform, row, plane};
}

// Which of two passes over all that a product reads goes through cache again and again. By blocks,
// V stays in L2, and every block of tiles reads all weights; by panels, these are read once, and V
// for every panel of columns.
enum class WinogradOrder { by_blocks, by_panels };

// How many tiles a block has: by blocks as many as V in L2 allows, in whole register tiles.
struct WinogradBlocking {
  int64_t tiles, row, plane, product_plane;

  WinogradBlocking(const WinogradTiles& all, WinogradOrder order)
      : row(winograd_row(all.image.depth)) {
    constexpr int64_t cache = int64_t{512} << 10;
    const int64_t mr = winograd().mr, nr = winograd().nr, most = round_up(112, mr);
    const int64_t fit = cache / tile_bytes(all);
    tiles = order == WinogradOrder::by_panels ? most : std::clamp(fit / mr * mr, mr, most);
    const int64_t count = std::max<int64_t>(1, all.count());
    tiles = ceil_div(count, ceil_div(count, tiles));
    plane = winograd_plane(tiles * row);
    product_plane = winograd_plane(tiles * nr);
  }

  int64_t tile_bytes(const WinogradTiles& all) const {
    return all.planes() * row * int64_t{sizeof(float)};
  }
  int64_t count(const WinogradTiles& all) const { return ceil_div(all.count(), tiles); }

  // Panels whose products a block makes together, where V comes from beyond L2 and is read once for
  // all of them: as many as leave most of it, and work for some threads.
  int64_t panels_at_once(const WinogradTiles& all, int64_t panels) const {
    constexpr int64_t tasks = 4;
    const int64_t bytes = all.planes() * product_plane * int64_t{sizeof(float)};
    if (all.count() * tile_bytes(all) <= l2_bytes() / 2) return 1;
    return std::max<int64_t>(1, std::min(l2_bytes() * 3 / 8 / bytes, panels / tasks));
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

  void prefetch(const WinogradTiles& tiles, int64_t tile, int64_t channel) const {
    const TilePlace at(tiles, tile);
    const int64_t rows = std::min(tiles.m, tiles.image.grid_h - at.y), from = offset(at) + channel;
    const int64_t columns = std::min(tiles.m, tiles.image.grid_w - at.x);
    const int64_t count = std::min(winograd().nr, channels - channel);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t at_pixel = from + i * grid.row_step + j * grid.column_step;
        prefetch_line<true>(y + at_pixel, count);
        if (epilogue.residual) prefetch_line<false>(epilogue.residual + at_pixel, count);
      }
  }
};

inline int64_t winograd_planes(int64_t m, int64_t taps) { return (m + taps - 1) * (m + taps - 1); }

// Elements of a panel of transformed weights, [xi][depth][nr].
inline int64_t winograd_panel(int64_t depth, int64_t planes) {
  return planes * winograd_plane(depth * winograd().nr);
}

// Panels [first, last) of output channels, their transformed weights one behind the other.
struct WinogradPanels {
  int64_t first, last;
  const float* weights;
};

// Outputs of tiles [first, first + count), back from the products of one panel.
inline void put_panel(const WinogradTiles& tiles, const WinogradBlocking& block,
                      const float* products, int64_t first, int64_t count, int64_t p,
                      const WinogradOutput& output) {
  const int64_t nr = winograd().nr, channel = p * nr;
  const auto transform = winograd_transforms(tiles.m, tiles.taps).output;
  const Epilogue<float> epilogue = output.epilogue.from_channel(channel);
  const OutputGrid& grid = output.grid;
  for (int64_t t = 0; t < count; ++t) {
    const TilePlace at(tiles, first + t);
    const OutputTile place{.offset = output.offset(at),
                           .row_step = grid.row_step,
                           .column_step = grid.column_step,
                           .rows = std::min(tiles.m, tiles.image.grid_h - at.y),
                           .columns = std::min(tiles.m, tiles.image.grid_w - at.x)};
    transform(products + t * nr, block.product_plane, output.channels - channel, epilogue, place,
              output.y + channel, output.stream);
  }
}

// Outputs of tiles [first, first + count) in some panels of the channels. Between the products,
// meanwhile(begin, end) may prefetch for that part of as many other tiles: the memory would wait.
// `far`: V has left L2.
template <class Meanwhile>
void multiply_panels(const WinogradTiles& tiles, const WinogradBlocking& block, const float* v,
                     const WinogradPanels& panels, int64_t first, int64_t count,
                     const WinogradOutput& output, bool far, const Meanwhile& meanwhile) {
  const WinogradTable& table = winograd();
  const int64_t depth = tiles.image.depth, planes = tiles.planes();
  const int64_t weights = winograd_panel(depth, planes), sums = planes * block.product_plane;
  Scratch<float> products((panels.last - panels.first) * sums);
  for (int64_t xi = 0; xi < planes; ++xi) {
    const int64_t begin = count * xi / planes, end = count * (xi + 1) / planes;
    meanwhile(begin, end);
    for (int64_t p = panels.first; p < panels.last; ++p) {
      const int64_t i = p - panels.first, channel = p * table.nr;
      for (int64_t t = begin; t < end && !output.stream; ++t)
        output.prefetch(tiles, first + t, channel);
      table.panel_product(
          {.a = v + xi * block.plane,
           .a_step = block.row,
           .b = panels.weights + i * weights + xi * winograd_plane(depth * table.nr),
           .depth = depth,
           .c = products.get() + i * sums + xi * block.product_plane,
           .c_step = table.nr,
           .rows = count,
           .columns = output.channels - channel,
           .a_next = far && p + 1 == panels.last ? v + (xi + 1) * block.plane : nullptr});
    }
  }
  for (int64_t p = panels.first; p < panels.last; ++p)
    put_panel(tiles, block, products.get() + (p - panels.first) * sums, first, count, p, output);
}

inline int64_t winograd_packed_size(int64_t columns, int64_t depth, int64_t m, int64_t taps = 3) {
  return checked_product(ceil_div(columns, winograd().nr),
                         winograd_panel(depth, winograd_planes(m, taps)));
}

// The side of a square kernel of so many taps.
inline int64_t taps_a_side(int64_t taps) { return taps == 4 ? 2 : taps == 25 ? 5 : 3; }

// The transformed weights of panel p.
inline void winograd_pack_panel(const WeightView<float>& view, int64_t m, int64_t p, float* dst) {
  const WinogradTable& table = winograd();
  // Channels at once stay in cache, and are several lines of a weight in channels_last, which the
  // hardware then fetches ahead: one line each took 1.5 times as long (512, 1024 channels).
  constexpr int64_t cache = int64_t{64} << 10;
  const int64_t each = view.taps() * table.nr * int64_t{sizeof(float)};
  const int64_t some = std::max<int64_t>(16, cache / each / 16 * 16);
  const int64_t plane = winograd_plane(view.depth * table.nr), taps = taps_a_side(view.taps());
  const auto transform = winograd_transforms(m, taps).weight;
  WeightView<float> part = view;
  part.data += p * table.nr * view.column_stride;
  part.columns = std::min(table.nr, view.columns - p * table.nr);
  Scratch<float> direct(view.taps() * some * table.nr);
  for (int64_t d = 0; d < view.depth; d += some, part.data += some * view.depth_stride) {
    part.depth = std::min(some, view.depth - d);
    pack_weight(part, direct.get());
    transform(direct.get(), part.depth, dst + d * table.nr, plane);
  }
  for (int64_t xi = 0; xi < winograd_planes(m, taps); ++xi)  // what lies between the planes
    std::fill(dst + xi * plane + view.depth * table.nr, dst + (xi + 1) * plane, 0.0f);
}

inline void winograd_pack(const WeightView<float>& view, int64_t m, float* dst) {
  const int64_t panel = winograd_panel(view.depth, winograd_planes(m, taps_a_side(view.taps())));
  parallel_tasks(ceil_div(view.columns, winograd().nr),
                 [&](int64_t p) { winograd_pack_panel(view, m, p, dst + p * panel); });
}

// A block of tiles for a task, which goes through all panels.
inline void winograd_by_blocks(const WinogradTiles& tiles, const WinogradBlocking& block,
                               const WinogradWindows& windows, const float* packed,
                               const WinogradOutput& output) {
  const int64_t panel = winograd_panel(tiles.image.depth, tiles.planes());
  parallel_tasks(ceil_div(tiles.count(), block.tiles), [&](int64_t b) {
    const int64_t first = b * block.tiles, count = std::min(block.tiles, tiles.count() - first);
    Scratch<float> v(tiles.planes() * block.plane);
    windows.run(tiles, first, count, 0, tiles.image.depth, v.get());
    const int64_t panels = output.panels(), depth = tiles.image.depth;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t from = depth * p / panels, channels = depth * (p + 1) / panels - from;
      const auto next_block = [&](int64_t begin, int64_t end) {
        for (int64_t t = first + count + begin; t < first + count + end && t < tiles.count(); ++t)
          windows.prefetch(tiles, t, from, channels);
      };
      multiply_panels(tiles, block, v.get(), {p, p + 1, packed + p * panel}, first, count, output,
                      false, next_block);
    }
  });
}

// A few panels of output channels for a task, which goes through all blocks of tiles; the weights,
// where they come as they are, are transformed on the way, panel by panel, and never leave the
// cache.
inline void winograd_by_panels(const WinogradTiles& tiles, const WinogradBlocking& block,
                               const WinogradWindows& windows, const float* packed,
                               const WeightView<float>& view, const WinogradOutput& output) {
  constexpr int64_t channels = 64;
  const int64_t depth = tiles.image.depth, panel = winograd_panel(depth, tiles.planes());
  const int64_t blocks = ceil_div(tiles.count(), block.tiles), each = tiles.planes() * block.plane;
  const int64_t parts = ceil_div(depth, channels);
  const auto first = [&](int64_t b) { return b * block.tiles; };
  const auto count = [&](int64_t b) { return std::min(block.tiles, tiles.count() - first(b)); };
  // Of a few tiles the weights alone are as much as a core can wait for.
  const bool far = blocks * each * int64_t{sizeof(float)} > l2_bytes() && block.tiles >= 56;
  Scratch<float> v(blocks * each);
  parallel_tasks(blocks * parts, [&](int64_t task) {
    const int64_t b = task / parts, from = task % parts * channels;
    windows.run(tiles, first(b), count(b), from, std::min(channels, depth - from),
                v.get() + b * each);
  });
  const int64_t panels = output.panels();
  const int64_t at_once = packed ? block.panels_at_once(tiles, panels) : 1;
  parallel_tasks(ceil_div(panels, at_once), [&](int64_t task) {
    const int64_t p = task * at_once;
    Scratch<float> transformed(packed ? 0 : panel);
    if (!packed) winograd_pack_panel(view, tiles.m, p, transformed.get());
    const WinogradPanels some{p, std::min(p + at_once, panels),
                              packed ? packed + p * panel : transformed.get()};
    for (int64_t b = 0; b < blocks; ++b)
      multiply_panels(tiles, block, v.get() + b * each, some, first(b), count(b), output, far,
                      [](int64_t, int64_t) {});
  });
}

// By panels where that is a few blocks or reads less from beyond L2; all of V is in memory at once
// then.
inline WinogradOrder winograd_order(const WinogradTiles& tiles, int64_t panels, bool packed) {
  constexpr int64_t few = 4, together = int64_t{8} << 20;  // blocks or panels; bytes of V
  const WinogradBlocking block(tiles, WinogradOrder::by_blocks);
  const int64_t blocks = block.count(tiles), v = tiles.count() * block.tile_bytes(tiles);
  const int64_t weights =
      panels * winograd_panel(tiles.image.depth, tiles.planes()) * int64_t{sizeof(float)};
  const int64_t by_blocks = v + (weights > l2_bytes() * 5 / 4 ? blocks : 1) * weights;
  const WinogradBlocking wide(tiles, WinogradOrder::by_panels);
  const int64_t passes = packed ? ceil_div(panels, wide.panels_at_once(tiles, panels)) : panels;
  const int64_t by_panels = weights + (v > l2_bytes() / 2 ? passes : 1) * v;
  const bool transforms_late = !packed && panels >= few, reads_less = by_panels < by_blocks;
  if (blocks < few || (v <= together && (transforms_late || reads_less)))
    return WinogradOrder::by_panels;
  return WinogradOrder::by_blocks;
}

// Rows of a register tile, on average.
inline double winograd_height(const WinogradTiles& tiles, int64_t columns, bool packed) {
  const int64_t panels = ceil_div(columns, winograd().nr);
  const WinogradBlocking block(tiles, winograd_order(tiles, panels, packed));
  return double(block.tiles) / double(ceil_div(block.tiles, winograd().mr));
}

// As gather_gemm (cpu/gather_gemm.h): y[position][column] = epilogue(Σ_tap image · weights). The
// weights are what winograd_pack made, or, where that is null, those of the view.
inline void winograd_gemm(const GridImage<float>& image, int64_t m, const float* packed,
                          const WeightView<float>& view, float* y, const OutputGrid& out,
                          const Epilogue<float>& epilogue) {
  const WinogradTiles tiles{image, m, taps_a_side(view.taps())};
  if (tiles.count() == 0 || view.columns == 0) return;
  // A tile's vectors of one channel block, past the caches, must be whole lines: halves of 16
  // pixels' lines, and then the others, took 1.2 times as long (64 channels of 56×56, N 8, AVX2).
  const bool whole_lines = winograd().nr / 2 * int64_t{sizeof(float)} == 64;
  const WinogradOutput output{y, view.columns, out, epilogue,
                              whole_lines && outgrows_caches<float>(y, image.positions(), out)};
  const WinogradOrder order = winograd_order(tiles, output.panels(), packed);
  const WinogradBlocking block(tiles, order);
  const WinogradWindows windows = input_windows(tiles, block.row, block.plane);
  if (order == WinogradOrder::by_panels)
    return winograd_by_panels(tiles, block, windows, packed, view, output);
  if (packed) return winograd_by_blocks(tiles, block, windows, packed, output);
  Scratch<float> transformed(winograd_packed_size(view.columns, view.depth, m, tiles.taps));
  winograd_pack(view, m, transformed.get());
  winograd_by_blocks(tiles, block, windows, transformed.get(), output);
}

}  // namespace nnarch
