// The weight gradient: dw[k][tap][c] = Σ_p grad[p][k] · image[p at tap][c], a matrix product over
// the positions p, of a convolution's output or of a batch. Blocks of positions are transposed
// (grad) and gathered (image) into packed form in cache; the product is the one of cpu/gemm.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/arena.h"
#include "cpu/gemm.h"
#include "cpu/layout.h"
#include "cpu/machine.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace nnarch {

// How the work is cut. Output channels go to different tasks; where they are few, so do ranges of
// positions, each with a partial sum of its own that is added in a fixed order afterwards, unless
// these sums are large.
struct WeightGradPlan {
  int64_t k_block, splits;

  // Of one block: the depth of its product. Twice as many gain nothing, and round more.
  static constexpr int64_t positions = 256;

  WeightGradPlan(int64_t k, int64_t weights_per_k, int64_t position_blocks) {
    constexpr int64_t wanted_tasks = 8, partial_limit = int64_t{1} << 19;  // elements
    // The image is packed again for every block of channels.
    const int64_t most = l2_bytes() >= int64_t{2} << 20 ? 384 : 192;
    k_block = ceil_div(k, ceil_div(k, most));
    splits = std::clamp<int64_t>(wanted_tasks / ceil_div(k, k_block), 1, position_blocks);
    splits =
        std::clamp<int64_t>(partial_limit / std::max<int64_t>(1, k * weights_per_k), 1, splits);
  }
};

// Output channels [grad, grad + k) at positions `stride` elements apart; or planar (NCHW), with
// `stride` channels in all and `plane` positions an image.
template <class T>
struct GradView {
  const T* data;
  int64_t stride, positions, k;
  int64_t plane = 0;

  struct Block {
    int64_t first, count;
  };
  // Blocks of positions; of a planar gradient they lie within an image.
  int64_t blocks_of(int64_t all) const { return ceil_div(all, WeightGradPlan::positions); }
  int64_t blocks() const {
    return plane > 0 ? positions / plane * blocks_of(plane) : blocks_of(positions);
  }
  Block block(int64_t b) const {
    const int64_t most = WeightGradPlan::positions;
    if (plane == 0) return {b * most, std::min(most, positions - b * most)};
    const int64_t each = blocks_of(plane), image = b / each, i = b % each;
    const int64_t from = plane * i / each;
    return {image * plane + from, plane * (i + 1) / each - from};
  }
  GradView channels(int64_t from, int64_t count) const {
    return {data + from * (plane > 0 ? plane : 1), stride, positions, count, plane};
  }
  const T* planar_row(int64_t first) const {
    return data + first / plane * stride * plane + first % plane;
  }
};

// The product over `count` positions from `first` on, put in or added to sums[k][tap][c]; `rows`
// points to the image at every position and tap, `depth` values each.
//
// In the terms of cpu/gemm.h: a row of A is one output channel over the block's positions, so grad
// is transposed, unless it is planar; a row of B is one position, so the image rows are packed into
// panels.
template <class T, class Rows>
void position_block(const GradView<T>& grad, Rows& rows, int64_t taps, int64_t depth, int64_t first,
                    int64_t count, bool add, T* sums) {
  const GemmTable<T>& table = gemm<T>();
  // Not a power of two apart: rows of grad would share few sets of the cache.
  const bool planar = grad.plane > 0;
  const int64_t lda = planar ? grad.plane : WeightGradPlan::positions + 16, nr = table.nr;
  Scratch<T> grad_t(planar ? 0 : grad.k * lda);
  if (!planar)
    transpose_fn<T>()(grad.data + first * grad.stride, grad.stride, grad_t.get(), lda, count,
                      grad.k);
  const Strip<T> a{planar ? grad.planar_row(first) : grad_t.get(), 0, grad.k};
  rows.build(first, count);
  constexpr int64_t c_block = 128;
  Scratch<T> panels(count * round_up(std::min(c_block, depth), nr));
  for (int64_t c = 0; c < depth; c += c_block) {
    const int64_t columns = std::min(c_block, depth - c);
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t j = 0; j < columns; j += nr)
        table.pack_rows(rows.get() + tap * rows.stride(), c + j, count, std::min(nr, columns - j),
                        panels.get() + j * count);
      table.run({.depth = count,
                 .b = panels.get(),
                 .c = sums + tap * depth + c,
                 .n = columns,
                 .accumulate = add,
                 .strips = &a,
                 .strip_count = 1,
                 .a_step = lda,
                 .c_step = taps * depth});
    }
  }
}

// sums[k][tap][depth]; make_rows() gives the row pointers of one task, as TapRows and StemWindows
// do. The first of several ranges of positions sums up in place, the others beside it.
template <class T, class MakeRows>
void weight_grad(const GradView<T>& grad, int64_t taps, int64_t depth, const MakeRows& make_rows,
                 T* sums) {
  const int64_t each = taps * depth;
  const int64_t blocks = grad.blocks();
  if (blocks == 0) return std::fill_n(sums, grad.k * each, T{0}), void();
  const WeightGradPlan plan(grad.k, each, blocks);
  const int64_t k_blocks = ceil_div(grad.k, plan.k_block);
  Scratch<T> partial((plan.splits - 1) * grad.k * each);
  const auto of_split = [&](int64_t split) {
    return split == 0 ? sums : partial.get() + (split - 1) * grad.k * each;
  };
  parallel_tasks(k_blocks * plan.splits, [&](int64_t task) {
    const int64_t split = task / k_blocks, first_k = task % k_blocks * plan.k_block;
    const GradView<T> part = grad.channels(first_k, std::min(plan.k_block, grad.k - first_k));
    const int64_t begin = blocks * split / plan.splits, end = blocks * (split + 1) / plan.splits;
    auto rows = make_rows();
    for (int64_t b = begin; b < end; ++b) {
      const auto block = grad.block(b);
      position_block<T>(part, rows, taps, depth, block.first, block.count, b > begin,
                        of_split(split) + first_k * each);
    }
  });
  if (plan.splits == 1) return;
  parallel_tasks(grad.k, [&](int64_t k) {
    T* out = sums + k * each;
    for (int64_t split = 1; split < plan.splits; ++split) {
      const T* own = of_split(split) + k * each;
      for (int64_t i = 0; i < each; ++i) out[i] += own[i];
    }
  });
}

}  // namespace nnarch
