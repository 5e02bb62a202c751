// Tensors as the depthwise kernels see them: layouts, channel sources, packed weights.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv2d/cpu_shape.h"
#include "cpu/arena.h"
#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"
#include "depthwise/cpu_kernels.h"

namespace nnarch {

// The strides of a dense 4-D tensor in either memory order.
struct Layout {
  int64_t image, channel, row, pixel;

  static Layout of(const IntList& size, bool channels_last) {
    const int64_t c = size[1], h = size[2], w = size[3];
    if (channels_last) return {h * w * c, 1, w * c, c};
    return {h * w * c, h * w, w, 1};
  }
};

// An input in an order that tiles can be loaded from. Planes are transposed on the way into a
// tile; where channels are also multiplied, or pixels are not dense, the tensor is copied first.
struct SourceImage {
  Tensor tensor;
  Layout layout;

  SourceImage(const Tensor& t, int64_t multiplier)
      : tensor(multiplier == 1 && t.is_contiguous() && !is_channels_last(t) ? t
                                                                            : as_channels_last(t)),
        layout(Layout::of(sizes_of(t), is_channels_last(tensor))) {}
};

// The input channel k / multiplier of every output channel k, in the form of DepthwiseConv.
template <class T>
class ChannelSource {
 public:
  ChannelSource(int64_t channels, int64_t multiplier)
      : used_(multiplier > 1),
        lane_(used_ ? round_up(channels, kDepthwiseBlock) : 0),
        vector_(used_ ? round_up(channels, kDepthwiseBlock) : 0) {
    if (!used_) return;
    const int64_t lanes = NNARCH_SELECT(depthwise_lanes<T>());
    int64_t source = 0, left = multiplier;
    for (int64_t k = 0; k < round_up(channels, kDepthwiseBlock); ++k) {
      // Lanes beyond the last channel repeat it: their sums are not stored.
      if (k > 0 && k < channels && --left == 0) ++source, left = multiplier;
      if (k % lanes == 0) vector_[k / lanes] = static_cast<int32_t>(source);
      lane_[k] = static_cast<int32_t>(source - vector_[k / lanes]);
    }
  }

  void set(DepthwiseConv<T>* conv) const {
    conv->lane_source = used_ ? lane_.get() : nullptr;
    conv->vector_source = used_ ? vector_.get() : nullptr;
  }

 private:
  bool used_;
  Scratch<int32_t> lane_, vector_;
};

inline int64_t packed_depthwise_size(int64_t channels, int64_t taps) {
  return checked_product(round_up(channels, kDepthwiseBlock), taps);
}

// The rows and columns of a kernel that a pass uses, in the order in which it meets them.
struct TapList {
  IntList rows, columns;

  static TapList whole(int64_t r, int64_t s) {
    TapList taps{IntList(r), IntList(s)};
    for (int64_t i = 0; i < r; ++i) taps.rows[i] = i;
    for (int64_t i = 0; i < s; ++i) taps.columns[i] = i;
    return taps;
  }
  int64_t count() const { return static_cast<int64_t>(rows.size() * columns.size()); }

  // Which taps of a kernel of this width these are.
  IntList order(int64_t width) const {
    IntList taps;
    for (int64_t r : rows)
      for (int64_t s : columns) taps.push_back(r * width + s);
    return taps;
  }
};

// weight [K, 1, R, S], of any strides, into packed order. Blocks of channels are transposed, and
// tap after tap copied where not all of them are taken in order: gathered one by one, the flipped
// 3×3 weights of 512 channels took 15 µs.
template <class T>
void pack_depthwise(const Tensor& weight_in, const TapList& taps, T* dst) {
  const Tensor weight = as_contiguous(weight_in);
  const int64_t channels = weight.size(0), all = weight.size(2) * weight.size(3);
  const IntList order = taps.order(weight.size(3));
  const int64_t count = static_cast<int64_t>(order.size());
  bool whole = count == all;
  for (int64_t i = 0; i < count; ++i) whole = whole && order[i] == i;
  const Scratch<T> block(all * kDepthwiseBlock);
  const auto transpose = transpose_fn<T>();
  const T* src = data<T>(weight);
  for (int64_t k = 0; k < channels; k += kDepthwiseBlock, dst += count * kDepthwiseBlock) {
    const int64_t n = std::min(kDepthwiseBlock, channels - k);
    T* to = whole ? dst : block.get();
    if (n < kDepthwiseBlock) std::fill_n(to, all * kDepthwiseBlock, T{0});
    transpose(src + k * all, all, to, kDepthwiseBlock, n, all);
    for (int64_t i = 0; i < count && !whole; ++i)
      std::copy_n(to + order[i] * kDepthwiseBlock, kDepthwiseBlock, dst + i * kDepthwiseBlock);
  }
}

// The positions first, first + stride, … of one axis of the input of a convolution, and the kernel
// taps that reach them, as a convolution of stride 1 over the output positions.
struct GradientPhase {
  int64_t first, count;  // positions
  int64_t offset;        // output position of the first tap for the first of them
  IntList taps;          // in the order of output positions, `step` apart
};

inline std::vector<GradientPhase> gradient_phases(int64_t size, int64_t stride, int64_t pad,
                                                  int64_t kernel, int64_t dilation) {
  std::vector<GradientPhase> phases;
  for (int64_t first = 0; first < std::min(stride, size); ++first) {
    GradientPhase phase{first, ceil_div(size - first, stride), 0, {}};
    for (int64_t tap = kernel; tap-- > 0;) {
      const int64_t at = first + pad - tap * dilation;
      if (at % stride != 0) continue;
      if (phase.taps.empty()) phase.offset = at / stride;
      phase.taps.push_back(tap);
    }
    phases.push_back(phase);
  }
  return phases;
}

}  // namespace nnarch
