// Maximum pooling for training (taps_isa.h): its kernels and the geometry they run over.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

// Inlined wherever it is used: no copy compiled for one instruction set may serve another.
#define NNARCH_EVERYWHERE inline __attribute__((always_inline))

namespace nnarch {

inline constexpr int64_t kNoTap = 255;              // a window of padding alone
inline constexpr int64_t kMostWindowsOfPixel = 64;  // windows that hold one input
inline constexpr int64_t kTapMargin = 32;

// One axis: output i has the taps 0 … kernel-1 at the inputs i·stride - padding + tap·dilation.
struct TapAxis {
  int64_t inputs, outputs, kernel, stride, padding, dilation;

  NNARCH_EVERYWHERE int64_t at(int64_t output, int64_t tap) const {
    return output * stride - padding + tap * dilation;
  }
  // The taps [first, past) lie inside the input.
  NNARCH_EVERYWHERE int64_t first(int64_t output) const {
    const int64_t begin = at(output, 0);
    return begin >= 0 ? 0 : (dilation == 1 ? -begin : (-begin + dilation - 1) / dilation);
  }
  NNARCH_EVERYWHERE int64_t past(int64_t output) const {
    const int64_t room = inputs - at(output, 0);
    if (room <= 0) return 0;
    const int64_t taps = dilation == 1 ? room : (room + dilation - 1) / dilation;
    return taps < kernel ? taps : kernel;
  }
  NNARCH_EVERYWHERE bool whole(int64_t output) const {
    return at(output, 0) >= 0 && at(output, kernel - 1) < inputs;
  }
  NNARCH_EVERYWHERE int64_t first_window(int64_t input) const {
    const int64_t reach = input + padding;
    return reach < kernel ? 0 : (reach - kernel) / stride + 1;
  }
  // Calls f(output, tap) for every window that holds an input, dilation being 1.
  template <class F>
  NNARCH_EVERYWHERE void over_windows(int64_t input, const F& f) const {
    const int64_t reach = input + padding;
    for (int64_t output = first_window(input); output < outputs && output * stride <= reach;
         ++output)
      f(output, reach - output * stride);
  }
};

template <class T>
struct TapTable {
  // Output rows [from, to) of an image [H][W][channels], and of a plane, whose columns have stride
  // 1 or 2. `buffer` takes `rows` input rows, `pitch` apart, and holds -inf.
  void (*rows)(const T* image, int64_t channels, const TapAxis& h, const TapAxis& w, int64_t from,
               int64_t to, T* y, uint8_t* taps);
  void (*plane)(const T* plane, const TapAxis& h, const TapAxis& w, int64_t from, int64_t to, T* y,
                uint8_t* taps, T* buffer, int64_t pitch, int64_t rows);
  // Input rows [from, to) of the gradient, dilation being 1.
  void (*grad_rows)(const T* grad, const uint8_t* taps, int64_t channels, const TapAxis& h,
                    const TapAxis& w, int64_t from, int64_t to, T* dx);
  void (*grad_plane)(const T* grad, const uint8_t* taps, int64_t pitch, const TapAxis& h,
                     const TapAxis& w, int64_t from, int64_t to, T* dx);
};

NNARCH_PER_ISA(template <class T> const TapTable<T>& tap_table();)

}  // namespace nnarch
