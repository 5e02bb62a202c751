// Convolution by implicit GEMM: for a block of output positions, row pointers into the image take
// the place of an unfolded input.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/gemm.h"
#include "cpu/grid_image.h"
#include "cpu/machine.h"
#include "cpu/padding_classes.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace nnarch {

// Where a grid position is written: c + image * image_step + gy * row_step + gx * column_step.
struct OutputGrid {
  int64_t image_step, row_step, column_step;
};

// Whether a grid's outputs are written past the caches. With a stride, rows begin at cache lines
// where each of the steps does: an image of 75 × 75 × 40 floats ends in the middle of a line. Where
// rows are narrow, every tile stores to pages of its own; lines that are fetched ahead have the
// page's address looked up in time, a store past the caches waits. 32 to 64 channels of 112×112,
// N 8, AVX-512: 4.2 ms past the caches, 3.9 through them; 64 to 64 of 56×56 2.08 and 1.89. Where
// the last-level cache is far, 26 MB are better off past it, 3.1 and 3.7 ms, and 6 MB are not, 1.46
// and 1.37.
template <class T>
bool outgrows_caches(const T* c, int64_t positions, const OutputGrid& out) {
  constexpr int64_t line = 64 / int64_t{sizeof(T)}, narrow = 4 * line;
  const int64_t bytes = positions * out.column_step * int64_t{sizeof(T)};
  const bool from_afar = far_l3() && bytes >= kFarBytes;
  if (out.column_step <= narrow && isa() == Isa::avx512 && !from_afar) return false;
  return out.image_step % line == 0 && out.row_step % line == 0 &&
         outgrows_caches<T>(c, positions, out.column_step);
}

struct Blocking {
  int64_t rows, columns;
};

// Blocks of output positions and channels: the rows of A stay in L2 while panels of B pass by, and
// there are enough blocks to keep several threads busy. Depends on the shape only.
template <class T>
Blocking choose_blocking(const GridImage<T>& image, int64_t columns) {
  constexpr int64_t row_cache = int64_t{200} << 10, most_columns = 256, wanted_tasks = 8;
  const int64_t mr = gemm<T>().mr, nr = gemm<T>().nr;
  const int64_t row_bytes = std::clamp<int64_t>(image.depth, 1, 1024) * int64_t{sizeof(T)};
  const int64_t positions = image.positions();
  // Several rows of the image hold enough border pixels for register tiles of their own.
  const bool windows = image.taps.size() > 1;
  const int64_t most_rows = windows ? 384 : 196, unit = windows ? image.grid_w : mr;
  const int64_t row_blocks =
      ceil_div(positions, std::clamp<int64_t>(row_cache / row_bytes, 48, most_rows));
  int64_t column_blocks = ceil_div(columns, most_columns);
  while (row_blocks * column_blocks < wanted_tasks && columns / (column_blocks + 1) >= 4 * nr)
    ++column_blocks;
  return {round_up(ceil_div(positions, row_blocks), unit),
          round_up(ceil_div(columns, column_blocks), nr)};
}

// Whether a convolution reads one pixel for every position, none of them in the padding.
template <class T>
bool reads_inside(const GridImage<T>& g) {
  const auto inside = [](int64_t grid, int64_t step, int64_t offset, int64_t size) {
    return offset >= 0 && (grid - 1) * step + offset < size;
  };
  return g.taps.size() == 1 && inside(g.grid_h, g.step_y, g.taps[0].dy, g.h) &&
         inside(g.grid_w, g.step_x, g.taps[0].dx, g.w);
}

// In rows long enough for register tiles of their own. Then no row pointers are needed.
template <class T>
bool reads_evenly(const GridImage<T>& g) {
  constexpr int64_t least = 4;
  const bool joined = g.grid_h == 1 || (g.step_y == 1 && g.step_x == 1 && g.grid_w == g.w);
  return (joined || g.grid_w >= least) && reads_inside(g);
}

// The strips of a block of such positions.
template <class T>
class BlockStrips {
 public:
  BlockStrips(const GridImage<T>& image, const OutputGrid& out, int64_t first, int64_t count)
      : strips_(count / image.grid_w + 2), a_step_(image.step_x * image.pixel) {
    const Tap& tap = image.taps[0];
    for_each_run(first, count, image, [&](const Run& run) {
      const int64_t y = run.gy * image.step_y + tap.dy, x = run.gx * image.step_x + tap.dx;
      add({image.data + ((run.image * image.h + y) * image.w + x) * image.pixel,
           run.image * out.image_step + run.gy * out.row_step + run.gx * out.column_step,
           run.count},
          out.column_step);
    });
  }

  const Strip<T>* get() const { return strips_.get(); }
  int64_t count() const { return count_; }
  int64_t a_step() const { return a_step_; }

