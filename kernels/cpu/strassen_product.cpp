#include "cpu/strassen_product.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/machine.h"
#include "cpu/parallel.h"
#include "cpu/strassen_weights.h"

namespace nnarch {
namespace {

// Columns of a half whose seven products lie in cache together.
int64_t block_columns() { return std::max<int64_t>(128, gemm<float>().nr); }

struct Exponents {
  std::vector<int> columns, depth;
};

// First those of the columns, then those of the rows of the scaled columns.
Exponents exponents_of(const WeightView<float>& w) {
  Exponents e{std::vector<int>(w.columns), std::vector<int>(w.depth)};
  std::vector<float> rows(w.depth, 0.0f);
  for (int64_t j = 0; j < w.columns; ++j) {
    const float* column = w.data + j * w.column_stride;
    float largest = 0;
    for (int64_t k = 0; k < w.depth; ++k)
      largest = std::max(largest, std::abs(column[k * w.depth_stride]));
    e.columns[j] = strassen_exponent(largest);
    const float scale = std::ldexp(1.0f, -e.columns[j]);
    for (int64_t k = 0; k < w.depth; ++k)
      rows[k] = std::max(rows[k], std::abs(column[k * w.depth_stride]) * scale);
  }
  for (int64_t k = 0; k < w.depth; ++k) e.depth[k] = strassen_exponent(rows[k]);
  return e;
}

// A panel of a quarter of the weight, scaled.
void pack_quarter(const WeightView<float>& w, const Exponents& e, int64_t depth, int64_t column,
                  float* to) {
  const GemmTable<float>& table = gemm<float>();
  const int64_t nr = table.nr, half = w.depth / 2;
  table.pack_panel(w.data + depth * w.depth_stride + column * w.column_stride, w.depth_stride,
                   w.column_stride, half, nr, to);
  std::vector<float> scale(nr);
  for (int64_t j = 0; j < nr; ++j) scale[j] = std::ldexp(1.0f, -e.columns[column + j]);
  for (int64_t k = 0; k < half; ++k) {
    const float of_row = std::ldexp(1.0f, -e.depth[depth + k]);
    for (int64_t j = 0; j < nr; ++j) to[k * nr + j] *= of_row * scale[j];
  }
}

// Pairs that go through the weight together: their left factors stay in the second-level cache.
int64_t pairs_in_cache(int64_t depth) {
  constexpr int64_t most = 98;
  const int64_t mr = gemm<float>().mr;
  const int64_t bytes = kStrassenProducts * (depth / 2) * int64_t{sizeof(float)};
  return std::max<int64_t>(1, std::min(l2_bytes() / 2 / bytes, most) / mr) * mr;
}

// The pairs [first, last) of all images.
void list_pairs(const GridImage<float>& image, const OutputGrid& out, int64_t first, int64_t last,
                PixelPair* to) {
  const int64_t plane = image.grid_h * image.grid_w, of_image = pairs_of_image(image);
  const auto input = [&](int64_t n, int64_t i) {
    const int64_t y = i / image.grid_w * image.step_y, x = i % image.grid_w * image.step_x;
    return image.data + ((n * image.h + y) * image.w + x) * image.pixel;
  };
  const auto output = [&](int64_t n, int64_t i) {
    return n * out.image_step + i / image.grid_w * out.row_step +
           i % image.grid_w * out.column_step;
  };
  for (int64_t pair = first; pair < last; ++pair) {
    const int64_t n = pair / of_image, i = pair % of_image * 2;
    const bool both = i + 1 < plane;
    *to++ = {input(n, i), both ? input(n, i + 1) : nullptr, output(n, i),
             both ? output(n, i + 1) : 0};
  }
}

}  // namespace

int strassen_exponent(float largest) {
  constexpr int most = 60;
  if (largest == 0) return -most;
  return std::isfinite(largest) ? std::clamp(std::ilogb(largest), -most, most) : 0;
}

bool strassen_serves(int64_t columns, int64_t depth) {
  return depth > 0 && depth % 32 == 0 && columns > 0 && columns % (2 * gemm<float>().nr) == 0;
}

int64_t strassen_packed_size(int64_t columns, int64_t depth) {
  const int64_t factors = kStrassenProducts * (columns / 2) * (depth / 2);
  return checked_sum(columns + depth, factors);
}

void strassen_pack(const WeightView<float>& w, float* packed) {
  const int64_t nr = gemm<float>().nr, half = w.depth / 2, columns = w.columns / 2;
  const int64_t panel = half * nr, block = block_columns();
  const Exponents e = exponents_of(w);
  for (int64_t k = 0; k < w.depth; ++k) *packed++ = std::ldexp(1.0f, e.depth[k]);
  for (int64_t j = 0; j < w.columns; ++j) *packed++ = std::ldexp(1.0f, e.columns[j]);
  parallel_tasks(columns / nr, [&](int64_t task) {
    const Scratch<float> quarters(4 * panel);
    float *b11 = quarters.get(), *b12 = b11 + panel, *b21 = b12 + panel, *b22 = b21 + panel;
    const int64_t column = task * nr, first = column / block * block;
    pack_quarter(w, e, 0, column, b11), pack_quarter(w, e, 0, columns + column, b12);
    pack_quarter(w, e, half, column, b21), pack_quarter(w, e, half, columns + column, b22);
    const int64_t product = std::min(block, columns - first) * half;
    float* to = packed + first * kStrassenProducts * half + (column - first) * half;
    for (int64_t i = 0; i < panel; ++i) {
      const auto right = right_factors(b11[i], b12[i], b21[i], b22[i]);
      for (int64_t m = 0; m < kStrassenProducts; ++m) to[m * product + i] = right[m];
    }
  });
}

StrassenProduct::StrassenProduct(const float* packed, int64_t columns, int64_t depth, int64_t pairs,
                                 const Epilogue<float>& epilogue)
    : packed_(packed),
      columns_(columns),
      depth_(depth),
      left_step_((depth / 32 | 1) * 16),
      most_pairs_(std::min(pairs, pairs_in_cache(depth))),
      activation_(epilogue.activation),
      alpha_(epilogue.alpha),
      pairs_(most_pairs_),
      left_(kStrassenProducts * most_pairs_ * left_step_),
      products_(kStrassenProducts * most_pairs_ * block_columns()),
      scale_(columns),
      shift_(columns) {
  const float* of_columns = packed + depth;
  for (int64_t j = 0; j < columns; ++j) {
    scale_[j] = epilogue.scale ? of_columns[j] * epilogue.scale[j] : of_columns[j];
    shift_[j] = epilogue.shift ? epilogue.shift[j] : 0.0f;
  }
}

void StrassenProduct::run(const GridImage<float>& image, float* c, const float* residual,
                          const OutputGrid& out, int64_t first, int64_t last, bool stream,
                          int64_t part, int64_t parts) {
  const int64_t most = block_columns(), all_columns = ceil_div(columns_ / 2, most);
  const int64_t from_column = all_columns * part / parts * most,
                to_column = std::min(all_columns * (part + 1) / parts * most, columns_ / 2);
  const int64_t blocks = ceil_div(last - first, most_pairs_);
  const bool dense = image.step_x == 1 && image.step_y == 1;
  const int64_t all = image.n * pairs_of_image(image);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t from = first + (last - first) * i / blocks,
                  to = first + (last - first) * (i + 1) / blocks, count = to - from;
    list_pairs(image, out, from, to, pairs_.get());
    const float* after = dense && to < all ? pairs_[count - 1].first + 2 * image.pixel : nullptr;
    run_block({count, from_column, to_column, c, residual, stream, after,
               std::min(count, all - to) * 2 * image.pixel});
  }
}

