// Maximum pooling for training: where a maximum was is the number of its tap in the window, one
// byte, from which the gradient is gathered: every input looks at the windows that hold it.
#pragma once

#include "cpu/simd.h"
#include "pooling/best_isa.h"
#include "pooling/cpu_taps.h"
#include "pooling/plane_isa.h"
#include "pooling/reduce_isa.h"

namespace nnarch::NNARCH_ISA {

template <class T>
struct ByteVectors {
  typedef uint8_t V __attribute__((vector_size(kLanes<T>)));
  typedef uint8_t Unaligned __attribute__((vector_size(kLanes<T>), aligned(1), may_alias));
};

template <class T>
NNARCH_INLINE void store_taps(uint8_t* p, Lanes<T> taps) {
#if defined(NNARCH_ISA_avx2)
  if constexpr (sizeof(T) == 4) {  // GCC 12 converts lane by lane
    const __m256i v = (__m256i)taps, words = _mm256_packus_epi32(v, v);
    const __m256i bytes = _mm256_packus_epi16(words, words);
    const __m256i whole =
        _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(whole));
  }
#endif
  *reinterpret_cast<typename ByteVectors<T>::Unaligned*>(p) =
      __builtin_convertvector(taps, typename ByteVectors<T>::V);
}

// The first largest value so far and its tap. Candidates come in the order of taps and hold no NaN.
template <class T>
struct BestTap {
  Vec<T> value;
  Lanes<T> tap;

  NNARCH_INLINE void take(Vec<T> v, Lanes<T> t) {
    const auto replace = v > value;
    value = larger<T>(v, value);
    tap = replace ? t : tap;
  }
};

// One output by torch's rules for NaN and infinities: channel c of an image whose pixels lie
// `pixel` elements apart.
template <class T>
NNARCH_NOINLINE void exact_tap(const T* x, int64_t pixel, const TapAxis& h, const TapAxis& w,
                               int64_t row, int64_t column, T* y, uint8_t* tap) {
  T best = -static_cast<T>(__builtin_huge_val());
  int64_t found = kNoTap;
  for (int64_t r = h.first(row); r < h.past(row); ++r)
    for (int64_t c = w.first(column); c < w.past(column); ++c) {
      const T v = x[(h.at(row, r) * w.inputs + w.at(column, c)) * pixel];
      if (v > best || v != v || found == kNoTap) best = v, found = r * w.kernel + c;
    }
  *y = best;
  *tap = static_cast<uint8_t>(found);
}

template <class T>
void exact_taps(const T* x, int64_t channels, const TapAxis& h, const TapAxis& w, int64_t from,
                int64_t to, T* y, uint8_t* taps) {
  for (int64_t row = from; row < to; ++row)
    for (int64_t column = 0; column < w.outputs; ++column)
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = (row * w.outputs + column) * channels + c;
        exact_tap(x + c, channels, h, w, row, column, y + at, taps + at);
      }
}

// All channels of one output pixel; the last vector overlaps its neighbour. KH x KW is the whole
// window, or 0 x 0 for one that the border cuts.
template <class T, int KH, int KW>
NNARCH_INLINE void pixel_taps(const T* image, int64_t channels, const TapAxis& h, const TapAxis& w,
                              int64_t row, int64_t column, NaNWatch<T>& watch, T* y,
                              uint8_t* taps) {
  constexpr int64_t lane = kLanes<T>;
  const int64_t r0 = KH ? 0 : h.first(row), r1 = KH ? KH : h.past(row);
  const int64_t c0 = KW ? 0 : w.first(column), c1 = KW ? KW : w.past(column);
  const int64_t down = h.dilation * w.inputs * channels, right = w.dilation * channels;
  const T* x = image + (h.at(row, r0) * w.inputs + w.at(column, c0)) * channels;
  NaNWatch<T> seen;
  const auto vector_at = [&](int64_t at) NNARCH_INLINE_LAMBDA {
    const T* p = x + at;
    BestTap<T> best{load(p), lanes<T>(r0 * w.kernel + c0)};
    Vec<T> last = best.value;
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t c = c0; c < c1; ++c) {
        if (r == r0 && c == c0) continue;
        const Vec<T> v = load(p + (r - r0) * down + (c - c0) * right);
        if (((r - r0) * (c1 - c0) + c - c0) % 2 == 1 || KW == 0) seen.see(last, v);
        last = v;
        best.take(v, lanes<T>(KW ? r * KW + c : r * w.kernel + c));
      }
    seen.see(last, last);
    store(y + at, best.value);
    store_taps<T>(taps + at, best.tap);
  };
  int64_t at = 0;
  for (; at + lane <= channels; at += lane) vector_at(at);
  if (at < channels) vector_at(channels - lane);
  watch.merge(seen);
}