 private:
  void add(const Strip<T>& strip, int64_t c_step) {
    if (count_ > 0) {
      Strip<T>& last = strips_[count_ - 1];
      if (last.a + last.rows * a_step_ == strip.a && last.c + last.rows * c_step == strip.c) {
        last.rows += strip.rows;
        return;
      }
    }
    strips_[count_++] = strip;
  }

  Scratch<Strip<T>> strips_;
  int64_t a_step_, count_ = 0;
};

// Whether blocks of positions follow each other past one block of columns, which stays in the
// second-level cache then: where reading the image once for each of those is less than reading the
// weights once for each of these.
template <class T>
bool rows_follow(const GridImage<T>& image, int64_t columns, const Blocking& block) {
  const int64_t positions = image.positions();
  const int64_t depth = static_cast<int64_t>(image.taps.size()) * image.depth;
  if (block.columns * depth * int64_t{sizeof(T)} > l2_bytes() / 2) return false;
  // A large image comes from memory each time, where weights come from a near last-level cache.
  const bool large = positions * image.depth * int64_t{sizeof(T)} > int64_t{4} << 20;
  if (large && !far_l3()) return false;
  return ceil_div(columns, block.columns) * positions * image.depth <
         ceil_div(positions, block.rows) * columns * depth;
}

// c[position][column] = epilogue(Σ_tap image[position at tap] · b). The epilogue's vectors are
// padded to whole panels.
template <class T>
void gather_gemm(const GridImage<T>& image, const T* b, int64_t columns, T* c,
                 const OutputGrid& out, const Epilogue<T>& epilogue) {
  const GemmTable<T>& table = gemm<T>();
  const int64_t positions = image.positions();
  const int64_t taps = static_cast<int64_t>(image.taps.size());
  if (positions == 0 || columns == 0) return;
  const Blocking block = choose_blocking<T>(image, columns);
  const int64_t column_blocks = ceil_div(columns, block.columns);
  const int64_t row_blocks = ceil_div(positions, block.rows);
  const bool rows_inside = rows_follow<T>(image, columns, block);
  const PaddingClasses classes(image);
  const bool stream = outgrows_caches<T>(c, positions, out);
  const bool evenly = reads_evenly(image);
  const auto run = [&](int64_t task, int64_t joined) {
    const int64_t row_block = rows_inside ? task % row_blocks : task / column_blocks;
    const int64_t column_block = rows_inside ? task / row_blocks : task % column_blocks;
    const int64_t after = rows_inside ? (task + 1) / row_blocks : column_block + joined;
    const int64_t first = row_block * block.rows, column = column_block * block.columns;
    const int64_t count = std::min(block.rows, positions - first);
    GemmBlock<T> g{.taps = taps,
                   .depth = image.depth,
                   .b = b + column * taps * image.depth,
                   .b_after = after == column_block
                                  ? nullptr
                                  : b + after % column_blocks * block.columns * taps * image.depth,
                   .c = c + column,
                   .n = std::min(joined * block.columns, columns - column),
                   .epilogue = epilogue.from_channel(column),
                   .stream = stream};
    if (evenly) {
      const BlockStrips<T> strips(image, out, first, count);
      g.strips = strips.get(), g.strip_count = strips.count();
      g.a_step = strips.a_step(), g.c_step = out.column_step;
      const bool copies = copies_rows<T>(g.a_step, g.n, g.depth);
      Scratch<T> room(copies ? room_for<T>(count, g.depth) : 0);
      if (copies) g.room = room.get();
      return table.run(g);
    }
    TapRows<T> rows(image, block.rows);
    Scratch<int64_t> offsets(count);
    PaddingOrder order(classes);
    order.arrange(image, first, count, [&](const Run& run, int64_t row) {
      rows.build(run, row);
      int64_t at = run.image * out.image_step + run.gy * out.row_step + run.gx * out.column_step;
      for (int64_t i = row; i < row + run.count; ++i, at += out.column_step) offsets[i] = at;
    });
    g.rows = rows.get(), g.row_stride = rows.stride(), g.zeros = rows.zeros();
    g.c_offset = offsets.get(), g.m = count;
    g.segment_end = order.segment_end(), g.segments = order.segments();
    table.run(g);
  };
  // A thread's columns of one block of rows go together, unless sums are cut: then those of C would
  // leave the second-level cache between the parts. No sum knows of it.
  const bool joins = !rows_inside && taps * image.depth <= kPartDepth<T>;
  parallel_ranges(row_blocks * column_blocks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin, joined; task < end; task += joined) {
      joined = joins ? std::min(end - task, column_blocks - task % column_blocks) : 1;
      run(task, joined);
    }
  });
}

}  // namespace nnarch
