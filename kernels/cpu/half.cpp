// Parts of images widened to float, and results rounded back.
#include "cpu/half.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace nnarch {
namespace {

constexpr int64_t kRun = 16384;  // elements of a task

// A part of a dense tensor as runs: `count` of them, `length` long, `step` apart from `first` on.
struct PartRuns {
  int64_t first, count, length, step;

  PartRuns(const Tensor& t, const ImagePart& p) {
    const bool pixels = follows_channels_last(t);
    const int64_t row = t.size(3) * (pixels ? t.size(1) : 1), planes = pixels ? 1 : t.size(1);
    step = t.size(2) * row, first = p.image * planes * step + p.row * row;
    count = p.images * planes, length = p.rows * row;
    if (p.rows == t.size(2)) length *= count, count = 1;
  }

  // f(element of the tensor, element of the part, elements)
  template <class F>
  void each(const F& f) const {
    const int64_t cuts = ceil_div(length, kRun),
                  some = std::max<int64_t>(1, kRun / std::max<int64_t>(1, length));
    parallel_tasks(ceil_div(count, some) * cuts, [&](int64_t task) {
      const int64_t from = task % cuts * kRun, n = std::min(kRun, length - from);
      const int64_t run = task / cuts * some, end = std::min(count, run + some);
      for (int64_t i = run; i < end; ++i) f(first + i * step + from, i * length + from, n);
    });
  }
};

// Planar floats of a part of a tensor of any strides.
void widen_strided(const Tensor& x, const ImagePart& p, float* to) {
  const HalfTable& table = half_table(x.scalar_type());
  const uint16_t* bits = data<uint16_t>(x);
  const int64_t channels = x.size(1), w = x.size(3);
  parallel_tasks(p.images * channels, [&](int64_t task) {
    const Scratch<uint16_t> dense(w);
    const int64_t n = p.image + task / channels, c = task % channels;
    for (int64_t r = 0; r < p.rows; ++r) {
      const uint16_t* from = bits + n * x.stride(0) + c * x.stride(1) + (p.row + r) * x.stride(2);
      for (int64_t i = 0; i < w; ++i) dense[i] = from[i * x.stride(3)];
      table.widen(dense.get(), to + (task * p.rows + r) * w, w);
    }
  });
}

}  // namespace

Tensor widened(const Tensor& x, const ImagePart& p) {
  const IntList sizes{p.images, x.size(1), p.rows, x.size(3)};
  const bool pixels = follows_channels_last(x);
  const Tensor part = pixels ? new_channels_last(sizes, ScalarType::Float)
                             : new_contiguous(sizes, ScalarType::Float);
  if (part.numel() == 0) return part;
  float* to = mutable_data<float>(part);
  if (!pixels && !x.is_contiguous()) {
    widen_strided(x, p, to);
    return part;
  }
  const uint16_t* from = data<uint16_t>(x);
  const HalfTable& table = half_table(x.scalar_type());
  PartRuns(x, p).each([&](int64_t at, int64_t i, int64_t n) { table.widen(from + at, to + i, n); });
  return part;
}

void round_into(const Tensor& y, const ImagePart& p, const Tensor& from) {
  if (from.numel() == 0) return;
  const Tensor part = follows_channels_last(y) ? as_channels_last(from) : as_contiguous(from);
  const float* values = data<float>(part);
  uint16_t* to = mutable_data<uint16_t>(y);
  const HalfTable& table = half_table(y.scalar_type());
  PartRuns(y, p).each(
      [&](int64_t at, int64_t i, int64_t n) { table.narrow(values + i, to + at, n); });
}

namespace {

// A tensor of another type with the strides of `t`, where it is dense.
OptTensor new_as_dense(const Tensor& t, ScalarType type) {
  if (!t.is_contiguous() && !is_channels_last(t)) return std::nullopt;
  const auto strides = t.strides();
  return new_strided(sizes_of(t), IntList(strides.begin(), strides.end()), type);
}

template <class F>
void over_elements(int64_t n, const F& f) {
  parallel_tasks(ceil_div(n, kRun),
                 [&](int64_t task) { f(task * kRun, std::min(kRun, n - task * kRun)); });
}

}  // namespace

Tensor to_compute_type(const Tensor& t) {
  if (!is_half(t.scalar_type())) return t;
  const OptTensor wide = new_as_dense(t, ScalarType::Float);
  if (!wide) return torch::stable::to(t, ScalarType::Float);
  const uint16_t* from = data<uint16_t>(t);
  float* to = mutable_data<float>(*wide);
  const HalfTable& table = half_table(t.scalar_type());
  over_elements(t.numel(), [&](int64_t i, int64_t n) { table.widen(from + i, to + i, n); });
  return *wide;
}

Tensor to_type(const Tensor& t, ScalarType type) {
  if (t.scalar_type() == type) return t;
  const bool narrows = t.scalar_type() == ScalarType::Float && is_half(type);
  const OptTensor small = narrows ? new_as_dense(t, type) : std::nullopt;
  if (!small) return torch::stable::to(t, type);
  const float* from = data<float>(t);
  uint16_t* to = mutable_data<uint16_t>(*small);
  const HalfTable& table = half_table(type);
  over_elements(t.numel(), [&](int64_t i, int64_t n) { table.narrow(from + i, to + i, n); });
  return *small;
}

}  // namespace nnarch
