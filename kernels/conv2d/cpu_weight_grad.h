// The weight gradient: dw[k][tap][c] = Σ_p grad[p][k] · image[p at tap][c], a matrix product over
// the output positions p. Blocks of positions are transposed (grad) and gathered (image) into
// packed form in cache; the product is the one of cpu/gemm.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "cpu/grid_image.h"
#include "cpu/arena.h"
#include "cpu/gemm.h"
#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace nnarch {

// How the work is cut. Output channels go to different tasks; where they are few, so do ranges of
// positions, each with a partial sum of its own that is added in a fixed order afterwards.
struct WeightGradPlan {
  static constexpr int64_t positions = 256;  // of one block: the depth of its product
  int64_t k_block, splits;

  WeightGradPlan(int64_t k, int64_t weights_per_k, int64_t position_blocks) {
    constexpr int64_t wanted_tasks = 8, partial_limit = int64_t{4} << 20;  // elements
    k_block = std::min<int64_t>(k, 192);
    splits = std::clamp<int64_t>(wanted_tasks / ceil_div(k, k_block), 1, position_blocks);
    splits = std::clamp<int64_t>(partial_limit / std::max<int64_t>(1, k * weights_per_k), 1, splits);
  }
};

// Adds the block of `count` positions to sums[k][tap][c].
template <class T>
void add_position_block(const T* grad, int64_t grad_stride, const GridImage<T>& image,
                        TapRows<T>& rows, int64_t first, int64_t count, int64_t k, T* sums) {
  const GemmTable<T>& table = gemm<T>();
  const int64_t taps = static_cast<int64_t>(image.taps.size()), nr = table.nr;
  const int64_t lda = WeightGradPlan::positions;
  Scratch<T> grad_t(k * lda);
  transpose_fn<T>()(grad + first * grad_stride, grad_stride, grad_t.get(), lda, count, k);
  Scratch<const T*> a(k);
  Scratch<int64_t> offsets(k);
  for (int64_t i = 0; i < k; ++i) {
    a[i] = grad_t.get() + i * lda;
    offsets[i] = i * taps * image.depth;
  }
  rows.build(first, count);
  constexpr int64_t c_block = 128;
  Scratch<T> panel(count * round_up(std::min(c_block, image.depth), nr));
  for (int64_t c = 0; c < image.depth; c += c_block) {
    const int64_t columns = std::min(c_block, image.depth - c);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const T* const* from = rows.get() + tap * rows.stride();
      for (int64_t j = 0; j < columns; j += nr)
        for (int64_t i = 0; i < count; ++i)
          table.pack_panel(from[i] + c + j, 0, 1, 1, std::min(nr, columns - j),
                           panel.get() + (j * count + i * nr));
      table.run({a.get(), 0, 1, count, panel.get(), sums + tap * image.depth + c, offsets.get(), k,
                 columns, true, {}});
    }
  }
}

// dw is [k][c][tap], dense; grad has `grad_stride` elements from one position to the next.
template <class T>
void weight_grad(const T* grad, int64_t grad_stride, const GridImage<T>& image, int64_t k, T* dw) {
  const int64_t taps = static_cast<int64_t>(image.taps.size()), c = image.depth;
  const int64_t each = taps * c, positions = image.positions();
  const int64_t blocks = ceil_div(positions, WeightGradPlan::positions);
  const WeightGradPlan plan(k, each, std::max<int64_t>(blocks, 1));
  const int64_t k_blocks = ceil_div(k, plan.k_block);
  Scratch<T> partial(plan.splits * k * each);
  parallel_tasks(k_blocks * plan.splits, [&](int64_t task) {
    const int64_t split = task / k_blocks, first_k = task % k_blocks * plan.k_block;
    const int64_t count_k = std::min(plan.k_block, k - first_k);
    T* sums = partial.get() + (split * k + first_k) * each;
    std::memset(sums, 0, static_cast<size_t>(count_k * each) * sizeof(T));
    TapRows<T> rows(image, WeightGradPlan::positions);
    for (int64_t b = blocks * split / plan.splits; b < blocks * (split + 1) / plan.splits; ++b) {
      const int64_t first = b * WeightGradPlan::positions;
      add_position_block<T>(grad + first_k, grad_stride, image, rows, first,
                            std::min(WeightGradPlan::positions, positions - first), count_k, sums);
    }
  });
  parallel_tasks(k, [&](int64_t row) {
    T* out = dw + row * each;
    T* sums = partial.get() + row * each;
    for (int64_t split = 1; split < plan.splits; ++split)
      for (int64_t i = 0; i < each; ++i) sums[i] += sums[split * k * each + i];
    for (int64_t i = 0; i < c; ++i)
      for (int64_t tap = 0; tap < taps; ++tap) out[i * taps + tap] = sums[tap * c + i];
  });
}

}  // namespace nnarch
