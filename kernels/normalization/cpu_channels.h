// How a tensor [N, C, …] is cut into blocks for per-channel work, and reduced over all but C.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/arena.h"
#include "cpu/dense.h"
#include "cpu/half.h"
#include "cpu/parallel.h"
#include "cpu/streaming.h"
#include "cpu/tensor.h"
#include "normalization/cpu_kernels.h"

namespace nnarch {

// A dense tensor: either pixels of C channels each ("rows"), or planes of one channel each.
struct Channels {
  int64_t images, channels, plane;
  bool rows;

  explicit Channels(const Tensor& x) : images(x.size(0)), channels(x.size(1)), plane(1) {
    for (int64_t d = 2; d < x.dim(); ++d) plane = checked_product(plane, x.size(d));
    rows = plane == 1 || follows_channels_last(x);
    set_algorithm(rows ? "channels_innermost" : "planes");
  }
  int64_t positions() const { return images * plane; }
};

// The tensors of an operation as they are stored, dense and in one order, and what else is in
// NormOperands.
template <class T>
struct NormTensors {
  Stored x, grad, gradgrad, residual, y;
  const T* mean = nullptr;
  int64_t activation = 0;
  T alpha = 0;
};

// Tensors of this size and more are taken to come from memory (kFarBytes in streaming.h is of input
// and output together). All layers of one kind in a training step (Zen 4, AVX-512, N 8), ms: 256
// channels of 56×56 forward and backward 66 to 39, 128 of 28×28 (3.2 MB) backward 6.4 to 4.5.
// Smaller ones that are in a cache would take up to a fifth more.
inline constexpr int64_t kFarTensor = int64_t{3} << 20;

// Where a tensor of this shape is, and one that is written to `out`, if any.
template <class T>
Reach reach_of(const Channels& x, const T* out = nullptr) {
  if (!x.rows || x.positions() * x.channels * int64_t{sizeof(T)} < kFarTensor) return Reach::near;
  return out && outgrows_caches(out, x.positions(), x.channels) ? Reach::past : Reach::far;
}

// The operands of the elements [first, first + n).
template <class T>
class NormBlock {
 public:
  NormBlock(const NormTensors<T>& t, int64_t first, int64_t n, Reach reach)
      : x_(t.x, {first, n}),
        grad_(t.grad, {first, n}),
        gradgrad_(t.gradgrad, {first, n}),
        residual_(t.residual, {first, n}),
        y_(t.y, {first, n}),
        operands_{x_.origin(),        grad_.origin(), gradgrad_.origin(),
                  residual_.origin(), y_.origin(),    t.mean,
                  t.activation,       t.alpha,        t.x.half ? Reach::near : reach} {}
  const NormOperands<T>& operands() const { return operands_; }

 private:
  Reading<T> x_, grad_, gradgrad_, residual_, y_;
  NormOperands<T> operands_;
};

// Calls on_rows(operands, first, pixels, out) or on_plane(operands, first, count, channel, out) for
// blocks that cover the tensor and the output: `first` is the offset of an element, `out` where
// element 0 of the output would lie.
template <class T, class OnRows, class OnPlane>
void for_each_block(const Channels& x, const NormTensors<T>& tensors, const Tensor& output,
                    const OnRows& on_rows, const OnPlane& on_plane) {
  if (x.positions() == 0 || x.channels == 0) return;
  const Stored stored(output);
  // Elements: enough to hide the hand-over, small enough for L2; those of half types, which pass
  // through scratch memory, for L1.
  const int64_t block = stored.half ? 4096 : 16384;
  const Reach reach = reach_of<T>(x, stored.half ? nullptr : stored.at<T>(0));
  if (x.rows) {
    const int64_t run = std::max<int64_t>(1, block / x.channels);
    parallel_tasks(ceil_div(x.positions(), run), [&](int64_t task) {
      const int64_t first = task * run * x.channels;
      const int64_t pixels = std::min(run, x.positions() - task * run), n = pixels * x.channels;
      const NormBlock<T> in(tensors, first, n, reach);
      const Writing<T> out(stored, {first, n});
      on_rows(in.operands(), first, pixels, out.origin());
    });
    return;
  }
  const int64_t planes = x.images * x.channels;
  const int64_t runs = ceil_div(x.plane, block);                   // of one plane
  const int64_t together = std::max<int64_t>(1, block / x.plane);  // planes in one task
  parallel_tasks(ceil_div(planes, together) * runs, [&](int64_t task) {
    const int64_t from = task / runs * together, to = std::min(planes, from + together);
    const int64_t start = task % runs * block, count = std::min(block, x.plane - start);
    const int64_t first = from * x.plane + start, n = (to - from - 1) * x.plane + count;
    const NormBlock<T> in(tensors, first, n, Reach::near);
    const Writing<T> out(stored, {first, n});
    for (int64_t p = from; p < to; ++p)
      on_plane(in.operands(), p * x.plane + start, count, p % x.channels, out.origin());
  });
}

// Sums over all positions are first taken over parts, fixed by the tensor's shape and small enough
// to stay in the L2 cache for a second pass.
class Parts {
 public:
  explicit Parts(const Channels& x) : x_(x) {
    constexpr int64_t cached = 49152;
    if (x.rows) {
      pixels_ = std::max<int64_t>(32, cached / std::max<int64_t>(1, x.channels));
      count_ = ceil_div(x.positions(), pixels_);
      group_ = std::max<int64_t>(1, x.channels);
      return;
    }
    run_ = std::min<int64_t>(x.plane, cached);
    images_ = std::clamp<int64_t>(8192 / x.plane, 1, x.images);
    runs_ = ceil_div(x.plane, run_);
    count_ = ceil_div(x.images, images_) * runs_;
    group_ = std::clamp<int64_t>(cached / (images_ * run_), 1, std::max<int64_t>(1, x.channels));
  }

