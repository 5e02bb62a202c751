// Square windows of channels_last images that slide along rows: for *_isa.cpp files.
//
// The taps of a window's column become one value, which neighbouring windows share: 3×3 at stride 1
// then loads two vectors for an output instead of nine, at stride 2 five. Two output rows go
// together, as they share input rows. Where the image comes from further away, the rows of later
// outputs are asked for between the arithmetic, so that neither waits for the other; into the
// second level, as into the first it takes up to a third longer. 3×3 at stride 2, 64 channels of
// 112×112, N 16, the kernel alone: rows read ahead of the windows 2982 µs, columns before rows
// 2433, with the rows asked for 2004; N 8 1088, 873 and 595.
#pragma once

#include "cpu/simd.h"
#include "pooling/cpu_kernels.h"
#include "pooling/reduce_isa.h"

namespace nnarch::NNARCH_ISA {

// Output rows side by side, and vectors of channels: what windows share stays in registers.
inline constexpr int kSlideRows = kVectorBytes == 64 ? 2 : 1;
inline constexpr int kSlideVectors = 4;

// Asks for rows of the image that later outputs need, some lines of each at a time.
template <class T>
class RowsAhead {
 public:
  // The rows from `first` on, in so many steps; none where that is not wanted.
  NNARCH_INLINE RowsAhead(const T* first, int64_t row, int64_t steps, bool wanted)
      : at_(first), row_(row), end_(wanted ? row : 0), lines_((row / kLine + steps - 1) / steps) {}

  template <int ROWS>
  NNARCH_INLINE void step() {
    for (int64_t i = 0; i < lines_ && done_ < end_; ++i, done_ += kLine)
      for (int r = 0; r < ROWS; ++r) __builtin_prefetch(at_ + r * row_ + done_, 0, 2);
  }

 private:
  static constexpr auto kLine = 64 / static_cast<int64_t>(sizeof(T));
  const T* at_;
  int64_t row_, end_, lines_, done_ = 0;
};

// K x K windows at stride S: R output rows of an image.
template <class T, class Acc, int K, int S, int R>
class SlideRows {
 public:
  static constexpr int kRows = (R - 1) * S + K;  // of the image
  static constexpr int kKept = K - S;            // columns that the next window shares

  NNARCH_INLINE SlideRows(const T* image, int64_t channels, const Axis& h, const Axis& w,
                          int64_t row, bool last, T* y, const Traffic& traffic)
      : channels_(channels), h_(h), w_(w), row_(row), last_(last), traffic_(traffic) {
    const int64_t pitch = w.inputs * channels, top = row * S - h.padding;
    for (int t = 0; t < kRows; ++t) {
      const bool inside = top + t >= 0 && top + t < h.inputs;
      rows_[t] = inside ? image + (top + t) * pitch : nullptr;
      all_rows_ &= inside;
    }
    y_ = y + row * w.outputs * channels;
    next_ = image + (top + kRows + R * S) * pitch;  // of the outputs after the next
  }

  NNARCH_INLINE void run(typename Acc::Watch& watch) const {
    constexpr int64_t w = kLanes<T>, wide = kSlideVectors * w;
    if constexpr (kKept == 0) return run_pixels(watch);
    const int64_t steps = (channels_ / wide + (channels_ % wide + w - 1) / w) * w_.outputs;
    RowsAhead<T> ahead(next_, w_.inputs * channels_, steps, traffic_.ask);
    int64_t c = 0;
    for (; c + wide <= channels_; c += wide)
      run_vectors<kSlideVectors>(0, w_.outputs, c, watch, ahead);
    for (; c < channels_; c += w) run_vectors<1>(0, w_.outputs, this_or_last(c), watch, ahead);
  }

 private:
  // The last vector of channels overlaps its neighbour.
  NNARCH_INLINE int64_t this_or_last(int64_t c) const {
    return c + kLanes<T> <= channels_ ? c : channels_ - kLanes<T>;
  }

