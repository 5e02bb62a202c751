// Signals [N, C, 1, L] read and written as they lie, channel by channel. (Brought to channels_last
// and back, 64 channels of 1000 samples took a quarter longer.)
//
//     y[k][i] = Σ_{c,s} w[k][c·S + s] · x[c][i·stride + s·dilation − left]
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "conv2d/cpu_shape.h"
#include "conv2d/signal.h"
#include "cpu/arena.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace nnarch {

// Rows of outputs that fill register tiles. With long sums the product by packed weights is faster
// (512 channels, 3 taps: by 5 to 15 %), and what the memory format costs is little beside it.
inline bool signal_serves(const ConvShape& p) {
  const bool one_row = p.groups == 1 && p.h == 1 && p.r == 1 && p.oh == 1 && p.top == 0;
  if (!one_row || p.ow < 64 || p.c * p.s > 768) return false;
  // Huge dilations and steps would need as many samples in scratch: 4 MB of floats at most.
  const double reach = static_cast<double>(p.s - 1) * static_cast<double>(p.dilation_w);
  const double step = static_cast<double>(p.stride_w);
  return static_cast<double>(p.c) * std::min(step, reach + 1) * (513 + reach / step) <=
         double{1 << 20};
}

// The weight as rows [c][s]: as it lies where it is dense.
template <class T>
class SignalWeight {
 public:
  SignalWeight(const Tensor& weight, const ConvShape& p)
      : own_(is_dense(weight, p) ? 0 : p.k * p.c * p.s),
        rows_(is_dense(weight, p) ? data<T>(weight) : own_.get()) {
    if (is_dense(weight, p)) return;
    T* to = own_.get();
    for (int64_t k = 0; k < p.k; ++k)
      for (int64_t c = 0; c < p.c; ++c)
        for (int64_t s = 0; s < p.s; ++s)
          *to++ =
              data<T>(weight)[k * weight.stride(0) + c * weight.stride(1) + s * weight.stride(3)];
  }

  const T* get() const { return rows_; }

 private:
  static bool is_dense(const Tensor& weight, const ConvShape& p) {
    return (p.s == 1 || weight.stride(3) == 1) && (p.c == 1 || weight.stride(1) == p.s) &&
           (p.k == 1 || weight.stride(0) == p.c * p.s);
  }

  Scratch<T> own_;
  const T* rows_;
};

// The samples under `count` outputs: a row for every channel and tap, readable for whole panels.
template <class T>
class SignalTaps {
 public:
  SignalTaps(const ConvShape& p, int64_t most)
      : p_(p),
        reach_((p.s - 1) * p.dilation_w),
        length_(most + reach_ / p.stride_w + 1),
        phases_(std::min(p.stride_w, reach_ + 1)),
        samples_(p.c * phases_ * length_),
        rows_(p.c * p.s) {}

  // `x` is the image; `first` the output that element 0 of every row belongs to.
  const T* const* rows(const T* x, int64_t first, int64_t count) {
    const int64_t begin = first * p_.stride_w - p_.left;
    const bool as_it_lies = p_.stride_w == 1 && begin >= 0 && begin + count + reach_ <= p_.w;
    int64_t at = 0;
    for (int64_t c = 0; c < p_.c; ++c, x += p_.w) {
      T* mine = samples_.get() + c * phases_ * length_;
      if (!as_it_lies) copy(x, begin, count, mine);
      for (int64_t s = 0; s < p_.s; ++s) {
        const int64_t offset = s * p_.dilation_w;
        rows_[at++] = as_it_lies ? x + begin + offset
                                 : mine + offset % p_.stride_w * length_ + offset / p_.stride_w;
      }
    }
    return rows_.get();
  }

 private:
  // The samples from `begin` on, one phase of the stride after the other; zeros in the padding.
  void copy(const T* x, int64_t begin, int64_t count, T* dst) const {
    const int64_t step = p_.stride_w;
    for (int64_t phase = 0; phase < phases_; ++phase, dst += length_) {
      const int64_t length = count + (reach_ - phase) / step, at = begin + phase;
      const int64_t from = std::clamp<int64_t>(at < 0 ? ceil_div(-at, step) : 0, 0, length);
      const int64_t to =
          std::clamp<int64_t>(at < p_.w ? ceil_div(p_.w - at, step) : 0, from, length);
      std::fill_n(dst, from, T{0});
      if (step == 1) {
        std::copy_n(x + at + from, to - from, dst + from);
      } else {
        signals<T>().every(x + at + from * step, step, to - from, dst + from);
      }
      std::fill(dst + to, dst + length, T{0});
    }
  }

  const ConvShape& p_;
  int64_t reach_, length_, phases_;
  Scratch<T> samples_;
  Scratch<const T*> rows_;
};

// `x` and `y` are contiguous, and so is the residual.
template <class T>
void signal_forward(const T* x, const Tensor& weight, T* y, const ConvShape& p,
                    const Epilogue<T>& epilogue) {
  const SignalTable<T>& table = signals<T>();
  const SignalWeight<T> a(weight, p);
  const int64_t depth = p.c * p.s;
  // More where the samples stay in the first-level cache nevertheless.
  const int64_t wide = depth * 512 * int64_t{sizeof(T)} <= 24 << 10 ? 512 : 256;
  const int64_t block = std::min(wide, round_up(p.ow, table.panel));
  const int64_t blocks = ceil_div(p.ow, block);
  parallel_tasks(p.n * blocks, [&](int64_t task) {
    const int64_t image = task / blocks, first = task % blocks * block;
    const int64_t count = std::min(block, p.ow - first);
    SignalTaps<T> taps(p, block);
    const int64_t out = image * p.k * p.ow + first;
    SignalBlock<T> g{.a = a.get(),
                     .a_step = depth,
                     .rows = p.k,
                     .depth = depth,
                     .b = taps.rows(x + image * p.c * p.w, first, round_up(count, table.panel)),
                     .columns = count,
                     .y = y + out,
                     .y_step = p.ow,
                     .epilogue = epilogue};
    if (epilogue.residual) g.epilogue.residual += out;
    table.run(g);
  });
}

}  // namespace nnarch