template <class T>
void tap_rows(const T* image, int64_t channels, const TapAxis& h, const TapAxis& w, int64_t from,
              int64_t to, T* y, uint8_t* taps) {
  if (channels < kLanes<T>) return exact_taps(image, channels, h, w, from, to, y, taps);
  for (int64_t row = from; row < to; ++row) {
    NaNWatch<T> watch;
    T* to_y = y + row * w.outputs * channels;
    uint8_t* to_taps = taps + row * w.outputs * channels;
    bool any = h.past(row) > h.first(row);
    for (int64_t column = 0; column < w.outputs && any; ++column) {
      const int64_t at = column * channels;
      if (w.past(column) <= w.first(column))
        any = false;
      else if (h.kernel == 3 && w.kernel == 3 && h.whole(row) && w.whole(column))
        pixel_taps<T, 3, 3>(image, channels, h, w, row, column, watch, to_y + at, to_taps + at);
      else if (h.kernel == 2 && w.kernel == 2 && h.whole(row) && w.whole(column))
        pixel_taps<T, 2, 2>(image, channels, h, w, row, column, watch, to_y + at, to_taps + at);
      else
        pixel_taps<T, 0, 0>(image, channels, h, w, row, column, watch, to_y + at, to_taps + at);
    }
    if (!any || watch.any()) exact_taps(image, channels, h, w, row, row + 1, y, taps);
  }
}

// Every window of a row of a plane, along the row alone: its largest value and the column of that.
template <class T, int kernel, int stride>
NNARCH_INLINE BestTap<T> best_along_row(const T* p, const TapAxis& w, NaNWatch<T>& watch) {
  const auto tap_at = [&](int64_t c) NNARCH_INLINE_LAMBDA {
    const T* q = p + c * w.dilation;
    if constexpr (stride == 1)
      return load(q);
    else
      return even_elements(load(q), load(q + kLanes<T>), MakeIndices<kLanes<T>>{});
  };
  BestTap<T> best{tap_at(0), lanes<T>(0)};
  if constexpr (kernel == 3) {
    const Vec<T> b = tap_at(1), c = tap_at(2);
    watch.see(best.value, b);
    watch.see(c, c);
    best.take(b, lanes<T>(1));
    best.take(c, lanes<T>(2));
  } else {
    Vec<T> last = best.value;
    for (int64_t c = 1; c < (kernel ? kernel : w.kernel); ++c) {
      const Vec<T> v = tap_at(c);
      watch.see(last, v);
      last = v;
      best.take(v, lanes<T>(c));
    }
    watch.see(last, last);
  }
  return best;
}

