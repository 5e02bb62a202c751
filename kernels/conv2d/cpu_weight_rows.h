// Where the gradient of a weight is written, channel by channel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/arena.h"
#include "cpu/layout.h"
#include "cpu/streaming.h"

namespace nnarch {

// The gradient of some output channels, dw[k][c][tap] or, channels_last, dw[k][tap][c].
template <class T>
class WeightRows {
 public:
  WeightRows(T* dw, int64_t k, int64_t taps, int64_t depth, bool channels_last)
      : dw_(dw),
        taps_(taps),
        depth_(depth),
        channels_last_(channels_last),
        past_caches_(outgrows_caches(dw, k * taps, depth)) {}

  // Where [tap][c] of a channel may be written at once, or null; past the caches if so.
  T* in_place(int64_t k) const { return channels_last_ ? dw_ + k * taps_ * depth_ : nullptr; }
  bool past_caches() const { return past_caches_; }

  // Input channels [c, c + channels) of output channel k, from lines[tap][c] that are `step` apart.
  void put(const T* lines, int64_t step, int64_t k, int64_t c, int64_t channels) const {
    T* const row = dw_ + k * taps_ * depth_;
    if (channels_last_) return copy(lines, step, row + c, depth_, taps_, channels);
    if (!past_caches_)
      return transpose_fn<T>()(lines, step, row + c * taps_, taps_, taps_, channels);
    Scratch<T> turned(taps_ * channels);
    transpose_fn<T>()(lines, step, turned.get(), taps_, taps_, channels);
    copy(turned.get(), 0, row + c * taps_, 0, 1, taps_ * channels);
  }

 private:
  void copy(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows,
            int64_t count) const {
    constexpr int64_t each = sizeof(T);
    if (past_caches_)
      return NNARCH_SELECT(
          stream_rows(from, from_step * each, to, to_step * each, rows, count * each));
    for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * from_step, count, to + i * to_step);
  }

  T* dw_;
  int64_t taps_, depth_;
  bool channels_last_, past_caches_;
};

}  // namespace nnarch
