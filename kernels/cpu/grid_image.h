// Where the rows of the matrix A of a convolution lie: pointers into the image, one for every
// output position and kernel tap.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/arena.h"

namespace nnarch {

// A kernel tap reads the input at (gy * step_y + dy, gx * step_x + dx) for grid position (gy, gx).
struct Tap {
  int64_t dy, dx;
};

// A channels_last image read at the positions of a grid. For a forward convolution the grid is the
// output and the steps are the strides; for an input gradient the grid is one phase of the input,
// the image is the output gradient and the steps are 1.
template <class T>
struct GridImage {
  const T* data;
  int64_t h, w;
  int64_t pixel;  // elements from one pixel to the next
  int64_t n, grid_h, grid_w;
  int64_t step_y, step_x;
  std::vector<Tap> taps;
  int64_t depth;  // channels that a tap reads

  int64_t positions() const { return n * grid_h * grid_w; }
};

// Calls f(image, gy, gx, run, i) for every stretch of positions [i, i + run) of a range that lies in
// one grid row.
template <class T, class F>
void for_each_run(int64_t first, int64_t count, const GridImage<T>& g, const F& f) {
  const int64_t plane = g.grid_h * g.grid_w;
  for (int64_t i = 0; i < count;) {
    const int64_t at = first + i, gx = at % g.grid_w;
    const int64_t run = std::min(g.grid_w - gx, count - i);
    f(at / plane, at % plane / g.grid_w, gx, run, i);
    i += run;
  }
}

// The row pointers of up to `capacity` consecutive grid positions.
template <class T>
class TapRows {
 public:
  TapRows(const GridImage<T>& image, int64_t capacity)
      : image_(image),
        capacity_(capacity),
        pointers_(static_cast<int64_t>(image.taps.size()) * capacity),
        zeros_(image.depth) {
    std::memset(zeros_.get(), 0, static_cast<size_t>(image.depth) * sizeof(T));
  }

  int64_t stride() const { return capacity_; }
  const T* const* get() const { return pointers_.get(); }

  void build(int64_t first, int64_t count) {
    for_each_run(first, count, image_,
                 [&](int64_t n, int64_t gy, int64_t gx, int64_t run, int64_t i) {
                   const T* base = image_.data + n * image_.h * image_.w * image_.pixel;
                   for (const Tap& tap : image_.taps)
                     build_run(base, tap, gy, gx, run, &pointers_[row_of(tap) * capacity_ + i]);
                 });
  }

 private:
  int64_t row_of(const Tap& tap) const { return &tap - image_.taps.data(); }

  // Positions whose pixel lies in the padding point to zeros; the others are in between.
  void build_run(const T* base, const Tap& tap, int64_t gy, int64_t gx, int64_t run,
                 const T** out) const {
    const int64_t y = gy * image_.step_y + tap.dy, x = gx * image_.step_x + tap.dx;
    const int64_t step = std::max<int64_t>(image_.step_x, 1);
    int64_t begin = 0, end = 0;  // of the positions inside the image
    if (y >= 0 && y < image_.h) {
      begin = std::clamp<int64_t>(x < 0 ? (-x + step - 1) / step : 0, 0, run);
      end = std::clamp<int64_t>(x < image_.w ? (image_.w - x + step - 1) / step : 0, begin, run);
    }
    std::fill(out, out + begin, zeros_.get());
    for (int64_t i = begin; i < end; ++i)
      out[i] = base + (y * image_.w + x + i * step) * image_.pixel;
    std::fill(out + end, out + run, zeros_.get());
  }

  const GridImage<T>& image_;
  int64_t capacity_;
  Scratch<const T*> pointers_;
  Scratch<T> zeros_;
};

}  // namespace nnarch
