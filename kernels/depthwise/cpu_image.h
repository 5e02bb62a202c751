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
};

// weight [K, 1, R, S], of any strides, into packed order.
template <class T>
void pack_depthwise(const Tensor& weight, const TapList& taps, T* dst) {
  const int64_t channels = weight.size(0), count = taps.count();
  const bool whole = weight.is_contiguous() && count == weight.size(2) * weight.size(3) &&
                     (count <= 1 || taps.rows.front() <= taps.rows.back()) &&
                     (count <= 1 || taps.columns.front() <= taps.columns.back());
  const T* src = data<T>(weight);
  std::fill_n(dst, packed_depthwise_size(channels, count), T{0});
  for (int64_t k = 0; k < channels; k += kDepthwiseBlock, dst += count * kDepthwiseBlock) {
    const int64_t n = std::min(kDepthwiseBlock, channels - k);
    if (whole) {
      transpose_fn<T>()(src + k * count, count, dst, kDepthwiseBlock, n, count);
      continue;
    }
    T* tap = dst;
    for (int64_t r : taps.rows)
      for (int64_t s : taps.columns) {
        const T* from = src + k * weight.stride(0) + r * weight.stride(2) + s * weight.stride(3);
        for (int64_t i = 0; i < n; ++i) tap[i] = from[i * weight.stride(0)];
        tap += kDepthwiseBlock;
      }
  }
}

// The positions first, first + stride, … of one axis of the input of a convolution, and the kernel
// taps that reach them, as a convolution of stride 1 over the output positions.
struct Phase {
  int64_t first, count;  // positions
  int64_t offset;        // output position of the first tap for the first of them
  IntList taps;          // in the order of output positions, `step` apart
};

inline std::vector<Phase> gradient_phases(int64_t size, int64_t stride, int64_t pad, int64_t kernel,
                                          int64_t dilation) {
  std::vector<Phase> phases;
  for (int64_t first = 0; first < std::min(stride, size); ++first) {
    Phase phase{first, ceil_div(size - first, stride), 0, {}};
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
