// How pooling cuts its work into tasks.
#pragma once

#include <algorithm>

#include "cpu/dense.h"
#include "cpu/half.h"
#include "cpu/parallel.h"
#include "cpu/streaming.h"
#include "cpu/tensor.h"
#include "pooling/cpu_kernels.h"

namespace nnarch {

// Whether tasks flush denormals (parallel.h). A maximum keeps them: it returns its inputs as they
// are.
enum class Denormals { keep, flush };

template <Denormals denormals, class F>
void pooling_tasks(int64_t tasks, const F& f) {
  if constexpr (denormals == Denormals::flush) return parallel_tasks(tasks, f);
  if (tasks == 1) return f(int64_t{0});
  if (tasks > 1)
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) f(task);
    });
}

// Calls f(first, last, from, to): output rows [from, to) of the units [first, last), which are
// images or planes. Tasks take some rows of a large unit or all rows of some small ones.
template <Denormals denormals, class F>
void over_units(int64_t units, int64_t rows, int64_t elements_per_row, const F& f,
                int64_t task_elements = 65536) {
  if (units == 0 || rows == 0) return;
  const int64_t row = std::max<int64_t>(1, elements_per_row);
  // Kernels take rows in pairs.
  const int64_t fit = std::clamp<int64_t>(task_elements / row, 1, rows);
  const int64_t rows_per_task = fit > 1 && fit < rows ? fit - fit % 2 : fit;
  const int64_t cuts = ceil_div(rows, rows_per_task);
  const int64_t together = cuts > 1 ? 1 : std::max<int64_t>(1, task_elements / (rows * row));
  pooling_tasks<denormals>(ceil_div(units, together) * cuts, [&](int64_t task) {
    const int64_t from = task % cuts * rows_per_task, to = std::min(rows, from + rows_per_task);
    const int64_t first = task / cuts * together, last = std::min(units, first + together);
    f(first, last, from, to);
  });
}

// The same with one unit at a time: f(unit, from, to).
template <Denormals denormals, class F>
void over_rows(int64_t units, int64_t rows, int64_t elements_per_row, const F& f,
               bool far = false) {
  over_units<denormals>(
      units, rows, elements_per_row,
      [&](int64_t first, int64_t last, int64_t from, int64_t to) {
        for (int64_t unit = first; unit < last; ++unit) f(unit, from, to);
      },
      far ? 1 << 19 : 65536);  // what was read ahead is lost where a task ends
}

// The longest rows that are worth reading ahead: eight of them stay in the second-level cache.
inline constexpr int64_t kFarRowBytes = 1 << 16;

// Input and output together whose rows are asked for ahead: 9.6 MB of an average of 3×3 take 177 µs
// with it and 216 without, 4 MB of a maximum 57 and 52.
inline constexpr int64_t kAskBytes = int64_t{6} << 20;

// Outputs that are streamed past the caches: less than elsewhere. 4.8 MB of an average of 3×3 take
// 193 to 208 µs then, through the caches 203 to 451, by whether the allocator gives the same block
// again; with the 1x1 convolution that reads them in Inception 934 and 965, through the caches 920
// and 972.
inline constexpr int64_t kPoolStreamBytes = int64_t{4} << 20;

// Whether pixels begin and end at cache lines, as streaming wants.
template <class T>
bool whole_lines(const T* y, int64_t channels) {
  constexpr int64_t line = 64;
  return channels * int64_t{sizeof(T)} % line == 0 && reinterpret_cast<uintptr_t>(y) % line == 0;
}

// Of channels_last images.
template <class T>
Traffic image_traffic(const Stored& y, int64_t images, int64_t channels, const Axis& h,
                      const Axis& w) {
  const int64_t size = sizeof(T), in = h.inputs * w.inputs, out = h.outputs * w.outputs;
  if (y.half) return {};  // the kernels read and write blocks in cache
  const int64_t bytes = images * channels * (in + out) * size;
  const bool narrow = w.inputs * channels * size <= kFarRowBytes;
  return {bytes >= kFarBytes && narrow, bytes >= kAskBytes && narrow,
          images * out * channels * size >= kPoolStreamBytes && whole_lines(y.at<T>(0), channels)};
}

inline void check_images(const Tensor& x) {
  require(x.dim() == 4, "pooling: input must be [N, C, H, W]");
  require(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "pooling: only N may be 0");
  with_scalar_type(x.scalar_type(), "pooling", [](auto) {});
}

// An output of the given height and width in the memory format of `like`.
inline Tensor new_images(const Tensor& like, int64_t height, int64_t width, ScalarType type) {
  const IntList sizes{like.size(0), like.size(1), height, width};
  return follows_channels_last(like) ? new_channels_last(sizes, type) : new_contiguous(sizes, type);
}

// Copies of integers: as_channels_last and as_contiguous serve floating point only.
inline Tensor indices_in_order_of(const Tensor& like, const Tensor& indices) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(
      indices, follows_channels_last(like) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace nnarch
