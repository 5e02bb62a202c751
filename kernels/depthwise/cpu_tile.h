// The input tile of a task: rows of the image, a block of channels wide, dense.
#pragma once

#include "cpu/layout.h"
#include "cpu/simd.h"
#include "depthwise/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {

NNARCH_INLINE int64_t floor_div(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}
NNARCH_INLINE int64_t limit(int64_t v, int64_t low, int64_t high) {
  return v < low ? low : v > high ? high : v;
}
NNARCH_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NNARCH_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
NNARCH_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
NNARCH_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <class T>
NNARCH_INLINE void clear(T* p, int64_t n) {
  if (n > 0) __builtin_memset(p, 0, static_cast<size_t>(n) * sizeof(T));
}

// The compiler may not derive this pointer from others: it must advance it step by step.
template <class P>
NNARCH_INLINE void keep_pointer(P& p) {
#if defined(__GNUC__)
  asm("" : "+r"(p));
#endif
}

// v[i] = p[lane[i]]; `n` values are readable at p, and no lane[i] reaches past them.
NNARCH_INLINE Vec<float> gather_lanes(const float* p, const int32_t* lane, int64_t n) {
#if defined(NNARCH_ISA_avx512)
  return (Vec<float>)_mm512_permutexvar_ps(_mm512_loadu_si512(lane), (__m512)load_n(p, n));
#elif defined(NNARCH_ISA_avx2)
  const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane));
  return (Vec<float>)_mm256_permutevar8x32_ps((__m256)load_n(p, n), index);
#else
  (void)n;
  return Vec<float>{p[lane[0]], p[lane[1]], p[lane[2]], p[lane[3]]};
#endif
}
NNARCH_INLINE Vec<double> gather_lanes(const double* p, const int32_t* lane, int64_t) {
  Vec<double> v;
  for (int i = 0; i < kLanes<double>; ++i) v[i] = p[lane[i]];
  return v;
}

// Copies `pixels` pixels of `n` channels; the rest of the last vector becomes zero.
template <class T>
NNARCH_INLINE void copy_pixels(const T* src, int64_t src_pixel, T* dst, int64_t pitch,
                               int64_t pixels, int64_t n) {
  constexpr int w = kLanes<T>;
  if (src_pixel == pitch && n == pitch) n *= pixels, pixels = 1;  // one run
  const int64_t full = n / w * w;
  for (int64_t p = 0; p < pixels; ++p, src += src_pixel, dst += pitch) {
    int64_t k = 0;
    for (; k + 4 * w <= full; k += 4 * w) {
      const Vec<T> v0 = load(src + k), v1 = load(src + k + w);
      const Vec<T> v2 = load(src + k + 2 * w), v3 = load(src + k + 3 * w);
      store(dst + k, v0), store(dst + k + w, v1);
      store(dst + k + 2 * w, v2), store(dst + k + 3 * w, v3);
    }
    for (; k < full; k += w) store(dst + k, load(src + k));
    if (k < n) store(dst + k, load_n(src + k, n - k));
  }
}

// The same from either memory order; the rest of the last vector becomes zero too.
template <class T>
NNARCH_INLINE void load_pixels(const T* src, int64_t src_pixel, int64_t src_channel, T* dst,
                               int64_t pitch, int64_t pixels, int64_t n) {
  if (src_channel == 1) return copy_pixels(src, src_pixel, dst, pitch, pixels, n);
  if (n != pitch) clear(dst, pixels * pitch);
  transpose_kernel<T>()(src, src_channel, dst, pitch, n, pixels);
}

// The kernel rows [first, last) of a pass that lie in the image for output row oy.
template <class T>
NNARCH_INLINE void kernel_rows(const DepthwiseConv<T>& c, const DepthwisePass<T>& pass, int64_t oy,
                               int64_t* first, int64_t* last) {
  const int64_t iy = oy * c.stride_h + pass.row;
  *first = limit(-floor_div(iy, c.dilation_h), 0, pass.r);
  *last = limit(floor_div(c.h - 1 - iy, c.dilation_h) + 1, *first, pass.r);
}

// The same where output channels share input channels.
template <class T>
NNARCH_INLINE void spread_pixels(const DepthwiseConv<T>& c, const T* src, int64_t channel, T* dst,
                                 int64_t pitch, int64_t pixels) {
  for (int64_t p = 0; p < pixels; ++p, src += c.x_pixel, dst += pitch)
    for (int64_t k = 0; k < pitch; k += kLanes<T>) {
      const int64_t from = c.vector_source[(channel + k) / kLanes<T>];
      store(dst + k, gather_lanes(src + from, c.lane_source + channel + k, c.x_channels - from));
    }
}