void StrassenProduct::run_block(const Block& block) {
  const StrassenTable& table = NNARCH_SELECT(strassen_table());
  const int64_t half = depth_ / 2, columns = columns_ / 2, most = block_columns();
  for (int64_t i = 0; i < block.pairs; ++i)
    table.add_channels(pairs_[i], pairs_[std::min(i + 1, block.pairs - 1)], packed_, half,
                       left_.get() + i * left_step_, most_pairs_ * left_step_);
  for (int64_t first = block.from; first < block.to; first += most) {
    const int64_t some = std::min(most, block.to - first);
    for (int64_t m = 0; m < kStrassenProducts; ++m) multiply(block, m, first, some);
    table.add_products({.products = products_.get(),
                        .row_step = some,
                        .product_step = most_pairs_ * some,
                        .columns = some,
                        .c = block.c + first,
                        .half = columns,
                        .scale = scale_.get() + first,
                        .shift = shift_.get() + first,
                        .residual = block.residual ? block.residual + first : nullptr,
                        .activation = activation_,
                        .alpha = alpha_,
                        .stream = block.stream},
                       pairs_.get(), block.pairs);
  }
}

void StrassenProduct::multiply(const Block& block, int64_t m, int64_t first, int64_t columns) {
  const int64_t half = depth_ / 2;
  const auto factor = [&](int64_t column) {
    return packed_ + depth_ + columns_ + kStrassenProducts * column * half;
  };
  const float* b = factor(first) + m * columns * half;
  const bool last_columns = first + columns == block.to;
  const bool last = last_columns && m + 1 == kStrassenProducts;
  // With the last columns a seventh of the pixels that come next.
  const int64_t part = round_up(ceil_div(block.after_size, kStrassenProducts), 16);
  const bool fetches = last_columns && block.after;
  // While M1 to M4 are made, a quarter each of the outputs and of the residual.
  const PixelPair& top = pairs_[0];
  const int64_t quarter = first + (m < 2 ? top.c_first : top.c_second) + m % 2 * (columns_ / 2);
  const float* lines[2] = {m < 4 && !block.stream ? block.c + quarter : nullptr,
                           m < 4 && block.residual ? block.residual + quarter : nullptr};
  if (!lines[0]) std::swap(lines[0], lines[1]);
  const Strip<float> rows{left_.get() + m * most_pairs_ * left_step_, 0, block.pairs};
  gemm<float>().run({.depth = half,
                     .b = b,
                     .b_after = last ? factor(block.from) : b + columns * half,
                     .after = fetches ? Later<float>{block.after + m * part, part} : Later<float>{},
                     .c = products_.get() + m * most_pairs_ * columns,
                     .n = columns,
                     .longest_sum = 256,
                     .strips = &rows,
                     .strip_count = 1,
                     .a_step = left_step_,
                     .c_step = columns,
                     .fetched = lines[0],
                     .fetched_too = lines[1],
                     .fetched_step = block.pairs > 1 ? pairs_[1].c_first - top.c_first : 0});
}

void strassen_gemm(const GridImage<float>& image, const float* packed, int64_t columns, float* c,
                   const OutputGrid& out, const Epilogue<float>& epilogue) {
  const int64_t pairs = image.n * pairs_of_image(image);
  // Enough tasks for several threads: few pairs don't hide that a block reads all weights, so
  // blocks are cut by columns, too, for each of which left factors are made anew.
  constexpr int64_t wanted_tasks = 8, least_pairs = 24;
  const int64_t blocks = std::max(ceil_div(pairs, pairs_in_cache(image.depth)),
                                  std::min(wanted_tasks, pairs / least_pairs));
  const int64_t parts = std::min(ceil_div(wanted_tasks, std::max<int64_t>(blocks, 1)),
                                 ceil_div(columns / 2, block_columns()));
  const bool stream = outgrows_caches<float>(c, image.positions(), out);
  parallel_tasks(blocks * parts, [&](int64_t task) {
    const int64_t block = task / parts;
    const int64_t first = pairs * block / blocks, last = pairs * (block + 1) / blocks;
    StrassenProduct(packed, columns, image.depth, last - first, epilogue)
        .run(image, c, epilogue.residual, out, first, last, stream, task % parts, parts);
  });
}

}  // namespace nnarch
