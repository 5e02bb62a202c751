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
#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace nnarch {

// Strides past the kernel and dilated rows would copy lines that nothing reads.
inline bool stem_serves(const ConvShape& p) {
  return p.groups == 1 && p.c <= 8 && p.s > 1 && p.dilation_h == 1 && p.dilation_w == 1 &&
         p.stride_h <= p.r && p.stride_w <= p.s;
}

// Input rows from `y` on, as [row][padded x][c]: zeros outside the image.
template <class T>
void copy_padded_rows(const Tensor& x, int64_t image, int64_t y, int64_t rows, const ConvShape& p,
                      int64_t width, T* dst) {
  const T* plane = data<T>(x) + image * x.stride(0);
  const int64_t sc = x.stride(1), sh = x.stride(2), sw = x.stride(3);
  // A kernel that steps over the image may end inside its left padding: `width` covers no more.
  const int64_t left = std::min(p.left, width), inside = std::min(p.w, width - left);
  for (int64_t i = 0; i < rows; ++i, ++y, dst += width * p.c) {
    if (y < 0 || y >= p.h) {
      std::memset(dst, 0, static_cast<size_t>(width * p.c) * sizeof(T));
      continue;
    }
    std::fill_n(dst, left * p.c, T{0});
    T* row = dst + left * p.c;
    const T* from = plane + y * sh;
    if (sc == 1 && sw == p.c) {
      std::memcpy(row, from, static_cast<size_t>(inside * p.c) * sizeof(T));
    } else if (sw == 1) {
      transpose_fn<T>()(from, sc, row, p.c, p.c, inside);
    } else {
      for (int64_t c = 0; c < p.c; ++c)
        for (int64_t i2 = 0; i2 < inside; ++i2) row[i2 * p.c + c] = from[i2 * sw + c * sc];
    }
    std::fill(row + inside * p.c, dst + width * p.c, T{0});
  }
}

// The padded rows under consecutive output positions, of one task.
template <class T>
class StemImage {
 public:
  StemImage(const Tensor& x, const ConvShape& p, int64_t capacity)
      : x_(x),
        p_(p),
        width_((p.ow - 1) * p.stride_w + p.s),
        image_(rows_of(most_lines(capacity)) * width_ * p.c) {}

  int64_t line() const { return width_ * p_.c; }  // elements from one padded row to the next

  // Of positions [first, first + count) of an image: the input rows under them that are inside it.
  struct InputRows {
    int64_t begin, end;
  };
  InputRows input_rows(int64_t first, int64_t count) const {
    const int64_t top = first / p_.ow, bottom = (first + count - 1) / p_.ow;
    const int64_t begin = top * p_.stride_h - p_.top;
    return {std::clamp<int64_t>(begin, 0, p_.h),
            std::clamp<int64_t>(begin + rows_of(bottom - top + 1), 0, p_.h)};
  }

  // Calls f(pixel, i, run) for positions [first + i, first + i + run), of one output row each. The
  // kernel's first row at position i begins at `pixel`; both advance by stride_w pixels.
  template <class F>
  void for_each_line(int64_t first, int64_t count, const F& f) {
    const int64_t plane = p_.oh * p_.ow;
    T* scratch = image_.get();
    for (int64_t done = 0; done < count;) {  // the part of one image
      const int64_t at = first + done, image = at / plane, inside = at % plane;
      const int64_t run = std::min(plane - inside, count - done);
      const int64_t top = inside / p_.ow, bottom = (inside + run - 1) / p_.ow;
      const int64_t rows = rows_of(bottom - top + 1);
      copy_padded_rows<T>(x_, image, top * p_.stride_h - p_.top, rows, p_, width_, scratch);
      lines(scratch, inside % p_.ow, done, run, f);
      scratch += rows * line();
      done += run;
    }
  }

 private:
  // From column `gx` of the first line on, line after line, over a padded image. (A division per
  // position would cost a fifth of a 3x3 stem.)
  template <class F>
  void lines(const T* image, int64_t gx, int64_t i, int64_t count, const F& f) const {
    for (const int64_t end = i + count; i < end; gx = 0, image += p_.stride_h * line()) {
      const int64_t run = std::min(p_.ow - gx, end - i);
      f(image + gx * p_.stride_w * p_.c, i, run);
      i += run;
    }
  }

  // Input rows under that many output rows.
  int64_t rows_of(int64_t lines) const { return (lines - 1) * p_.stride_h + p_.r; }
  // Output rows that `count` positions can touch, images that they leave half done counted whole.
  int64_t most_lines(int64_t count) const {
    const int64_t images = count / (p_.oh * p_.ow) + 2;
    return count / p_.ow + 2 + images * (p_.r / p_.stride_h + 2);
  }

