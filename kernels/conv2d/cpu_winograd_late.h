// Winograd convolution with weights that come as they are, as in training: they are transformed
// right before their products, and never leave the cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv2d/cpu_winograd_blocks.h"
#include "conv2d/cpu_winograd_weights.h"
#include "conv2d/winograd.h"
#include "cpu/arena.h"
#include "cpu/pack_weight.h"
#include "cpu/parallel.h"

namespace nnarch {

// Parts of a weight, panel by panel, whose transformed weights stay in L2. Each adds to the
// products, as the parts of a long sum do anyway.
class WeightParts {
 public:
  explicit WeightParts(const WeightView<float>& weight)
      : weight_(weight), count_(ceil_div(weight.depth, kDepth)) {
    for (int64_t i = 0; i < count_; ++i) most_ = std::max(most_, depth(i));
  }

  int64_t count() const { return count_; }
  int64_t most() const { return most_; }
  int64_t begin(int64_t i) const {
    return i == count_ ? weight_.depth : weight_.depth * i / count_ / 16 * 16;
  }
  int64_t depth(int64_t i) const { return begin(i + 1) - begin(i); }
  WeightView<float> at(int64_t p, int64_t i) const {
    return panel_of(weight_, p).depth_from(begin(i), depth(i));
  }
  // The first weight of the part behind that one, or null.
  const float* next(int64_t p, int64_t i) const {
    const bool same_panel = i + 1 < count_;
    const int64_t column = (same_panel ? p : p + 1) * winograd().nr;
    if (column >= weight_.columns) return nullptr;
    const int64_t from = same_panel ? begin(i + 1) : 0;
    return weight_.data + column * weight_.column_stride + from * weight_.depth_stride;
  }
  // As many as those of the deepest part, which no other exceeds.
  WeightLines lines(int64_t p) const {
    return WeightLines(panel_of(weight_, p).depth_from(0, most_));
  }

 private:
  static constexpr int64_t kDepth = 96;
  const WeightView<float>& weight_;
  int64_t count_, most_ = 0;
};

// The products of a block with a part of the weights that begins with channel `from`, to products
// [xi][tile][nr] or added to them. Meanwhile lines(xi) come into cache.
template <class LinesOf>
void multiply_part(const WinogradTiles& tiles, const WinogradBlocking& blocking,
                   const TileBlock& block, const float* v, const float* weights, int64_t from,
                   int64_t depth, int64_t columns, float* products, const LinesOf& lines) {
  const WinogradTable& table = winograd();
  const WinogradPanel panel(depth);
  for (int64_t xi = 0; xi < tiles.planes(); ++xi) {
    const TileBlock::Range range = block.with_plane(xi);
    for (int64_t slot = 0; slot < tiles.tile.slots(xi); ++slot)
      table.panel_product({.a = v + xi * blocking.plane + range.begin * blocking.row +
                                slot * tiles.image.depth + from,
                           .a_step = blocking.row,
                           .b = weights + slot * panel.slot,
                           .depth = depth,
                           .c = products + xi * blocking.product_plane + range.begin * table.nr,
                           .c_step = table.nr,
                           .rows = range.count,
                           .columns = columns,
                           .add = from > 0 || slot > 0,
                           .lines = slot == 0 ? lines(xi) : Lines{}});
    weights += panel.plane(tiles.tile, xi);
  }
}

// Panel by panel, all blocks of tiles: a part of the weight is transformed and multiplied, and the
// next one comes into cache meanwhile.
inline void multiply_late(const WinogradTiles& tiles, const WinogradBlocking& blocking,
                          const float* v, const TileBlocks& blocks, const WeightView<float>& weight,
                          const WinogradOutput& output) {
  constexpr int64_t channels_in_l1 = 16;
  const int64_t planes = tiles.planes(), sums = planes * blocking.product_plane;
  const WeightParts parts(weight);
  const bool several = parts.count() > 1;
  parallel_tasks(output.panels(), [&](int64_t p) {
    Scratch<float> products(several ? blocks.count * sums : sums);
    Scratch<float> transformed(WinogradPanel(parts.most()).size(tiles.tile));
    const WeightLines lines = parts.lines(p);
    const int64_t channel = p * winograd().nr;
    for (int64_t i = 0; i < parts.count(); ++i) {
      winograd_transform(parts.at(p, i), tiles.tile, WinogradPanel(parts.depth(i)), channels_in_l1,
                         transformed.get());
      const bool last = i + 1 == parts.count();
      const float* const next = parts.next(p, i);
      for (int64_t b = 0; b < blocks.count; ++b) {
        const TileBlock block = blocks.at(b);
        float* const sum = products.get() + (several ? b : 0) * sums;
        multiply_part(tiles, blocking, block, v + b * planes * blocking.plane, transformed.get(),
                      parts.begin(i), parts.depth(i), output.channels - channel, sum,
                      [&](int64_t xi) {
                        if (last) prefetch_outputs(tiles, block, xi, channel, output);
                        return lines.share(next, b * planes + xi, blocks.count * planes);
                      });
        if (last) put_panel(tiles, blocking, sum, block, p, output);
      }
    }
  });
}

}  // namespace nnarch
