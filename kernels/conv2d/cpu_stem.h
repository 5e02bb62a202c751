// The first layer of a network: few input channels. One row of the kernel over a pixel's
// neighbourhood, S·C values, is contiguous in a channels_last image, so a tap is a kernel row and
// the product runs S·C deep instead of C. The rows of the image that a block needs are copied into
// scratch with their padding, from any memory format.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "conv2d/cpu_shape.h"
#include "cpu/arena.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace nnarch {

inline bool stem_serves(const ConvShape& p) {
  return p.groups == 1 && p.c <= 8 && p.s > 1 && p.dilation_w == 1;
}

// Input rows from `y` on, as [row][padded x][c]: zeros outside the image.
template <class T>
void copy_padded_rows(const Tensor& x, int64_t image, int64_t y, int64_t rows, const ConvShape& p,
                      int64_t width, T* dst) {
  const T* plane = data<T>(x) + image * x.stride(0);
  const int64_t sc = x.stride(1), sh = x.stride(2), sw = x.stride(3);
  const int64_t inside = std::min(p.w, width - p.left);
  for (int64_t i = 0; i < rows; ++i, ++y, dst += width * p.c) {
    if (y < 0 || y >= p.h) {
      std::memset(dst, 0, static_cast<size_t>(width * p.c) * sizeof(T));
      continue;
    }
    std::fill_n(dst, p.left * p.c, T{0});
    T* row = dst + p.left * p.c;
    const T* from = plane + y * sh;
    if (sc == 1 && sw == p.c) {
      std::memcpy(row, from, static_cast<size_t>(inside * p.c) * sizeof(T));
    } else {
      for (int64_t c = 0; c < p.c; ++c)
        for (int64_t i2 = 0; i2 < inside; ++i2) row[i2 * p.c + c] = from[i2 * sw + c * sc];
    }
    std::fill(row + inside * p.c, dst + width * p.c, T{0});
  }
}

template <class T>
void stem_forward(const Tensor& x, const T* packed, T* y, const ConvShape& p,
                  const Epilogue<T>& epilogue) {
  const GemmTable<T>& table = gemm<T>();
  const int64_t width = (p.ow - 1) * p.stride_w + p.s;  // of a padded row, as far as it is read
  const int64_t block = std::min(p.oh, std::max<int64_t>(1, 384 / p.ow));  // output rows
  const int64_t blocks = ceil_div(p.oh, block);
  parallel_tasks(p.n * blocks, [&](int64_t task) {
    const int64_t image = task / blocks, first = task % blocks * block;
    const int64_t rows = std::min(block, p.oh - first), count = rows * p.ow;
    const int64_t input_rows = (rows - 1) * p.stride_h + (p.r - 1) * p.dilation_h + 1;
    Scratch<T> scratch(input_rows * width * p.c);
    copy_padded_rows<T>(x, image, first * p.stride_h - p.top, input_rows, p, width, scratch.get());
    Scratch<const T*> pointers(p.r * count);
    Scratch<int64_t> offsets(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t gy = i / p.ow, gx = i % p.ow;
      offsets[i] = ((image * p.oh + first) * p.ow + i) * p.k;
      for (int64_t r = 0; r < p.r; ++r)
        pointers[r * count + i] =
            scratch.get() + ((gy * p.stride_h + r * p.dilation_h) * width + gx * p.stride_w) * p.c;
    }
    table.run({pointers.get(), count, p.r, p.s * p.c, packed, y, offsets.get(), count, p.k, false,
               epilogue});
  });
}

}  // namespace nnarch