  // In the order of memory, where windows share nothing: a pixel of 2 x 2 windows after the other.
  NNARCH_INLINE void run_pixels(typename Acc::Watch& watch) const {
    static_assert(R == 1 && K == 2 && S == 2);
    constexpr int64_t w = kLanes<T>;
    RowsAhead<T> ahead(next_, w_.inputs * channels_, (channels_ + w - 1) / w * w_.outputs,
                       traffic_.ask);
    typename Acc::Watch seen;  // in a register
    for (int64_t j = 0; j < w_.outputs; ++j) {
      const int64_t first = 2 * j - w_.padding;
      if (!all_rows_ || first < 0 || first + 2 > w_.inputs) {
        for (int64_t c = 0; c < channels_; c += w)
          run_vectors<1>(j, j + 1, this_or_last(c), seen, ahead);
        continue;
      }
      const T *above = rows_[0] + first * channels_, *below = rows_[1] + first * channels_;
      const Vec<T> scale = broadcast(T{1} / static_cast<T>(h_.count[row_] * w_.count[j]));
      T* y = y_ + j * channels_;
      const auto vector_at = [&](int64_t c) NNARCH_INLINE_LAMBDA {
        const Vec<T> v0 = load(above + c), v1 = load(above + channels_ + c);
        const Vec<T> v2 = load(below + c), v3 = load(below + channels_ + c);
        seen.see(v0, v1), seen.see(v2, v3);
        const Vec<T> v = Acc::scaled(Acc::join(Acc::join(v0, v1), Acc::join(v2, v3)), scale);
        if (traffic_.stream)
          stream(y + c, v);
        else
          store(y + c, v);
        ahead.template step<2>();
      };
      int64_t c = 0;
      for (; c + w <= channels_; c += w) vector_at(c);
      if (c < channels_) vector_at(this_or_last(c));
    }
    watch.merge(seen);
  }

  // Output columns [from, to), B vectors of channels from channel c on.
  template <int B>
  NNARCH_INLINE void run_vectors(int64_t from, int64_t to, int64_t c, typename Acc::Watch& watch,
                                 RowsAhead<T>& ahead) const {
    const T* rows[kRows];  // here, where stores to y cannot change them
    for (int t = 0; t < kRows; ++t) rows[t] = rows_[t] ? rows_[t] + c : nullptr;
    Vec<T> kept[B * R * (kKept > 0 ? kKept : 1)];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 2
      for (int i = 0; i < kKept; ++i)
        join_column<true>(rows, i - w_.padding, b, watch, kept + (b * kKept + i) * R);
    typename Acc::Watch seen;  // in a register
    T* y = y_ + from * channels_ + c;
    for (int64_t j = from; j < to; ++j, y += channels_) {
      const int64_t first = j * S - w_.padding + kKept;  // of the new columns
      if (all_rows_ && first >= 0 && first + S <= w_.inputs)
        put_pixel<B, false>(rows, j, first, seen, kept, y);
      else
        put_pixel<B, true>(rows, j, first, seen, kept, y);
      ahead.template step<R * S>();
    }
    watch.merge(seen);
  }

