// The weight gradient: dw[k][tap][c] = Σ_p grad[p][k] · image[p at tap][c], a matrix product over
// the positions p, of a convolution's output or of a batch. Blocks of positions are transposed
// (grad) and gathered (image) into packed form in cache; the product is the one of cpu/gemm.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/arena.h"
#include "cpu/gemm.h"
#include "cpu/layout.h"
#include "cpu/machine.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace nnarch {

// How the work is cut. Threads share blocks of output channels, whose gradient lies transposed in
// the second-level cache; where they are few, also ranges of positions, each with a partial sum of
// its own that is added in a fixed order afterwards, unless these sums are large.
struct WeightGradPlan {
  int64_t k_block, k_blocks, splits;

  // Of one block: the depth of its product. Twice as many gain nothing, and round more.
  static constexpr int64_t positions = 256;

  WeightGradPlan(int64_t k, int64_t weights_per_k, int64_t position_blocks, int64_t mr) {
    constexpr int64_t wanted_blocks = 8, partial_limit = int64_t{1} << 19;  // elements
    const int64_t most = l2_bytes() >= int64_t{2} << 20 ? 384 : 192;
    k_block = round_up(ceil_div(k, ceil_div(k, most)), mr);
    k_blocks = ceil_div(k, k_block);
    splits = std::clamp<int64_t>(wanted_blocks / k_blocks, 1, position_blocks);
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

// Columns [tap][channel, channel + count) of the product.
struct WeightColumns {
  int64_t tap, channel, count;
};

// All columns, in groups of which one block of positions is packed at a time: 1 MB, read from the
// last-level cache if need be, a panel for every block of output channels. Packing the image for
// each of these blocks took a tenth of the time, for a larger group the gradient is transposed less
// often.
template <class T>
std::vector<std::vector<WeightColumns>> column_groups(int64_t taps, int64_t depth, int64_t nr) {
  constexpr int64_t most = 4096 / static_cast<int64_t>(sizeof(T));
  const int64_t pieces = std::max<int64_t>(1, ceil_div(depth, most));
  const int64_t piece = round_up(ceil_div(depth, pieces), nr);
  std::vector<std::vector<WeightColumns>> groups;
  int64_t room = 0;
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < depth; c += piece) {
      if (room < piece) groups.emplace_back(), room = most;
      groups.back().push_back({tap, c, std::min(piece, depth - c)});
      room -= piece;
    }
  return groups;
}

// The products of blocks of positions: put in or added to sums[k][tap][c]. `Rows` points to the
// image at every position and tap, `depth` values each.
//
// In the terms of cpu/gemm.h: a row of A is one output channel over the block's positions, so grad
// is transposed, unless it is planar; a row of B is one position, so the image rows are packed into
// panels.
template <class T, class Rows>
class PositionBlocks {
 public:
  PositionBlocks(Rows& rows, int64_t taps, int64_t depth, int64_t k_block)
      : rows_(rows),
        taps_(taps),
        depth_(depth),
        k_block_(k_block),
        groups_(column_groups<T>(taps, depth, table_.nr)) {}

  void add(const GradView<T>& grad, const typename GradView<T>::Block& block, bool add, T* sums) {
    rows_.build(block.first, block.count);
    for (const auto& group : groups_) {
      int64_t columns = 0;
      for (const WeightColumns& w : group) columns += round_up(w.count, table_.nr);
      const Scratch<T> panels(columns * block.count);
      pack(group, block.count, panels.get());
      for (int64_t k = 0; k < grad.k; k += k_block_)
        multiply(grad.channels(k, std::min(k_block_, grad.k - k)), block, group, panels.get(), add,
                 sums + k * taps_ * depth_);
    }
  }

 private:
  void pack(const std::vector<WeightColumns>& group, int64_t count, T* panel) {
    const int64_t nr = table_.nr;
    for (const WeightColumns& w : group)
      for (int64_t j = 0; j < w.count; j += nr, panel += count * nr)
        table_.pack_rows(rows_.get() + w.tap * rows_.stride(), w.channel + j, count,
                         std::min(nr, w.count - j), panel);
  }

  void multiply(const GradView<T>& grad, const typename GradView<T>::Block& block,
                const std::vector<WeightColumns>& group, const T* panels, bool add, T* sums) {
    // Not a power of two apart: rows of grad would share few sets of the cache.
    const bool planar = grad.plane > 0;
    const int64_t lda = planar ? grad.plane : WeightGradPlan::positions + 16;
    const Scratch<T> grad_t(planar ? 0 : grad.k * lda);
    if (!planar)
      transpose_fn<T>()(grad.data + block.first * grad.stride, grad.stride, grad_t.get(), lda,
                        block.count, grad.k);
    const Strip<T> a{planar ? grad.planar_row(block.first) : grad_t.get(), 0, grad.k};
    for (const WeightColumns& w : group) {
      const T* next = panels + round_up(w.count, table_.nr) * block.count;
      table_.run({.depth = block.count,
                  .b = panels,
                  .b_after = &w == &group.back() ? nullptr : next,
                  .c = sums + w.tap * depth_ + w.channel,
                  .n = w.count,
                  .accumulate = add,
                  .strips = &a,
                  .strip_count = 1,
                  .a_step = lda,
                  .c_step = taps_ * depth_});
      panels = next;
    }
  }

  const GemmTable<T>& table_ = gemm<T>();
  Rows& rows_;
  int64_t taps_, depth_, k_block_;
  std::vector<std::vector<WeightColumns>> groups_;
};

// sums[k][tap][depth]; make_rows() gives the row pointers of one thread, as TapRows and StemWindows
// do. The first of several ranges of positions sums up in place, the others beside it.
template <class T, class MakeRows>
void weight_grad(const GradView<T>& grad, int64_t taps, int64_t depth, const MakeRows& make_rows,
                 T* sums) {
  const int64_t each = taps * depth;
  const int64_t blocks = grad.blocks();
  if (blocks == 0) return std::fill_n(sums, grad.k * each, T{0}), void();
  const WeightGradPlan plan(grad.k, each, blocks, gemm<T>().mr);
  Scratch<T> partial((plan.splits - 1) * grad.k * each);
  const auto of_split = [&](int64_t split) {
    return split == 0 ? sums : partial.get() + (split - 1) * grad.k * each;
  };
  parallel_ranges(plan.k_blocks * plan.splits, [&](int64_t from, int64_t to) {
    auto rows = make_rows();
    PositionBlocks<T, decltype(rows)> positions(rows, taps, depth, plan.k_block);
    for (int64_t unit = from, next; unit < to; unit = next) {
      const int64_t split = unit / plan.k_blocks, past = split * plan.k_blocks;
      next = std::min(to, past + plan.k_blocks);
      const int64_t k = (unit - past) * plan.k_block;
      const GradView<T> part = grad.channels(k, std::min((next - past) * plan.k_block, grad.k) - k);
      const int64_t begin = blocks * split / plan.splits, end = blocks * (split + 1) / plan.splits;
      for (int64_t b = begin; b < end; ++b)
        positions.add(part, grad.block(b), b > begin, of_split(split) + k * each);
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
