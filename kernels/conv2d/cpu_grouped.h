// Narrow groups: which convolutions they are, their packed weights, and how the work is cut.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "conv2d/cpu_shape.h"
#include "conv2d/grouped.h"
#include "cpu/arena.h"
#include "cpu/parallel.h"
#include "cpu/streaming.h"
#include "cpu/tensor.h"

namespace nnarch {

// Groups that fill vectors together, and whose inputs fit into one: no output channel more than a
// vector has lanes, and no more inputs than outputs.
template <class T>
bool grouped_serves(int64_t groups, int64_t group_c, int64_t group_k) {
  const int64_t lanes = NNARCH_SELECT(grouped_lanes<T>());
  return groups > 1 && lanes % group_k == 0 && group_c <= group_k;
}

// Whether the input rows under an output row are few enough to copy: wide steps, dilations and
// paddings would need rows as wide as they are. 4 MB of floats.
template <class T>
bool grouped_rows_fit(const ConvShape& p) {
  const auto size = [](int64_t out, int64_t stride, int64_t kernel, int64_t dilation) {
    return static_cast<double>(out) * static_cast<double>(stride) +
           static_cast<double>(kernel) * static_cast<double>(dilation);
  };
  return static_cast<double>(NNARCH_SELECT(grouped_lanes<T>())) *
             size(2, p.stride_h, p.r, p.dilation_h) * size(p.ow, p.stride_w, p.s, p.dilation_w) <=
         double{1 << 20};
}

// [vector][r][depth][s][lanes]
template <class T>
int64_t grouped_packed_size(int64_t k, int64_t taps, int64_t depth) {
  return checked_product(round_up(k, NNARCH_SELECT(grouped_lanes<T>())),
                         checked_product(taps, depth));
}

// weight[group][output][depth][r][s], with any strides.
template <class T>
struct GroupedWeight {
  T* data;
  int64_t groups, outputs, depth, r, s;
  int64_t group_stride, output_stride, depth_stride, r_stride, s_stride;
};

// Calls f(value of the weight, its place in a packed one) for every value.
template <class T, class F>
void for_each_packed(const GroupedWeight<T>& w, const F& f) {
  const int64_t lanes = NNARCH_SELECT(grouped_lanes<std::remove_const_t<T>>());
  const int64_t k = w.groups * w.outputs;
  Scratch<int64_t> offset(lanes);  // of a vector's channels
  int64_t at = 0;
  for (int64_t first = 0; first < k; first += lanes) {
    const int64_t n = std::min(lanes, k - first);
    for (int64_t i = 0; i < n; ++i)
      offset[i] =
          (first + i) / w.outputs * w.group_stride + (first + i) % w.outputs * w.output_stride;
    for (int64_t r = 0; r < w.r; ++r)
      for (int64_t c = 0; c < w.depth; ++c)
        for (int64_t s = 0; s < w.s; ++s, at += lanes) {
          T* tap = w.data + c * w.depth_stride + r * w.r_stride + s * w.s_stride;
          for (int64_t i = 0; i < n; ++i) f(tap[offset[i]], at + i);
        }
  }
}

template <class T>
void grouped_pack(const GroupedWeight<const T>& w, T* dst) {
  std::fill_n(dst, grouped_packed_size<T>(w.groups * w.outputs, w.r * w.s, w.depth), T{0});
  for_each_packed(w, [&](T value, int64_t at) { dst[at] = value; });
}

template <class T>
void grouped_unpack(const T* packed, const GroupedWeight<T>& w) {
  for_each_packed(w, [&](T& value, int64_t at) { value = packed[at]; });
}

// A weight [groups·outputs, depth, r, s].
template <class T>
GroupedWeight<T> grouped_weight(T* data, const Tensor& weight, int64_t groups) {
  const int64_t outputs = weight.size(0) / groups;
  return {data,
          groups,
          outputs,
          weight.size(1),
          weight.size(2),
          weight.size(3),
          outputs * weight.stride(0),
          weight.stride(0),
          weight.stride(1),
          weight.stride(2),
          weight.stride(3)};
}

// The input channel behind every lane, for every channel of a group.
template <class T>
class GroupLanes {
 public:
  explicit GroupLanes(const GroupedConv<T>& conv)
      : lanes_(NNARCH_SELECT(grouped_lanes<T>())), lane_(conv.depth * lanes_) {
    for (int64_t c = 0; c < conv.depth; ++c)
      for (int64_t i = 0; i < lanes_; ++i)
        lane_[c * lanes_ + i] = static_cast<int32_t>(i / conv.outputs * conv.depth + c);
  }
  const int32_t* get() const { return lane_.get(); }

 private:
  int64_t lanes_;
  Scratch<int32_t> lane_;
};

// A convolution whose fields are those of its first image and first vector.
template <class T>
struct GroupedImages {
  GroupedConv<T> conv;
  int64_t images, x_image, y_image, oh, groups;

  int64_t lanes() const { return NNARCH_SELECT(grouped_lanes<T>()); }
  int64_t channels() const { return groups * conv.outputs; }
  int64_t vectors() const { return ceil_div(channels(), lanes()); }
  int64_t weights() const { return conv.r * conv.s * conv.depth * lanes(); }  // of a vector

