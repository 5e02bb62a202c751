// The weight gradient by Winograd: an m × m tile of the output's gradient is a filter over the
// (m + 2)² inputs around it, with 3 × 3 outputs. Transformed, the sum over tiles is a matrix
// product for each of (m + 2)² planes; one inverse transform at the end makes dw. With stride 2 it
// is the transpose of the forward pass: as many products, in planes of several slots.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv2d/cpu_weight_rows.h"
#include "conv2d/cpu_winograd.h"

namespace nnarch {

class WinogradWeightGrad {
 public:
  // grad is an image with its own channels; image.taps are those of the tile. `channels_last`: dw
  // is [k][tap][c], else [k][c][tap].
  WinogradWeightGrad(const GridImage<float>& image, const GridImage<float>& grad,
                     const WinogradTile& tile, bool channels_last)
      : tiles_{image, tile},
        channels_last_(channels_last),
        depth_(image.depth),
        k_(grad.depth),
        c_row_(winograd_row(tile.most_slots() * depth_)),
        k_row_(winograd_row(k_)),
        columns_(round_up(tile.most_slots() * depth_, winograd().nr / 2)),
        block_(tiles_a_block()),
        inputs_(input_windows(tiles_, c_row_, winograd_plane(block_ * c_row_))),
        grads_{.image = grad,
               .row_step = 1,
               .column_step = 1,
               .dy = 0,
               .dx = 0,
               .rows = tile.output_rows(),
               .columns = tile.output_columns(),
               .end_rows = tiles_.end_rows(),
               .end_columns = tiles_.end_columns(),
               .transform = winograd_transforms(tile).grad,
               .of_ends = tiles_.ends() ? tiles_.ends()->grad : nullptr,
               .row = k_row_,
               .plane = winograd_plane(block_ * k_row_)} {}

  void run(float* dw) const {
    const WeightRows<float> rows(dw, k_, tiles_.tile.taps(), depth_, channels_last_);
    Scratch<float> v(tiles_.planes() * inputs_.plane), g(tiles_.planes() * grads_.plane);
    if (block_ == tiles_.count()) return by_channels(v.get(), g.get(), rows);
    by_planes(v.get(), g.get(), rows);
  }

 private:
  static constexpr int64_t kFloat = sizeof(float);

  // All tiles, if their planes are no larger than the sums, which then stay in L2 part by part.
  // Else blocks: the slices of a plane stay in L2, all planes in L3, and the sums, which are read
  // and written once a block, are paid for by many tiles.
  int64_t tiles_a_block() const {
    constexpr int64_t slice = int64_t{512} << 10, all = int64_t{6} << 20, least = 32;
    if (tiles_.count() * (c_row_ + k_row_) <= k_ * columns_) return tiles_.count();
    const int64_t bytes = (c_row_ + k_row_) * kFloat;
    const int64_t fit = std::min(slice / bytes, all / (tiles_.planes() * bytes));
    return std::min(std::max(fit, least), tiles_.count());
  }

  void transform(const TileBlock& block, float* v, float* g) const {
    constexpr int64_t few = 8;
    const int64_t count = block.all().count;
    parallel_tasks(ceil_div(count, few), [&](int64_t i) {
      const int64_t from = i * few;
      const TileBlock::Range some{from, std::min(few, count - from)};
      inputs_.run(block, some, 0, depth_, v + from * c_row_);
      grads_.run(block, some, 0, k_, g + from * k_row_);
    });
  }

  // sums of channels [k, k + rows) in plane xi, put in or added to c[row][columns].
  void multiply(int64_t xi, int64_t k, int64_t rows, const TileBlock& block, bool add,
                const float* v, const float* g, float* c) const {
    const TileBlock::Range some = block.with_plane(xi);
    winograd().outer_product(
        {.a = g + xi * grads_.plane + some.begin * k_row_ + k,
         .a_step = k_row_,
         .b = v + xi * inputs_.plane + some.begin * c_row_,
         .b_step = c_row_,
         .depth = some.count,
         .c = c,
         .c_step = columns_,
         .rows = rows,
         .columns = columns_ * tiles_.tile.slots(xi) / tiles_.tile.most_slots(),
         .add = add});
  }

  // dw of channel k from its sums.
  void finish(const float* products, int64_t plane, int64_t k, const WeightRows<float>& dw) const {
    const auto transform = winograd_transforms(tiles_.tile).weight_grad;
    const bool whole_lines = winograd().nr / 2 * kFloat == 64;
    if (float* const row = dw.in_place(k); row && (whole_lines || !dw.past_caches()))
      return transform(products, plane, depth_, depth_, row, depth_, dw.past_caches());
    Scratch<float> lines(tiles_.tile.taps() * depth_);
    transform(products, plane, depth_, depth_, lines.get(), depth_, false);
    dw.put(lines.get(), depth_, k, 0, depth_);
  }

  void by_channels(float* v, float* g, const WeightRows<float>& dw) const {
    constexpr int64_t cache = int64_t{512} << 10;
    const TileBlock block(tiles_, 0, tiles_.count());
    transform(block, v, g);
    const int64_t mr = winograd().mr, fit = cache / (tiles_.planes() * columns_ * kFloat);
    const int64_t rows = std::clamp(fit / mr * mr, mr, round_up(k_, mr));
    const int64_t plane = winograd_plane(rows * columns_);
    parallel_tasks(ceil_div(k_, rows), [&](int64_t i) {
      const int64_t k = i * rows, some = std::min(rows, k_ - k);
      Scratch<float> products(tiles_.planes() * plane);
      for (int64_t xi = 0; xi < tiles_.planes(); ++xi)
        multiply(xi, k, some, block, false, v, g, products.get() + xi * plane);
      for (int64_t r = 0; r < some; ++r) finish(products.get() + r * columns_, plane, k + r, dw);
    });
  }

  void by_planes(float* v, float* g, const WeightRows<float>& dw) const {
    const int64_t plane = winograd_plane(k_ * columns_);
    Scratch<float> products(tiles_.planes() * plane);
    for (int64_t first = 0; first < tiles_.count(); first += block_) {
      const TileBlock block(tiles_, first, std::min(block_, tiles_.count() - first));
      transform(block, v, g);
      parallel_tasks(tiles_.planes(), [&](int64_t xi) {
        multiply(xi, 0, k_, block, first > 0, v, g, products.get() + xi * plane);
      });
    }
    parallel_tasks(k_, [&](int64_t k) { finish(products.get() + k * columns_, plane, k, dw); });
  }

  WinogradTiles tiles_;
  bool channels_last_;
  int64_t depth_, k_, c_row_, k_row_, columns_, block_;
  WinogradWindows inputs_, grads_;
};

}  // namespace nnarch