// One output row of a plane: `rows` are the window's input rows [r0, r1), padded. Along each row
// first, then down: candidates stay in the order of taps. KH is the number of rows where they are
// all there, else 0. Returns whether the result is void.
template <class T, int kernel, int stride, int KH>
NNARCH_INLINE bool plane_row_taps(const T* rows, int64_t pitch, int64_t r0, int64_t r1,
                                  const TapAxis& w, T* y, uint8_t* taps) {
  constexpr int64_t lane = kLanes<T>;
  const Vec<T> least = lowest<T>();
  NaNWatch<T> watch;
  auto empty = least != least;
  if constexpr (KH > 0) r0 = 0, r1 = KH;
  for (int64_t j = 0; j < w.outputs; j += lane) {
    const T* p = rows + stride * j;
    BestTap<T> best = best_along_row<T, kernel, stride>(p, w, watch);
    if (KH == 0) best.tap += lanes<T>(r0 * w.kernel);
    for (int64_t r = r0 + 1; r < r1; ++r) {
      const BestTap<T> next = best_along_row<T, kernel, stride>(p + (r - r0) * pitch, w, watch);
      best.take(next.value, next.tap + lanes<T>(r * (kernel ? kernel : w.kernel)));
    }
    const auto low = best.value == least;  // padding, or an input that has to win over padding
    if (j + lane <= w.outputs) {
      empty |= low;
      store(y + j, best.value);
      store_taps<T>(taps + j, best.tap);
    } else {
      const int64_t n = w.outputs - j;
      store_n(y + j, best.value, n);
      for (int64_t k = 0; k < n; ++k) {
        taps[j + k] = static_cast<uint8_t>(best.tap[k]);
        empty[k] |= low[k];
      }
    }
  }
  bool again = watch.any();
  for (int64_t k = 0; k < lane; ++k) again |= empty[k] != 0;
  return again;
}

template <class T, int kernel, int stride>
NNARCH_NOINLINE void plane_taps(const T* plane, const TapAxis& h, const TapAxis& w, int64_t from,
                                int64_t to, T* y, uint8_t* taps, T* buffer, int64_t pitch,
                                int64_t rows) {
  int64_t held = 0, past = 0;  // input rows [held, past) are in the buffer
  for (int64_t i = from; i < to; ++i) {
    const int64_t r0 = h.first(i), r1 = h.past(i);
    T* to_y = y + i * w.outputs;
    uint8_t* to_taps = taps + i * w.outputs;
    bool again = r1 <= r0;
    if (!again) {
      const int64_t top = h.at(i, r0), bottom = h.at(i, r1 - 1) + 1;
      if (top < held || bottom > past) {
        held = top;
        past = top + rows < h.inputs ? top + rows : h.inputs;
        for (int64_t row = held; row < past; ++row)
          __builtin_memcpy(buffer + (row - held) * pitch + w.padding, plane + row * w.inputs,
                           static_cast<size_t>(w.inputs) * sizeof(T));
      }
      const T* rows_of_window = buffer + (top - held) * pitch;
      const int64_t step = pitch * h.dilation;
      again = kernel > 0 && r0 == 0 && r1 == kernel
                  ? plane_row_taps<T, kernel, stride, kernel>(rows_of_window, step, r0, r1, w, to_y,
                                                              to_taps)
                  : plane_row_taps<T, kernel, stride, 0>(rows_of_window, step, r0, r1, w, to_y,
                                                         to_taps);
    }
    if (again) exact_taps(plane, 1, h, w, i, i + 1, y, taps);
  }
}

template <class T>
void tap_plane(const T* plane, const TapAxis& h, const TapAxis& w, int64_t from, int64_t to, T* y,
               uint8_t* taps, T* buffer, int64_t pitch, int64_t rows) {
  const auto run = w.kernel == 3   ? (w.stride == 1 ? plane_taps<T, 3, 1> : plane_taps<T, 3, 2>)
                   : w.kernel == 2 ? (w.stride == 1 ? plane_taps<T, 2, 1> : plane_taps<T, 2, 2>)
                                   : (w.stride == 1 ? plane_taps<T, 0, 1> : plane_taps<T, 0, 2>);
  run(plane, h, w, from, to, y, taps, buffer, pitch, rows);
}

