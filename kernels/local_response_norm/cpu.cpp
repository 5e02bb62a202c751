// Local response normalization on the CPU, and its gradient.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/arena.h"
#include "cpu/dense.h"
#include "cpu/half.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"
#include "cpu/streaming.h"
#include "local_response_norm/cpu_kernels.h"

namespace nnarch {
namespace {

// The arguments of both operations.
struct Arguments {
  int64_t size;
  double scale, beta, k;
  bool relu;
};

// Negative sums have powers only where beta is a whole number, and 0^0 is 1: the C library knows.
Power power_of(const Arguments& a) {
  if (!(a.k >= 0 && a.scale >= 0) || a.beta == 0 || std::isinf(a.beta)) return Power::library;
  if (a.beta == 0.75) return Power::three_quarters;
  return a.beta == 0.5 ? Power::half : Power::any;
}

template <class T>
Response<T> response(const Arguments& a, int64_t channels) {
  using Limits = std::numeric_limits<T>;
  return {channels,
          std::min(a.size / 2, channels),
          std::min((a.size - 1) / 2, channels),
          static_cast<T>(a.scale),
          static_cast<T>(a.k),
          a.beta,
          power_of(a),
          a.relu ? T{0} : -Limits::infinity(),
          a.relu ? T{0} : Limits::quiet_NaN()};
}

void check(const Tensor& x, int64_t size) {
  require(x.dim() >= 3, "local_response_norm: x must have at least 3 dimensions");
  require(size >= 1, "local_response_norm: size must be at least 1");
  with_scalar_type(x.scalar_type(), "local_response_norm", [](auto) {});
}

int64_t pixels_of(const Tensor& x) {
  int64_t pixels = 1;
  for (int64_t d = 2; d < x.dim(); ++d) pixels = checked_product(pixels, x.size(d));
  return pixels;
}

// Pixels of a plane in a task: all arrays of its gradient together stay in the second-level cache.
template <class T>
int64_t plane_block(int64_t channels) {
  constexpr int64_t elements = (int64_t{512} << 10) / sizeof(T) / 4;
  return std::clamp<int64_t>(elements / channels / 64 * 64, 64, kPlaneBlock);
}

// Calls f(offset, pixels) for blocks of planes: where their first channel begins.
template <class F>
void over_planes(const Tensor& x, int64_t block, const F& f) {
  const int64_t pixels = pixels_of(x), blocks = ceil_div(pixels, block), image = x.size(1) * pixels;
  parallel_tasks(x.size(0) * blocks, [&](int64_t task) {
    const int64_t first = task % blocks * block;
    f(task / blocks * image + first, std::min(block, pixels - first));
  });
}

// Calls f(offset, pixels) for runs of pixels of channels_last images.
template <class F>
void over_rows(const Tensor& x, const F& f) {
  const int64_t channels = x.size(1), pixels = x.size(0) * pixels_of(x);
  const int64_t run = std::max<int64_t>(1, 32768 / channels);
  parallel_tasks(ceil_div(pixels, run), [&](int64_t task) {
    const int64_t first = task * run;
    f(first * channels, std::min(run, pixels - first));
  });
}

// Blocks of half types are written in cache.
template <class T>
bool goes_past_caches(const Stored& y, int64_t pixels, int64_t channels) {
  return !y.half && outgrows_caches<T>(y.at<T>(0), pixels, channels);
}

Tensor local_response_norm(const Tensor& x, int64_t size, double scale, double beta, double k,
                           bool relu) {
  check(x, size);
  const Arguments arguments{size, scale, beta, k, relu};
  const Tensor input = in_order_of(x, x), y = new_like(x, x.scalar_type());
  if (x.numel() == 0) return y;
  with_scalar_type(x.scalar_type(), "local_response_norm", [&](auto scalar) {
    using T = decltype(scalar);
    const auto& table = NNARCH_SELECT(response_table<T>());
    const auto a = response<T>(arguments, x.size(1));
    const Stored from(input), to(y);
    if (follows_channels_last(x)) {
      set_algorithm("channels_last");
      const bool past_caches = goes_past_caches<T>(to, x.numel() / a.channels, a.channels);
      over_rows(x, [&](int64_t at, int64_t pixels) {
        const Scratch<T> scratch(scratch_of_rows(a));
        const Reading<T> in(from, {at, pixels * a.channels});
        const Writing<T> out(to, {at, pixels * a.channels});
        table.forward_rows(in.get(), pixels, a, scratch.get(), out.get(), past_caches);
      });
    } else {
      set_algorithm("planes");
      const int64_t plane = pixels_of(x);
      over_planes(x, kPlaneBlock, [&](int64_t at, int64_t pixels) {
        const Reading<T> in(from, {at, pixels, a.channels, plane});
        const Writing<T> out(to, {at, pixels, a.channels, plane});
        table.forward_planes(in.get(), in.step(), pixels, a, out.get());
      });
    }
  });
  return y;
}

Tensor local_response_norm_grad(const Tensor& grad, const Tensor& x, int64_t size, double scale,
                                double beta, double k, bool relu) {
  check(x, size);
  require(same_sizes(grad, x) && grad.scalar_type() == x.scalar_type(),
          "local_response_norm_grad: grad must have the shape and dtype of x");
  const Arguments arguments{size, scale, beta, k, relu};
  const Tensor input = in_order_of(x, x), g = in_order_of(x, grad);
  const Tensor dx = new_like(x, x.scalar_type());
  if (x.numel() == 0) return dx;
  with_scalar_type(x.scalar_type(), "local_response_norm_grad", [&](auto scalar) {
    using T = decltype(scalar);
    const auto& table = NNARCH_SELECT(response_table<T>());
    const auto a = response<T>(arguments, x.size(1));
    const Stored from(input), from_grad(g), to(dx);
    if (follows_channels_last(x)) {
      set_algorithm("channels_last");
      const bool past_caches = goes_past_caches<T>(to, x.numel() / a.channels, a.channels);
      over_rows(x, [&](int64_t at, int64_t pixels) {
        const Scratch<T> scratch(scratch_of_rows(a));
        const StoredBlock block{at, pixels * a.channels};
        const Reading<T> in(from, block), dy(from_grad, block);
        const Writing<T> out(to, block);
        table.grad_rows(dy.get(), in.get(), pixels, a, scratch.get(), out.get(), past_caches);
      });
    } else {
      set_algorithm("planes");
      const int64_t plane = pixels_of(x);
      over_planes(x, plane_block<T>(a.channels), [&](int64_t at, int64_t pixels) {
        const Scratch<T> scratch(2 * a.channels * pixels);
        const StoredBlock block{at, pixels, a.channels, plane};
        const Reading<T> in(from, block), dy(from_grad, block);
        const Writing<T> out(to, block);
        table.grad_planes(dy.get(), in.get(), in.step(), pixels, a, scratch.get(), out.get());
      });
    }
  });
  return dx;
}

}  // namespace

NNARCH_OPS(local_response_norm, ops) {
  ops.impl("local_response_norm", TORCH_BOX(&local_response_norm));
  ops.impl("local_response_norm_grad", TORCH_BOX(&local_response_norm_grad));
}

}  // namespace nnarch