  template <int B, bool CHECKED>
  NNARCH_INLINE void put_pixel(const T* const* rows, int64_t j, int64_t first,
                               typename Acc::Watch& watch, Vec<T>* kept, T* y) const {
    T scale[R];
    for (int r = 0; r < R; ++r) scale[r] = T{1} / static_cast<T>(h_.count[row_ + r] * w_.count[j]);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      Vec<T> column[K * R];  // those kept, then the new ones
#pragma GCC unroll 8
      for (int i = 0; i < kKept * R; ++i) column[i] = kept[b * kKept * R + i];
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s)
        join_column<CHECKED>(rows, first + s, b, watch, column + (kKept + s) * R);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        Vec<T> v = Acc::join(column[r], column[R + r]);
        if constexpr (K == 3) v = Acc::join(v, column[2 * R + r]);
        v = Acc::scaled(v, broadcast(scale[r]));
        T* to = y + r * w_.outputs * channels_ + b * kLanes<T>;
        if (traffic_.stream)
          stream(to, v);
        else
          store(to, v);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kKept * R; ++i) kept[b * kKept * R + i] = column[S * R + i];
    }
  }

  // The taps of vector b in one column of the image, for every output row. CHECKED: some may lie
  // outside.
  template <bool CHECKED>
  NNARCH_INLINE void join_column(const T* const* rows, int64_t column, int b,
                                 typename Acc::Watch& watch, Vec<T>* out) const {
    const bool inside = !CHECKED || (column >= 0 && column < w_.inputs);
    const int64_t at = column * channels_ + b * kLanes<T>;
    Vec<T> v[kRows];
#pragma GCC unroll 8
    for (int t = 0; t < kRows; ++t)
      v[t] = !CHECKED || (inside && rows[t]) ? load(rows[t] + at) : broadcast(Acc::kIdentity);
#pragma GCC unroll 4
    for (int t = 0; t < R * S; t += 2) watch.see(v[t], v[t + 1 < R * S ? t + 1 : t]);
    if (last_)  // else the rest is seen with the next output rows
#pragma GCC unroll 2
      for (int t = R * S; t < kRows; ++t) watch.see(v[t], v[t]);
    if constexpr (K == 2) {
      for (int r = 0; r < R; ++r) out[r] = Acc::join(v[r * S], v[r * S + 1]);
    } else if constexpr (R == 2 && S == 1) {
      const Vec<T> both = Acc::join(v[1], v[2]);
      out[0] = Acc::join(v[0], both), out[1] = Acc::join(v[3], both);
    } else {
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r)
        out[r] = Acc::join(v[r * S + 2], Acc::join(v[r * S], v[r * S + 1]));
    }
  }

  int64_t channels_;
  const Axis &h_, &w_;
  int64_t row_;
  bool last_;  // of a task
  Traffic traffic_;
  const T* rows_[kRows];  // null outside the image
  const T* next_;
  T* y_;
  bool all_rows_ = true;
};

// Output rows [from, to).
template <class T, class Acc, int K, int S>
void slide_rows(const T* image, int64_t channels, const Axis& h, const Axis& w, int64_t from,
                int64_t to, T* y, typename Acc::Watch& watch, const Traffic& traffic) {
  constexpr int R = K > S ? kSlideRows : 1;
  int64_t row = from;
  for (; row + R <= to; row += R)
    SlideRows<T, Acc, K, S, R>(image, channels, h, w, row, row + R == to, y, traffic).run(watch);
  if constexpr (R > 1)
    for (; row < to; ++row)
      SlideRows<T, Acc, K, S, 1>(image, channels, h, w, row, row + 1 == to, y, traffic).run(watch);
}

// The same for windows that there is code for. False: there is none.
template <class T, class Acc>
NNARCH_INLINE bool slide(const T* image, int64_t channels, const Axis& h, const Axis& w,
                         int64_t from, int64_t to, T* y, typename Acc::Watch& watch,
                         const Traffic& traffic) {
  if (channels < kLanes<T> || h.kernel != w.kernel || h.stride != w.stride || h.step != 1 ||
      w.step != 1)
    return false;
  // 2x2 windows share nothing: all that is won is that rows are asked for.
  const auto run = h.kernel == 3 && h.stride == 1                  ? slide_rows<T, Acc, 3, 1>
                   : h.kernel == 3 && h.stride == 2                ? slide_rows<T, Acc, 3, 2>
                   : h.kernel == 2 && h.stride == 2 && traffic.ask ? slide_rows<T, Acc, 2, 2>
                                                                   : nullptr;
  if (run == nullptr) return false;
  run(image, channels, h, w, from, to, y, watch, traffic);
  if (traffic.stream) finish_streaming();
  return true;
}

}  // namespace nnarch::NNARCH_ISA
