// The tiles of a convolution by Winograd, and where they are.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv2d/winograd.h"
#include "conv2d/winograd_tile.h"
#include "cpu/arena.h"
#include "cpu/gemm.h"
#include "cpu/grid_image.h"

namespace nnarch {

// The grid of tiles that covers the outputs of such a convolution. The image's first tap is the
// upper left one.
struct WinogradTiles {
  const GridImage<float>& image;
  WinogradTile tile;

  int64_t planes() const { return tile.planes(); }
  int64_t rows() const { return ceil_div(image.grid_h, tile.output_rows()); }
  int64_t columns() const { return ceil_div(image.grid_w, tile.output_columns()); }
  int64_t count() const { return image.n * rows() * columns(); }

  // The outputs of the last tile of a column and of a row, or 0 where it is as all others.
  int64_t end_rows() const {
    if (!tile.has_ends()) return 0;
    const int64_t end = image.grid_h % tile.m, other = image.grid_w % tile.m;
    return other == 0 || other == end ? end : 0;  // no transforms for two different ones
  }
  int64_t end_columns() const { return tile.has_ends() ? image.grid_w % tile.m : 0; }

  // Null where all tiles are alike.
  const WinogradEnds* ends() const {
    const int64_t outputs = std::max(end_rows(), end_columns());
    return outputs > 0 ? &winograd_ends(outputs) : nullptr;
  }

  // Products of a pair of channels, of all tiles.
  int64_t values() const {
    if (!tile.has_ends()) return count() * tile.values();
    return image.n * end_points(image.grid_h, end_rows()) * end_points(image.grid_w, end_columns());
  }

 private:
  int64_t end_points(int64_t grid, int64_t end) const {
    const int64_t whole = end > 0 ? grid / tile.m : ceil_div(grid, tile.m);
    return whole * (tile.m + 2) + (end > 0 ? end + 2 : 0);
  }
};

// The first output of a tile.
struct TilePlace {
  int64_t image, y, x;
  TilePlace(const WinogradTiles& tiles, int64_t tile)
      : image(tile / (tiles.rows() * tiles.columns())),
        y(tile / tiles.columns() % tiles.rows() * tiles.tile.output_rows()),
        x(tile % tiles.columns() * tiles.tile.output_columns()) {}

  void to_next(const WinogradTiles& tiles) {
    x += tiles.tile.output_columns();
    if (x < tiles.image.grid_w) return;
    x = 0, y += tiles.tile.output_rows();
    if (y < tiles.image.grid_h) return;
    y = 0, ++image;
  }
};

// f(place) of tiles [first, last), without the divisions of finding each.
template <class F>
void for_each_tile(const WinogradTiles& tiles, int64_t first, int64_t last, const F& f) {
  if (first >= last) return;
  for (TilePlace at(tiles, first); first < last; ++first, at.to_next(tiles)) f(at);
}

// Tiles of a block in the order of their values. There are four kinds: 1 ends a row, 2 a column, 3
// both and 0 nothing; in the order 1, 0, 2, 3 those that have values in a plane lie together.
class TileBlock {
 public:
  struct Range {
    int64_t begin, count;
  };

  TileBlock(const WinogradTiles& tiles, int64_t first, int64_t count)
      : tile_(tiles.tile),
        end_rows_(tiles.end_rows()),
        end_columns_(tiles.end_columns()),
        places_(count) {
    const int64_t m = tile_.m;
    // An end begins past these.
    const int64_t most_y = end_rows_ > 0 ? tiles.image.grid_h - m : tiles.image.grid_h;
    const int64_t most_x = end_columns_ > 0 ? tiles.image.grid_w - m : tiles.image.grid_w;
    const bool has_ends = end_rows_ > 0 || end_columns_ > 0;
    int64_t next = 0;
    for (int64_t i = 0; i < 4; ++i) {
      if (has_ends || kOrder[i] == 0)
        for_each_tile(tiles, first, first + count, [&](const TilePlace& at) {
          if (2 * (at.y > most_y) + (at.x > most_x) == kOrder[i]) places_[next++] = at;
        });
      end_[i] = next;
    }
  }

  Range all() const { return {0, end_[3]}; }

  // The tiles that have values in a plane.
  Range with_plane(int64_t xi) const {
    const int64_t row = xi / tile_.point_columns(), column = xi % tile_.point_columns();
    const bool ends_of_rows = end_columns_ == 0 || tile_.end_has(end_columns_, column);
    const bool ends_of_columns = end_rows_ == 0 || tile_.end_has(end_rows_, row);
    const int64_t begin = ends_of_rows ? 0 : end_[0];
    return {begin, end_[ends_of_columns ? (ends_of_rows ? 3 : 2) : 1] - begin};
  }

  // f(place, kind) of some of them.
  template <class F>
  void for_each(const Range& range, const F& f) const {
    for (int64_t i = 0, t = range.begin; i < 4; ++i)
      for (; t < std::min(end_[i], range.begin + range.count); ++t) f(places_[t], kOrder[i]);
  }

 private:
  static constexpr int64_t kOrder[] = {1, 0, 2, 3};
  const WinogradTile& tile_;
  int64_t end_rows_, end_columns_;
  Scratch<TilePlace> places_;
  int64_t end_[4];  // of the kinds in their order
};

}  // namespace nnarch
