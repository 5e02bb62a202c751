// Pooling of planes (NCHW) that no vector along a row serves: some planes at a time are transposed
// into cache, where they are the channels of a small channels_last image, pooled there, and the
// result is transposed back.
#pragma once

#include <algorithm>

#include "cpu/arena.h"
#include "cpu/layout.h"
#include "pooling/cpu_images.h"
#include "pooling/cpu_stored.h"

namespace nnarch {

// Whether vectors along rows serve the windows (plane_isa.h): regular ones at distance 1 or 2. Far
// wider than the plane, a window's taps would lie in its padding.
inline bool along_rows(const Axis& h, const Axis& w) {
  return h.kernel > 0 && w.kernel > 0 && w.stride <= 2 &&
         (w.kernel - 1) * w.step <= std::min<int64_t>(64, 2 * w.inputs);
}

// Rows that are reduced before one is read again (plane_isa.h): what fits a quarter of L1.
template <class T>
int64_t buffered_rows(const Axis& w) {
  constexpr int64_t elements = 8192 / static_cast<int64_t>(sizeof(T));
  return std::max<int64_t>(elements / row_pitch(w), 1);
}

// Calls pool(image, channels, from, to, y, indices) to compute output rows [from, to) of images
// [H][W][channels], with the pointers that kernels take (cpu_kernels.h). `indices` may be null.
template <Denormals denormals, class T, class F>
void over_planes(const Stored& x, int64_t planes, const Axis& h, const Axis& w, const Stored& y,
                 int64_t* indices, const F& pool) {
  constexpr int64_t cached_elements = 32768;     // of input, in L2
  constexpr int64_t largest_elements = 1 << 20;  // where one row of windows needs more than that
  const int64_t in = h.inputs * w.inputs, out = h.outputs * w.outputs;
  int64_t tallest = 1;
  for (int64_t i = 0; i < h.outputs; ++i) tallest = std::max(tallest, h.end[i] - h.start[i]);
  // Planes side by side: two or four vectors of floats, fewer where windows are huge.
  const int64_t lanes =
      std::clamp<int64_t>(largest_elements / std::max<int64_t>(1, tallest * w.inputs), 1, 32);
  const int64_t row_in = w.inputs * ceil_div(h.inputs, h.outputs), row_out = w.outputs;
  const int64_t rows =
      std::clamp<int64_t>(cached_elements / (lanes * std::max(row_in, row_out)), 1, h.outputs);
  const int64_t cuts = ceil_div(h.outputs, rows);
  const auto transpose = transpose_fn<T>();
  pooling_tasks<denormals>(ceil_div(planes, lanes) * cuts, [&](int64_t task) {
    const int64_t plane = task / cuts * lanes, channels = std::min(lanes, planes - plane);
    const int64_t from = task % cuts * rows, to = std::min(h.outputs, from + rows);
    if (channels == 1) {  // its own transpose
      const PooledUnits<T> at(x, y, h, w.inputs, w.outputs, plane, plane + 1, from, to);
      pool(at.x(), 1, from, to, at.y(), indices ? indices + plane * out : nullptr);
      return;
    }
    const RowsReached reached(h, from, to);
    const int64_t first_in = reached.top * w.inputs;
    const int64_t pixels_in = (reached.bottom - reached.top) * w.inputs;
    const int64_t first_out = from * w.outputs, pixels_out = (to - from) * w.outputs;
    Scratch<T> image(channels * pixels_in), result(channels * pixels_out);
    Scratch<int64_t> found(indices ? channels * pixels_out : 0);
    {
      const Reading<T> rows(x, {plane * in + first_in, pixels_in, channels, in});
      transpose(rows.get(), rows.step(), image.get(), channels, channels, pixels_in);
    }
    // The kernel counts from the first row of the whole image.
    pool(image.get() - first_in * channels, channels, from, to, result.get() - first_out * channels,
         indices ? found.get() - first_out * channels : nullptr);
    {
      const Writing<T> rows(y, {plane * out + first_out, pixels_out, channels, out});
      transpose(result.get(), channels, rows.get(), rows.step(), pixels_out, channels);
    }
    if (!indices) return;
    for (int64_t c = 0; c < channels; ++c) {
      int64_t* to_plane = indices + (plane + c) * out + first_out;
      for (int64_t i = 0; i < pixels_out; ++i) to_plane[i] = found[i * channels + c];
    }
  });
}

}  // namespace nnarch
