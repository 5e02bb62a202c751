// How a depthwise convolution is cut into tiles and tasks: by its shape, never by the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "cpu/streaming.h"
#include "cpu/tensor.h"
#include "depthwise/cpu_kernels.h"

namespace nnarch {

// Half of a 32 KB first-level cache; the other half is for weights and the lines being written.
inline constexpr int64_t kTileBytes = 16384;
// Channels of a pixel that are copied at a time, at least: two cache lines of floats.
inline constexpr int64_t kNarrowBlock = 32;
// Pixels a multiple of this apart share so few sets of that cache that they push each other out.
inline constexpr int64_t kSetBytes = 2048;
// The same for blocks, which need a line at most three times: 14×14 pixels of 512 channels, 2048
// bytes apart, take 25 µs where pixels of 528 take 17, still less than with a copy.
inline constexpr int64_t kBlockSetBytes = 4096;
// Input rows that are read in place stay in this much of the first-level cache; where they come
// from memory, in this much of the second level: whole rows are what the hardware prefetches well.
inline constexpr int64_t kDirectBytes = 24576;
inline constexpr int64_t kFarRowBytes = 1 << 18;
// A ring of more rows than this many times those used at once is not worth its memory.
inline constexpr int64_t kRingWaste = 4;
// Tasks to aim at where the layer has so much work, and the multiply-adds of the smallest.
inline constexpr int64_t kTasks = 16;
inline constexpr int64_t kTaskWork = 1 << 18;

template <class T>
class DepthwisePlanner {
 public:
  // `weight_grad`: the plan is for the weight gradient, where an output pixel is one of grad.
  DepthwisePlanner(const DepthwiseConv<T>& c, int64_t images, bool weight_grad) : c_(c) {
    scan_passes();
    const bool tails = NNARCH_SELECT(depthwise_masked_tails<T>());
    plan_.blocks = !weight_grad && has_blocks() && can_read_directly(kBlockSetBytes, tails);
    if (weight_grad) plan_.pair_pixels = pair_pixels();
    if (plan_.blocks || plan_.pair_pixels ||
        (weight_grad ? has_grad_blocks() : can_read_directly(kSetBytes))) {
      plan_direct(images);
      if (weight_grad) plan_.columns = ow_;
    } else {
      choose_columns(), choose_block();
    }
    choose_rows(images);
  }

  const DepthwisePlan& plan() const { return plan_; }
  // Pointers that a task needs: its input rows, and copies of them or the further rows of a block.
  int64_t row_pointers() const { return (plan_.blocks ? 3 : 2) * plan_.kernel_rows; }
  int64_t channel_tasks() const { return ceil_div(c_.channels, plan_.block); }
  int64_t row_tasks() const { return ceil_div(oh_, plan_.rows); }
  int64_t tasks() const { return channel_tasks() * row_tasks(); }

  DepthwiseTask task(int64_t i) const {
    const int64_t channel = i / row_tasks() * plan_.block, first = i % row_tasks() * plan_.rows;
    return {channel, std::min(plan_.block, c_.channels - channel), first,
            std::min(first + plan_.rows, oh_)};
  }

 private:
  void scan_passes() {
    int64_t last_row = 0;
    bool any = false;
    for (int64_t i = 0; i < c_.pass_count; ++i) {
      const DepthwisePass<T>& p = c_.passes[i];
      oh_ = std::max(oh_, p.oh), ow_ = std::max(ow_, p.ow);
      r_ = std::max(r_, p.r), s_ = std::max(s_, p.s);
      taps_ += p.r * p.s;
      if (p.r * p.s == 0) continue;
      const int64_t row_end = p.row + (p.r - 1) * c_.dilation_h + 1;
      const int64_t column_end = p.column + (p.s - 1) * c_.dilation_w + 1;
      plan_.first_row = any ? std::min(plan_.first_row, p.row) : p.row;
      plan_.first_column = any ? std::min(plan_.first_column, p.column) : p.column;
      last_row = any ? std::max(last_row, row_end) : row_end;
      last_column_ = any ? std::max(last_column_, column_end) : column_end;
      any = true;
    }
    plan_.kernel_rows = r_;
    plan_.tile_rows = plan_.reach = last_row - plan_.first_row;
    plan_.ring = plan_.tile_rows <= kRingWaste * r_;
    if (!plan_.ring) plan_.tile_rows = r_;
  }

  // Whether the weight gradient reads x in place: grad in whole registers, and edges of the image
  // that half a kernel reaches beyond, or none.
  bool has_grad_blocks() const {
    return has_blocks() && can_read_directly(kSetBytes) && ow_ % kGradPixels == 0 &&
           ow_ > kGradPixels && has_half_edges();
  }
  bool has_half_edges() const {
    const DepthwisePass<T>& p = *c_.passes;
    const int64_t left = -p.column;
    const int64_t right = (ow_ - 1) * c_.stride_w + p.column + p.s - c_.w;
    return (left == 0 || left == p.s / 2) && (right <= 0 || right == p.s / 2);
  }

