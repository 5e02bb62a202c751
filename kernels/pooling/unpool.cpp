// Max unpooling on the CPU.
#include <atomic>

#include "cpu/registry.h"
#include "pooling/cpu_images.h"
#include "pooling/cpu_unpool.h"

namespace nnarch {
namespace {

// The windows of an output that is a whole number of times as large; a tall of 0 where it is not.
Windows2d windows_of(int64_t height, int64_t width, const IntList& size) {
  const bool whole = size[0] % height == 0 && size[1] % width == 0;
  return {height, width, whole ? size[0] / height : 0, whole ? size[1] / width : 0};
}

inline constexpr int64_t kMostTaps = 16;  // of a window that is written output by output

// Whether all indices lie in windows of their own; y is then complete.
template <class T>
bool fill_windows(const T* x, const int64_t* index, int64_t images, int64_t channels,
                  bool channels_last, const Windows2d& w, T* y) {
  const auto& table = NNARCH_SELECT(unpool_table<T>());
  const int64_t taps = w.tall * w.wide, pixels = w.height * w.width;
  if (taps == 0 || taps > kMostTaps || pixels * taps > INT32_MAX) return false;
  std::atomic<bool> fit{true};
  if (channels_last) {
    if (channels < table.lanes) return false;
    const bool past_caches = outgrows_caches(y, images * pixels * taps, channels);
    const int64_t image = pixels * channels;
    over_rows<Denormals::keep>(images, w.height, w.width * channels * taps,
                               [&](int64_t n, int64_t from, int64_t to) {
                                 if (!table.rows(x + n * image, index + n * image, channels, w,
                                                 from, to, y + n * image * taps, past_caches))
                                   fit = false;
                               });
    return fit;
  }
  if (w.wide != 2) return false;
  over_rows<Denormals::keep>(
      images * channels, w.height, w.width * taps, [&](int64_t p, int64_t from, int64_t to) {
        if (!table.plane(x + p * pixels, index + p * pixels, w, from, to, y + p * pixels * taps))
          fit = false;
      });
  return fit;
}

// Whether all indices lie inside.
template <class T>
bool scatter(const T* x, const int64_t* index, int64_t images, int64_t channels, bool channels_last,
             int64_t pixels, int64_t outputs, T* y) {
  const auto& table = NNARCH_SELECT(unpool_table<T>());
  std::atomic<bool> inside{true};
  if (!channels_last) {
    pooling_tasks<Denormals::keep>(images * channels, [&](int64_t p) {
      if (!table.scatter(x + p * pixels, index + p * pixels, pixels, outputs, 1, 1,
                         y + p * outputs))
        inside = false;
    });
    return inside;
  }
  // Few images are cut by channels too.
  const int64_t run = images >= 8 ? channels : 64, runs = ceil_div(channels, run);
  pooling_tasks<Denormals::keep>(images * runs, [&](int64_t task) {
    const int64_t n = task / runs, c = task % runs * run;
    const int64_t at = n * pixels * channels + c;
    if (!table.scatter(x + at, index + at, pixels, outputs, channels, std::min(run, channels - c),
                       y + n * outputs * channels + c))
      inside = false;
  });
  return inside;
}

Tensor max_unpool2d(const Tensor& x, const Tensor& indices, IntList output_size) {
  check_images(x);
  require(indices.scalar_type() == ScalarType::Long && same_sizes(x, indices),
          "max_unpool2d: indices must be int64 and of the shape of input");
  require(output_size.size() == 2 && output_size[0] > 0 && output_size[1] > 0,
          "max_unpool2d: output_size must be positive");
  const bool channels_last = follows_channels_last(x);
  const Tensor input = in_order_of(x, to_compute_type(x));
  const Tensor where = indices_in_order_of(x, indices);
  const Tensor y = new_images(x, output_size[0], output_size[1], input.scalar_type());
  if (y.numel() == 0) return to_type(y, x.scalar_type());
  const int64_t images = x.size(0), channels = x.size(1);
  const Windows2d windows = windows_of(x.size(2), x.size(3), output_size);
  bool inside = true;
  with_scalar_type(input.scalar_type(), "max_unpool2d", [&](auto scalar) {
    using T = decltype(scalar);
    const T* from = data<T>(input);
    const int64_t* index = data<int64_t>(where);
    T* to = mutable_data<T>(y);
    set_algorithm("windows");
    if (fill_windows<T>(from, index, images, channels, channels_last, windows, to)) return;
    set_algorithm("scatter");
    inside = scatter<T>(from, index, images, channels, channels_last, x.size(2) * x.size(3),
                        output_size[0] * output_size[1], to);
  });
  require(inside, "max_unpool2d: an index lies outside the output");
  return to_type(y, x.scalar_type());
}

}  // namespace

NNARCH_OPS(max_unpooling, ops) { ops.impl("max_unpool2d", TORCH_BOX(&max_unpool2d)); }

}  // namespace nnarch
