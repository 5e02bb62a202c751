// What cpu_winograd_strided.h is made of: where values lie, and products that fetch what comes
// next.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv2d/cpu_winograd.h"
#include "conv2d/winograd_strided.h"
#include "cpu/arena.h"
#include "cpu/pool.h"

namespace nnarch {

// Scratch memory of megabytes, on huge pages where the system gives them.
class LargeBuffer : public Scratch<float> {
 public:
  explicit LargeBuffer(int64_t count) : Scratch<float>(count) {
    prefer_huge_pages(get(), count * int64_t{sizeof(float)});
  }
};

// Where transformed values lie: [plane][row][slot][unit], rows `gap` elements longer.
class StridedPlanes {
 public:
  StridedPlanes(const WinogradTile& tile, int64_t rows, int64_t unit, int64_t gap)
      : begin_(1, 0), tile_(tile), unit_(unit), gap_(gap) {
    for (int64_t plane = 0; plane < tile.planes(); ++plane)
      begin_.push_back(
          checked_sum(begin_.back(), winograd_plane(checked_product(rows, row(plane)))));
    for (int64_t py = 0; py < 2; ++py)
      for (int64_t px = 0; px < 2; ++px)
        for (int64_t i = 0; i < tile.points(tile.rows, py); ++i)
          for (int64_t j = 0; j < tile.points(tile.columns, px); ++j) {
            const int64_t x = tile.point(tile.columns, px, j);
            const int64_t plane = tile.point(tile.rows, py, i) * tile.point_columns() + x;
            const int64_t slot = py * tile.phases_at(tile.columns, x) + px;
            values_.push_back({begin(plane) + slot * unit, row(plane)});
          }
  }

  int64_t size() const { return begin_.back(); }
  int64_t begin(int64_t plane) const { return begin_[plane]; }
  int64_t row(int64_t plane) const { return tile_.slots(plane) * unit_ + gap_; }

  // Where the values of a row are, in the order of the transforms.
  void locate(int64_t row, int64_t* at) const {
    for (const Value& value : values_) *at++ = value.first + row * value.step;
  }

 private:
  struct Value {
    int64_t first, step;  // of row 0, and from row to row
  };
  std::vector<int64_t> begin_;
  std::vector<Value> values_;
  WinogradTile tile_;
  int64_t unit_, gap_;
};

// Memory that is fetched during a product: the next product's.
struct Ahead {
  const float* first;
  int64_t count;
  void fetch(int64_t part, int64_t parts) const {
    for (int64_t i = count * part / parts / 16; i < count * (part + 1) / parts / 16; ++i)
      __builtin_prefetch(first + i * 16, 0, 2);
  }
};
inline Ahead share(const float* memory, int64_t count, int64_t part, int64_t parts) {
  const int64_t from = count * part / parts / 16 * 16;
  return {memory + from, count * (part + 1) / parts - from};
}

// The product by blocks of the depth, whose part of the panel stays in L1 for all tiles of rows.
// Between these the memory would wait: they fetch the rows of sums that come next, and what is
// ahead.
inline void multiply(PanelProduct product, const Ahead& ahead) {
  constexpr int64_t most = 128;
  const PanelProduct whole = product;
  const int64_t rows = product.rows, tiles = ceil_div(rows, winograd().mr);
  const int64_t blocks = ceil_div(product.depth, most);
  product.shares = tiles;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = whole.depth * block / blocks;
    product.depth = whole.depth * (block + 1) / blocks - first;
    product.b = whole.b + first * winograd().nr;
    product.add = whole.add || block > 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t from = rows * t / tiles, to = rows * (t + 1) / tiles;
      const int64_t next = block > 0 ? to : t + 1 < tiles ? rows * (t + 2) / tiles : to;
      for (int64_t row = to; row < next; ++row)
        prefetch_line<true>(whole.c + row * product.c_step, winograd().nr);
      ahead.fetch(block * tiles + t, blocks * tiles);
      product.a = whole.a + from * product.a_step + first;
      product.c = whole.c + from * product.c_step;
      product.rows = to - from, product.share = t;
      winograd().panel_product(product);
    }
  }
}

// By tiles of rows, whose sums stay in L1 or in registers from chain to chain.
inline void multiply_outer(OuterProduct product, const Ahead& first, const Ahead& second) {
  const int64_t rows = product.rows, tiles = ceil_div(rows, winograd().mr);
  const float* const a = product.a;
  float* const c = product.c;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t from = rows * t / tiles, to = rows * (t + 1) / tiles;
    const int64_t next = t + 1 < tiles ? rows * (t + 2) / tiles : to;
    for (int64_t row = to; row < next; ++row)
      prefetch_line<true>(c + row * product.c_step, winograd().nr);
    first.fetch(t, tiles), second.fetch(t, tiles);
    product.a = a + from, product.c = c + from * product.c_step;
    product.rows = to - from;
    winograd().outer_product(product);
  }
}

}  // namespace nnarch