  // The same for pairs; grad must be in place too. 0: there is no code for them.
  int64_t pair_pixels() const {
    if (!has_blocks() || !can_read_directly(kBlockSetBytes) || c_.y_channel != 1 ||
        !has_half_edges())
      return 0;
    return NNARCH_SELECT(depthwise_pair_pixels<T>(s_, ow_));
  }

  // What cpu_block.h serves.
  bool has_blocks() const {
    const DepthwisePass<T>& p = *c_.passes;
    return c_.pass_count == 1 && p.r == p.s && (p.s == 3 || p.s == 5 || p.s == 7) &&
           c_.stride_h == c_.stride_w && c_.stride_h <= 2 && c_.dilation_h == 1 &&
           c_.dilation_w == 1;
  }

  // Pixels must not be a multiple of so many bytes apart, and consist of whole vectors where there
  // is no code for tails.
  bool can_read_directly(int64_t set_bytes, bool tails = false) const {
    return c_.x_channel == 1 && c_.lane_source == nullptr && c_.group == 1 &&
           (tails || c_.channels % NNARCH_SELECT(depthwise_lanes<T>()) == 0) &&
           c_.channels * c_.dilation_w * static_cast<int64_t>(sizeof(T)) % set_bytes != 0;
  }

  void plan_direct(int64_t images) {
    plan_.direct = true;
    plan_.ring = false;
    plan_.block = round_up(c_.channels, kDepthwiseBlock);
    plan_.tile_rows = r_;
    const int64_t size = sizeof(T);
    const int64_t bytes = images * size * c_.channels * (c_.h * c_.w + oh_ * ow_);
    plan_.far = bytes >= kFarBytes;
    const int64_t phases = column_phases(c_.dilation_w, c_.stride_w);
    const int64_t strip = strip_pixels(s_, ceil_div(ow_, phases)) * phases;
    const int64_t fit = (plan_.far || plan_.blocks ? kFarRowBytes : kDirectBytes) /
                        (std::max<int64_t>(r_, 1) * c_.stride_w * c_.channels * size);
    plan_.columns = std::min(ow_, std::max(2 * strip, fit / strip * strip));
    plan_.tile_columns = tile_columns(kStripLengths[0]);  // for one strip at an edge
  }

  int64_t tile_columns(int64_t columns) const {
    return (columns - 1) * c_.stride_w + last_column_ - plan_.first_column;
  }
  int64_t tile_bytes(int64_t columns, int64_t channels) const {
    return plan_.tile_rows * tile_columns(columns) * channels * static_cast<int64_t>(sizeof(T));
  }

  void choose_columns() {
    const int64_t block = std::min(round_up(c_.channels, kDepthwiseBlock), kNarrowBlock);
    int64_t tiles = 1;
    while (tile_bytes(ceil_div(ow_, tiles), block) > kTileBytes && ceil_div(ow_, tiles) > 16)
      ++tiles;
    plan_.columns = ceil_div(ow_, tiles);
    if (ow_ % tiles != 0) plan_.columns = std::min(ow_, round_up(plan_.columns, 8));
    plan_.tile_columns = tile_columns(plan_.columns);
  }

  void choose_block() {
    // A block holds whole groups of channels that are summed.
    const int64_t unit = std::lcm(kDepthwiseBlock, c_.group);
    const int64_t fit = kTileBytes / std::max<int64_t>(1, tile_bytes(plan_.columns, 1));
    const int64_t least = std::min(kNarrowBlock, round_up(c_.channels, unit));
    const int64_t block = round_up(std::max(least, fit / unit * unit), unit);
    const int64_t blocks = ceil_div(c_.channels, block);
    plan_.block = round_up(ceil_div(c_.channels, blocks), unit);
  }

  void choose_rows(int64_t images) {
    const int64_t channels = std::min(plan_.block, c_.channels);
    const int64_t work = oh_ * ow_ * taps_ * channels;  // of an image's block
    const int64_t wanted = ceil_div(kTasks, std::max<int64_t>(1, images * channel_tasks()));
    const int64_t most = std::max<int64_t>(1, std::min(work / kTaskWork, oh_ / (2 * r_ + 2)));
    plan_.rows = std::max<int64_t>(1, ceil_div(oh_, std::min(wanted, most)));
    if (plan_.blocks || plan_.pair_pixels) plan_.rows = round_up(plan_.rows, kBlockRowsMost);
  }

  const DepthwiseConv<T>& c_;
  DepthwisePlan plan_{};
  int64_t oh_ = 0, ow_ = 0, r_ = 0, s_ = 0, taps_ = 0, last_column_ = 0;
};

}  // namespace nnarch