// sum + grad where the tap is `code`.
template <class T>
NNARCH_INLINE Vec<T> add_where(Vec<T> sum, const uint8_t* taps, uint8_t code, const T* grad) {
#if defined(NNARCH_ISA_avx512)
  if constexpr (sizeof(T) == 4) {
    const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(taps));
    const __mmask16 k = _mm_cmpeq_epi8_mask(t, _mm_set1_epi8(static_cast<char>(code)));
    return (Vec<T>)_mm512_mask_add_ps((__m512)sum, k, (__m512)sum, (__m512)load(grad));
  }
#endif
#if defined(NNARCH_ISA_avx2)
  if constexpr (sizeof(T) == 4) {
    const __m128i t = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(taps));
    const __m256i at = _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(t), _mm256_set1_epi32(code));
    return sum + (Vec<T>)_mm256_and_ps((__m256)at, (__m256)load(grad));
  }
#endif
  const auto t = *reinterpret_cast<const typename ByteVectors<T>::Unaligned*>(taps);
  const Lanes<T> at = __builtin_convertvector((typename ByteVectors<T>::V)t, Lanes<T>);
  const Vec<T> g = load(grad);
  return sum + (at == lanes<T>(code) ? g : Vec<T>{});
}

// The windows that hold one input pixel: where their gradients lie, and its tap in each.
struct HoldingWindows {
  int64_t offsets[kMostWindowsOfPixel];
  uint8_t taps[kMostWindowsOfPixel];
  int64_t count;
};

// All channels of one input pixel. `known` is the number of windows, or 0.
template <class T, int known>
NNARCH_INLINE void pixel_grad(const T* grad, const uint8_t* taps, int64_t channels,
                              const HoldingWindows& windows, T* dx) {
  constexpr int64_t lane = kLanes<T>;
  const int64_t n = known ? known : windows.count;
  const auto vector_at = [&](int64_t c) NNARCH_INLINE_LAMBDA {
    Vec<T> sum{};
    for (int64_t k = 0; k < n; ++k) {
      const int64_t at = windows.offsets[k] + c;
      sum = add_where(sum, taps + at, windows.taps[k], grad + at);
    }
    store(dx + c, sum);
  };
  int64_t c = 0;
  for (; c + lane <= channels; c += lane) vector_at(c);
  if (c == channels) return;
  if (channels >= lane) return vector_at(channels - lane);
  for (; c < channels; ++c) {
    T sum = 0;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t at = windows.offsets[k] + c;
      sum += taps[at] == windows.taps[k] ? grad[at] : T{0};
    }
    dx[c] = sum;
  }
}

// Input rows [from, to) of an image's gradient. Every input pixel adds up the windows that hold it.
template <class T>
void tap_grad_rows(const T* grad, const uint8_t* taps, int64_t channels, const TapAxis& h,
                   const TapAxis& w, int64_t from, int64_t to, T* dx) {
  for (int64_t i = from; i < to; ++i) {
    const int64_t first_row = h.first_window(i), reach_down = i + h.padding;
    int64_t first = 0;
    for (int64_t j = 0; j < w.inputs; ++j) {
      const int64_t reach = j + w.padding;
      while (first * w.stride + w.kernel <= reach) ++first;  // a division takes 15 cycles
      HoldingWindows windows;
      windows.count = 0;
      for (int64_t r = first_row; r < h.outputs && r * h.stride <= reach_down; ++r)
        for (int64_t c = first; c < w.outputs && c * w.stride <= reach; ++c) {
          windows.offsets[windows.count] = (r * w.outputs + c) * channels;
          windows.taps[windows.count++] =
              static_cast<uint8_t>((reach_down - r * h.stride) * w.kernel + reach - c * w.stride);
        }
      T* out = dx + (i * w.inputs + j) * channels;
      if (windows.count == 1)
        pixel_grad<T, 1>(grad, taps, channels, windows, out);
      else if (windows.count == 2)
        pixel_grad<T, 2>(grad, taps, channels, windows, out);
      else if (windows.count == 4)
        pixel_grad<T, 4>(grad, taps, channels, windows, out);
      else
        pixel_grad<T, 0>(grad, taps, channels, windows, out);
    }
  }
}