  int64_t count() const { return count_; }

  // How many positions of a channel lie in a part.
  int64_t positions(int64_t part) const {
    if (x_.rows) return std::min(pixels_, x_.positions() - part * pixels_);
    return images_in(part) * run_length(part);
  }

  // Calls f(part, first channel, last channel + 1) for every part and group of channels.
  template <class F>
  void for_each(const F& f) const {
    const int64_t groups = ceil_div(x_.channels, group_);
    parallel_tasks(count_ * groups, [&](int64_t task) {
      const int64_t from = task % groups * group_;
      f(task / groups, from, std::min(x_.channels, from + group_));
    });
  }

  // Adds the terms of `kind` for channels [from, to) of a part to sums[term * channels + c].
  template <class T>
  void reduce(const NormTable<T>& table, Reduction kind, const NormTensors<T>& tensors,
              int64_t part, int64_t from, int64_t to, double* sums) const {
    if (x_.rows) {
      const int64_t first = part * pixels_ * x_.channels, pixels = positions(part);
      const NormBlock<T> block(tensors, first, pixels * x_.channels, reach_of<T>(x_));
      table.reduce_rows(kind, block.operands(), first, pixels, x_.channels, sums);
      return;
    }
    const int64_t first_image = part / runs_ * images_, start = part % runs_ * run_;
    for (int64_t c = from; c < to; ++c)
      for (int64_t i = first_image; i < first_image + images_in(part); ++i) {
        const int64_t first = (i * x_.channels + c) * x_.plane + start;
        const NormBlock<T> block(tensors, first, run_length(part), Reach::near);
        table.reduce_plane(kind, block.operands(), first, run_length(part), c, x_.channels, sums);
      }
  }

 private:
  int64_t images_in(int64_t part) const {
    return std::min(images_, x_.images - part / runs_ * images_);
  }
  int64_t run_length(int64_t part) const { return std::min(run_, x_.plane - part % runs_ * run_); }

  const Channels x_;
  int64_t count_ = 0, group_ = 1;
  int64_t pixels_ = 1;                       // of a part of rows
  int64_t images_ = 1, run_ = 1, runs_ = 1;  // of a part of planes: run of each of some images
};

// The terms of `kind` summed over all positions: totals[term * channels + c].
template <class T>
std::vector<double> channel_sums(Reduction kind, const NormTensors<T>& o, const Channels& x) {
  const int64_t size = terms_of(kind) * x.channels;
  std::vector<double> totals(static_cast<size_t>(size), 0.0);
  if (x.positions() == 0 || x.channels == 0) return totals;
  const auto& table = NNARCH_SELECT(norm_table<T>());
  const Parts parts(x);
  Scratch<double> partial(checked_product(parts.count(), size));
  parts.for_each([&](int64_t part, int64_t from, int64_t to) {
    double* sums = partial.get() + part * size;
    for (int t = 0; t < terms_of(kind); ++t)
      std::fill(sums + t * x.channels + from, sums + t * x.channels + to, 0.0);
    parts.reduce(table, kind, o, part, from, to, sums);
  });
  for (int64_t part = 0; part < parts.count(); ++part)
    for (int64_t i = 0; i < size; ++i) totals[i] += partial[part * size + i];
  return totals;
}

// A per-channel vector beside x, dense and in the type that kernels compute in; `fallback` where
// there is none.
template <class T>
class ChannelVector {
 public:
  ChannelVector(const OptTensor& t, const Tensor& x, T fallback) : copy_(t ? 0 : x.size(1)) {
    const int64_t channels = x.size(1);
    if (t) {
      require(t->dim() == 1 && t->size(0) == channels, "per-channel tensor must have size [C]");
      require(t->scalar_type() == x.scalar_type() ||
                  (is_half(x.scalar_type()) && t->scalar_type() == ScalarType::Float),
              "per-channel tensor must have the dtype of the input, or float32 beside a half type");
      tensor_ = as_contiguous(to_compute_type(*t));
      values_ = data<T>(*tensor_);
    } else {
      std::fill(copy_.get(), copy_.get() + channels, fallback);
      values_ = copy_.get();
    }
  }
  const T* get() const { return values_; }
  T operator[](int64_t c) const { return values_[c]; }

 private:
  OptTensor tensor_;
  Scratch<T> copy_;
  const T* values_;  // torch's data_ptr() is a call of its own
};

inline void check_channels(const Tensor& x) {
  require(x.dim() >= 2, "input must have at least 2 dimensions");
  with_scalar_type(x.scalar_type(), "normalization", [](auto) {});
}

inline void check_like(const Tensor& x, const Tensor& t) {
  require(t.scalar_type() == x.scalar_type(), "dtypes differ");
  require(same_sizes(x, t), "shapes differ");
}

}  // namespace nnarch
