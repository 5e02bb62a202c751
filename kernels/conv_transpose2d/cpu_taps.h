// Few output channels: one product with all taps of all channels as columns, which fills vectors
// that the few channels of one tap would leave empty. 64 to 3 channels, 4×4: 48 columns, three
// vectors, instead of one vector for each of 16 taps. The products of a few input rows stay in
// cache, where they are added up: never is an image's worth of them in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "conv_transpose2d/cpu_kernels.h"
#include "conv_transpose2d/cpu_shape.h"
#include "cpu/arena.h"
#include "cpu/epilogue.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"

namespace nnarch {

// How the output is cut: bands of output rows, whose sums stay in cache, from chunks of input rows,
// whose products do.
template <class T>
struct TapBands {
  int64_t line;         // elements of a row of sums, with what lies left of the output
  int64_t band, bands;  // output rows, and how many bands an image has
  int64_t chunk;        // input rows

  explicit TapBands(const TransposedShape& p) {
    constexpr int64_t sums = int64_t{128} << 10, products = int64_t{24} << 10, wanted = 4;
    const int64_t full = (p.w - 1) * p.stride_w + (p.s - 1) * p.dilation_w + 1;
    line = std::max(full, p.left + p.ow) * p.k;
    const int64_t fit = std::max<int64_t>(sums / (line * int64_t{sizeof(T)}), 1);
    // Neighbouring bands both compute the input rows between them: a band has many of its own.
    const int64_t least = 4 * p.r * p.dilation_h + p.stride_h;
    bands = std::max(ceil_div(p.oh, fit), std::min(ceil_div(wanted, std::max<int64_t>(p.n, 1)),
                                                   std::max<int64_t>(p.oh / least, 1)));
    band = ceil_div(p.oh, bands);
    bands = ceil_div(p.oh, band);
    const int64_t row = p.w * p.taps() * p.k * int64_t{sizeof(T)};
    chunk = std::clamp<int64_t>(products / row, 1, p.h);
  }
};

// The sums of a band's rows, each in one of two places: adding goes from one to the other.
template <class T>
class BandSums {
 public:
  BandSums(int64_t rows, int64_t line)
      : line_(line), rows_(rows), sums_(2 * rows * line + kPad), second_(rows) {
    std::memset(sums_.get(), 0, static_cast<size_t>(2 * rows * line + kPad) * sizeof(T));
    std::memset(second_.get(), 0, static_cast<size_t>(rows));
  }

  T* row(int64_t i) const { return sums_.get() + (second_[i] * rows_ + i) * line_; }
  T* other(int64_t i) const { return sums_.get() + ((1 - second_[i]) * rows_ + i) * line_; }
  void swap(int64_t i) const { second_[i] = 1 - second_[i]; }

 private:
  static constexpr int64_t kPad = 64;  // for vectors that begin in the last row
  int64_t line_, rows_;
  Scratch<T> sums_;
  Scratch<int8_t> second_;
};

// Adds the products of one input row to the sums of rows [first, last), counted before padding.
template <class T>
void add_products(const T* z, int64_t row, const TransposedShape& p, int64_t first, int64_t last,
                  const BandSums<T>& sums) {
  const auto add_runs = transposed_table_of<T>().add_runs;
  const int64_t step = p.taps() * p.k;
  for (int64_t r = 0; r < p.r; ++r) {
    const int64_t to = row * p.stride_h + r * p.dilation_h - first;
    if (to < 0 || to >= last - first) continue;
    const T* products = z + r * p.s * p.k;
    if (p.dilation_w == 1) {  // the taps of a row fall side by side
      add_runs(products, step, p.w, p.s * p.k, p.stride_w * p.k, sums.row(to), sums.other(to));
      sums.swap(to);
      continue;
    }
    for (int64_t s = 0; s < p.s; ++s)
      for (int64_t i = 0; i < p.w; ++i) {
        T* at = sums.row(to) + (i * p.stride_w + s * p.dilation_w) * p.k;
        for (int64_t k = 0; k < p.k; ++k) at[k] += products[i * step + s * p.k + k];
      }
  }
}

// y[i·stride + r·dilation − top] += x[i] · w[r]; x and y channels_last, one group. The epilogue's
// vectors are those of a whole row of y.
template <class T>
void by_taps(const T* x, const T* packed, T* y, const TransposedShape& p,
             const Epilogue<T>& of_row) {
  const TapBands<T> bands(p);
  const int64_t columns = p.taps() * p.k, last_tap = (p.r - 1) * p.dilation_h;
  parallel_tasks(p.n * bands.bands, [&](int64_t task) {
    const int64_t image = task / bands.bands, top = task % bands.bands * bands.band;
    const int64_t rows = std::min(bands.band, p.oh - top);
    const int64_t first = top + p.top, last = first + rows;  // before padding
    const BandSums<T> sums(rows, bands.line);
    Scratch<T> products(bands.chunk * p.w * columns);
    const int64_t from =
        std::max<int64_t>(0, ceil_div(std::max<int64_t>(0, first - last_tap), p.stride_h));
    const int64_t to = std::min(p.h, (last - 1) / p.stride_h + 1);
    for (int64_t i = from; i < to; i += bands.chunk) {
      const int64_t some = std::min(bands.chunk, to - i);
      const Strip<T> strip{x + (image * p.h + i) * p.w * p.c, 0, some * p.w};
      gemm<T>().run({.depth = p.c,
                     .b = packed,
                     .c = products.get(),
                     .n = columns,
                     .strips = &strip,
                     .strip_count = 1,
                     .a_step = p.c,
                     .c_step = columns});
      for (int64_t row = 0; row < some; ++row)
        add_products<T>(products.get() + row * p.w * columns, i + row, p, first, last, sums);
    }
    const int64_t out = p.ow * p.k;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = (image * p.oh + top + row) * out;
      std::memcpy(y + at, sums.row(row) + p.left * p.k, static_cast<size_t>(out) * sizeof(T));
      transposed_table_of<T>().finish(of_row, at, out, y + at);
    }
  });
}

}  // namespace nnarch