  const Tensor& x_;
  const ConvShape& p_;
  int64_t width_;
  Scratch<T> image_;
};

// The windows of consecutive output positions, as TapRows gives a convolution with one tap: copied
// out, since a panel of the weight's gradient that holds one kernel row is half empty (9 values of
// 32 for 9×9 taps of one channel).
template <class T>
class StemWindows {
 public:
  StemWindows(const Tensor& x, const ConvShape& p, int64_t capacity)
      : p_(p),
        capacity_(capacity),
        size_(p.r * p.s * p.c),
        image_(x, p, capacity),
        windows_(capacity * size_),
        pointers_(capacity) {
    for (int64_t i = 0; i < capacity; ++i) pointers_[i] = windows_.get() + i * size_;
  }

  int64_t stride() const { return capacity_; }
  const T* const* get() const { return pointers_.get(); }

  void build(int64_t first, int64_t count) {
    const int64_t step = p_.stride_w * p_.c, row_size = p_.s * p_.c;
    image_.for_each_line(first, count, [&](const T* pixel, int64_t row, int64_t run) {
      T* to = windows_.get() + row * size_;
      for (int64_t i = 0; i < run; ++i, pixel += step, to += size_)
        for (int64_t r = 0; r < p_.r; ++r)
          std::copy_n(pixel + r * image_.line(), row_size, to + r * row_size);
    });
  }

 private:
  const ConvShape& p_;
  int64_t capacity_, size_;
  StemImage<T> image_;
  Scratch<T> windows_;
  Scratch<const T*> pointers_;
};

// Whether an image is one dense piece of memory, row after row of pixels.
inline bool has_dense_rows(const Tensor& x, const ConvShape& p) {
  return x.stride(1) == 1 && x.stride(3) == p.c && x.stride(2) == p.w * p.c;
}

// y is channels_last, or planar: then blocks of outputs are transposed while they are in cache.
// (64 channels of 224×224 written twice took as long as computing them.)
template <class T>
void stem_forward(const Tensor& x, const T* packed, T* y, bool planar, const ConvShape& p,
                  const Epilogue<T>& epilogue) {
  const int64_t plane = p.oh * p.ow;
  const int64_t block = std::min(plane, round_up(384, p.ow));
  const int64_t blocks = ceil_div(plane, block);
  const bool stream = !planar && outgrows_caches<T>(y, p.n * plane, p.k);
  const bool dense = has_dense_rows(x, p);
  parallel_tasks(p.n * blocks, [&](int64_t task) {
    const int64_t image_index = task / blocks, inside = task % blocks * block;
    const int64_t first = image_index * plane + inside;
    const int64_t count = std::min(block, plane - inside);
    StemImage<T> image(x, p, block);
    Scratch<T> staged(planar ? count * p.k : 0);
    Scratch<Strip<T>> strips(count / p.ow + 2);
    int64_t used = 0;
    image.for_each_line(first, count, [&](const T* pixel, int64_t i, int64_t run) {
      strips[used++] = {pixel, (planar ? i : first + i) * p.k, run};
    });
    Scratch<int64_t> tap_offset(p.r);
    for (int64_t r = 0; r < p.r; ++r) tap_offset[r] = r * image.line();
    // The next block's rows come from memory meanwhile.
    Later<T> after;
    if (dense && task + 1 < p.n * blocks) {
      const int64_t next_image = (task + 1) / blocks, next = (task + 1) % blocks * block;
      auto [begin, end] = image.input_rows(next, std::min(block, plane - next));
      if (next > 0) begin = std::max(begin, image.input_rows(inside, count).end);
      after = {data<T>(x) + next_image * x.stride(0) + begin * x.stride(2),
               std::max<int64_t>(end - begin, 0) * x.stride(2)};
    }
    gemm<T>().run({.taps = p.r,
                   .depth = p.s * p.c,
                   .b = packed,
                   .after = after,
                   .c = planar ? staged.get() : y,
                   .n = p.k,
                   .epilogue = epilogue,
                   .stream = stream,
                   .strips = strips.get(),
                   .strip_count = used,
                   .a_step = p.stride_w * p.c,
                   .c_step = p.k,
                   .tap_offset = tap_offset.get()});
    if (planar)
      transpose_fn<T>()(staged.get(), p.k, y + image_index * p.k * plane + inside, plane, count,
                        p.k);
  });
}

}  // namespace nnarch