  GroupedConv<T> at(int64_t image, int64_t vector) const {
    const int64_t per_vector = lanes() / conv.outputs, first = vector * per_vector;  // groups
    GroupedConv<T> mine = conv;
    mine.x += image * x_image + first * conv.depth * conv.x_channel;
    mine.inputs = std::min(per_vector, groups - first) * conv.depth;
    mine.y += image * y_image + vector * lanes() * conv.y_channel;
    mine.channels = channels() - vector * lanes();
    mine.epilogue = conv.epilogue.from_channel(vector * lanes());
    if (mine.epilogue.residual) mine.epilogue.residual += image * y_image;
    return mine;
  }
};

inline constexpr int64_t kGroupedTasks = 16;  // wanted

template <class T>
void grouped_product(const GroupedImages<T>& p, const T* packed) {
  const GroupLanes<T> lane(p.conv);
  const int64_t vectors = p.vectors();
  // Every part of an image copies the rows above it once more.
  constexpr int64_t least_rows = 12;
  const int64_t parts =
      std::clamp<int64_t>(kGroupedTasks / std::max<int64_t>(1, p.images * vectors), 1,
                          std::max<int64_t>(1, p.oh / least_rows));
  const int64_t scratch = NNARCH_SELECT(grouped_scratch_bytes<T>(p.conv));
  parallel_tasks(p.images * vectors * parts, [&](int64_t task) {
    const int64_t part = task % parts, vector = task / parts % vectors;
    const Scratch<char> memory(scratch);
    GroupedConv<T> mine = p.at(task / parts / vectors, vector);
    mine.lane = lane.get();
    mine.weight = packed + vector * p.weights();
    mine.first = p.oh * part / parts, mine.last = p.oh * (part + 1) / parts;
    mine.scratch = reinterpret_cast<T*>(memory.get());
    NNARCH_SELECT(grouped_run<T>(mine));
  });
}

// The weight gradient in packed order; p.conv.y is grad. Rows of all images are cut into parts,
// whose sums are added in their order.
template <class T>
void grouped_weight_grad(const GroupedImages<T>& p, T* sums) {
  const GroupLanes<T> lane(p.conv);
  const int64_t vectors = p.vectors(), size = vectors * p.weights();
  const int64_t parts = std::clamp<int64_t>(ceil_div(kGroupedTasks, vectors), 1,
                                            std::max<int64_t>(1, p.images * p.oh / 8));
  const int64_t scratch = NNARCH_SELECT(grouped_grad_scratch<T>(p.conv));
  Scratch<T> others((parts - 1) * size);
  const auto of_part = [&](int64_t part) {
    return part == 0 ? sums : others.get() + (part - 1) * size;
  };
  parallel_tasks(vectors * parts, [&](int64_t task) {
    const int64_t part = task % parts, vector = task / parts;
    T* dw = of_part(part) + vector * p.weights();
    std::fill_n(dw, p.weights(), T{0});
    const Scratch<T> memory(scratch);
    const int64_t end = p.images * p.oh * (part + 1) / parts;
    for (int64_t row = p.images * p.oh * part / parts; row < end;) {
      const int64_t image = row / p.oh;
      GroupedConv<T> mine = p.at(image, vector);
      mine.lane = lane.get();
      mine.first = row - image * p.oh, mine.last = std::min(p.oh, end - image * p.oh);
      mine.scratch = memory.get();
      NNARCH_SELECT(grouped_grad_run<T>(mine, dw));
      row += mine.last - mine.first;
    }
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) sums[i] += of_part(part)[i];
}

// Where a tensor lies: channels_last, or planar (channel by channel).
struct PixelLayout {
  int64_t image, row, pixel, channel;

  static PixelLayout of(int64_t c, int64_t h, int64_t w, bool planar) {
    if (planar) return {c * h * w, w, 1, h * w};
    return {c * h * w, w * c, c, 1};
  }
};

// The convolution without its weight and epilogue.
template <class T>
GroupedImages<T> grouped_images(const ConvShape& p, const T* x, bool x_planar, T* y,
                                bool y_planar) {
  const PixelLayout in = PixelLayout::of(p.c, p.h, p.w, x_planar),
                    out = PixelLayout::of(p.k, p.oh, p.ow, y_planar);
  GroupedConv<T> conv{};
  conv.x = x, conv.h = p.h, conv.w = p.w;
  conv.x_row = in.row, conv.x_pixel = in.pixel, conv.x_channel = in.channel;
  conv.depth = p.group_c(), conv.outputs = p.group_k();
  conv.r = p.r, conv.s = p.s;
  conv.stride_h = p.stride_h, conv.stride_w = p.stride_w;
  conv.dilation_h = p.dilation_h, conv.dilation_w = p.dilation_w;
  conv.row = -p.top, conv.column = -p.left;
  conv.y = y, conv.y_row = out.row, conv.y_pixel = out.pixel, conv.y_channel = out.channel;
  conv.ow = p.ow;
  return {conv, p.n, in.image, out.image, p.oh, p.groups};
}

template <class T>
void grouped_forward(const T* x, bool x_planar, const T* packed, T* y, bool y_planar,
                     const ConvShape& p, const Epilogue<T>& epilogue) {
  GroupedImages<T> images = grouped_images(p, x, x_planar, y, y_planar);
  images.conv.epilogue = epilogue;
  const bool whole_lines = images.lanes() * int64_t{sizeof(T)} == 64;
  images.conv.stream = whole_lines && !y_planar && epilogue.activation <= kRelu6 &&
                       outgrows_caches(y, p.n * p.oh * p.ow, p.k);
  grouped_product(images, packed);
}

}  // namespace nnarch