template <class V, int half, int... I>
NNARCH_INLINE V interleave(V a, V b, Indices<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (half * n / 2 + I / 2 + (I % 2) * n)...);
}

// The gradient of the inputs stride·m + phase of a row, for a vector of m. Window k of the
// `windows` that hold the row lies at rows[k], and the row is its tap row first_tap[k] / w.kernel.
template <class T, int kernel, int stride, int phase>
NNARCH_INLINE Vec<T> phase_grad(const T* grad, const uint8_t* taps, const int64_t* rows,
                                const int64_t* first_tap, int64_t windows, const TapAxis& w,
                                int64_t m) {
  Vec<T> sum{};
  const int64_t odd = (phase + w.padding) % stride, last = kernel ? kernel : w.kernel;
  for (int64_t k = 0; k < windows; ++k) {
    const int64_t row = rows[k] + m;
    for (int64_t c = odd; c < last; c += stride) {
      const int64_t at = row + (phase + w.padding - c) / stride;
      sum = add_where(sum, taps + at, static_cast<uint8_t>(first_tap[k] + c), grad + at);
    }
  }
  return sum;
}

// Input rows [from, to) of a plane's gradient. grad and taps lie in rows `pitch` apart, with
// kTapMargin elements on both sides of which no tap is any window's.
template <class T, int kernel, int stride>
NNARCH_NOINLINE void plane_grad(const T* grad, const uint8_t* taps, int64_t pitch, const TapAxis& h,
                                const TapAxis& w, int64_t from, int64_t to, T* dx) {
  constexpr int64_t lane = kLanes<T>;
  constexpr MakeIndices<kLanes<T>> all{};
  for (int64_t i = from; i < to; ++i) {
    int64_t rows[kMostWindowsOfPixel], first_tap[kMostWindowsOfPixel], windows = 0;
    h.over_windows(i, [&](int64_t row, int64_t r) NNARCH_INLINE_LAMBDA {
      rows[windows] = row * pitch + kTapMargin;
      first_tap[windows++] = r * w.kernel;
    });
    T* out = dx + i * w.inputs;
    for (int64_t j = 0, m = 0; j < w.inputs; j += stride * lane, m += lane) {
      const int64_t n = w.inputs - j;
      const Vec<T> even =
          phase_grad<T, kernel, stride, 0>(grad, taps, rows, first_tap, windows, w, m);
      if constexpr (stride == 1) {
        store_n(out + j, even, n);
      } else {
        const Vec<T> odd =
            phase_grad<T, kernel, stride, 1>(grad, taps, rows, first_tap, windows, w, m);
        store_n(out + j, interleave<Vec<T>, 0>(even, odd, all), n);
        if (n > lane) store_n(out + j + lane, interleave<Vec<T>, 1>(even, odd, all), n - lane);
      }
    }
  }
}

template <class T>
void tap_grad_plane(const T* grad, const uint8_t* taps, int64_t pitch, const TapAxis& h,
                    const TapAxis& w, int64_t from, int64_t to, T* dx) {
  const auto run = w.kernel == 3   ? (w.stride == 1 ? plane_grad<T, 3, 1> : plane_grad<T, 3, 2>)
                   : w.kernel == 2 ? (w.stride == 1 ? plane_grad<T, 2, 1> : plane_grad<T, 2, 2>)
                                   : (w.stride == 1 ? plane_grad<T, 0, 1> : plane_grad<T, 0, 2>);
  run(grad, taps, pitch, h, w, from, to, dx);
}

}  // namespace nnarch::NNARCH_ISA