// Where the strips of a task find their input: in a tile, or in the image itself.
template <class T>
class Tile {
 public:
  // For the output columns from x_first on.
  Tile(const DepthwiseConv<T>& c, const DepthwisePlan& plan, const DepthwiseTask& task, T* memory,
       int64_t x_first)
      : c_(c),
        plan_(plan),
        task_(task),
        memory_(memory),
        pitch_(round_up(task.channels, kLanes<T>)),
        column_(x_first * c.stride_w + plan.first_column),
        first_(limit(-column_, 0, plan.tile_columns)),
        last_(limit(c.w - column_, first_, plan.tile_columns)) {
    if (!plan.direct) clear_padding();
  }

  // Makes the input rows of output row oy present, where rows are kept. Where they are read in
  // place and come from memory, reads those of the next output row from end to end: strips meet the
  // cache lines of a row in an order that the hardware does not prefetch.
  void load(int64_t oy) {
    if (!plan_.ring && !plan_.far) return;
    const int64_t iy = (plan_.far ? oy + 1 : oy) * c_.stride_h + plan_.first_row;
    const int64_t last = smaller(iy + plan_.reach, c_.h);
    for (int64_t i = larger(larger(iy, 0), next_); i < last; ++i)
      plan_.far ? touch_row(i) : load_row(i, slot(i));
    next_ = larger(next_, last);
  }

  // Rows [first, last) of those that come from memory.
  void touch(int64_t first, int64_t last) const {
    if (!plan_.far) return;
    for (int64_t i = larger(first, 0); i < smaller(last, c_.h); ++i) touch_row(i);
  }

  // Input row iy, the r-th that the kernel reads.
  const T* row(int64_t iy, int64_t r) {
    if (plan_.direct) return c_.x + iy * c_.x_row + task_.channel;
    if (plan_.ring) return slot(iy);
    load_row(iy, slot(r));
    return slot(r);
  }

  // Distance of neighbouring pixels in a row, and the place of input column `column`.
  int64_t pixel() const { return plan_.direct ? c_.x_pixel : pitch_; }
  int64_t offset(int64_t column) const {
    return plan_.direct ? column * c_.x_pixel : (column - column_) * pitch_;
  }
  // How many of the columns first, first + dilation_w, … are left of the image and not in a tile;
  // of the columns last, last - dilation_w, …, right of it.
  int64_t missing_left(int64_t first) const {
    return plan_.direct && first < 0 ? ceil_div(-first, c_.dilation_w) : 0;
  }
  int64_t missing_right(int64_t last) const {
    return plan_.direct && last >= c_.w ? ceil_div(last - c_.w + 1, c_.dilation_w) : 0;
  }

 private:
  T* slot(int64_t i) const { return memory_ + i % plan_.tile_rows * (plan_.tile_columns * pitch_); }

  void clear_padding() const {
    for (int64_t r = 0; r < plan_.tile_rows; ++r) {
      clear(slot(r), first_ * pitch_);
      clear(slot(r) + last_ * pitch_, (plan_.tile_columns - last_) * pitch_);
    }
  }

  void touch_row(int64_t iy) const {
    constexpr auto line = 64 / static_cast<int64_t>(sizeof(T));
    const int64_t first = limit(column_, 0, c_.w);
    const int64_t last = limit(column_ + plan_.columns * c_.stride_w, first, c_.w);
    const volatile T* row = c_.x + iy * c_.x_row;
    for (int64_t i = first * c_.x_pixel; i < last * c_.x_pixel; i += line) (void)row[i];
  }

  void load_row(int64_t iy, T* row) const {
    T* dst = row + first_ * pitch_;
    const T* src = c_.x + iy * c_.x_row + (column_ + first_) * c_.x_pixel;
    const int64_t pixels = last_ - first_;
    if (c_.lane_source)
      spread_pixels(c_, src, task_.channel, dst, pitch_, pixels);
    else
      load_pixels(src + task_.channel * c_.x_channel, c_.x_pixel, c_.x_channel, dst, pitch_, pixels,
                  task_.channels);
  }

  const DepthwiseConv<T>& c_;
  const DepthwisePlan& plan_;
  const DepthwiseTask& task_;
  T* memory_;
  int64_t pitch_, column_, first_, last_;  // columns [first_, last_) of the tile are in the image
  int64_t next_ = 0;                       // rows up to here have been loaded
};

}  // namespace nnarch::NNARCH_ISA
