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

// Consecutive positions of one grid row: (image, gy, gx) to (image, gy, gx + count).
struct Run {
  int64_t image, gy, gx, count;
};

// Calls f(run) for every run of grid row positions in [first, first + count).
template <class T, class F>
void for_each_run(int64_t first, int64_t count, const GridImage<T>& g, const F& f) {
  const int64_t plane = g.grid_h * g.grid_w;
  for (const int64_t end = first + count; first < end;) {
    const int64_t gx = first % g.grid_w, run = std::min(g.grid_w - gx, end - first);
    f(Run{first / plane, first % plane / g.grid_w, gx, run});
    first += run;
  }
}

// The row pointers of up to `capacity` grid positions, run by run.
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
  const T* zeros() const { return zeros_.get(); }

  // Of consecutive positions, in order.
  void build(int64_t first, int64_t count) {
    int64_t row = 0;
    for_each_run(first, count, image_, [&](const Run& run) {
      build(run, row);
      row += run.count;
    });
  }

  // Of one run, from `row` on.
  void build(const Run& run, int64_t row) {
    const T* base = image_.data + run.image * image_.h * image_.w * image_.pixel;
    const T** out = &pointers_[row];
    for (const Tap& tap : image_.taps) {
      build_tap(base, tap, run, out);
      out += capacity_;
    }
  }

 private:
  // Positions whose pixel lies in the padding point to zeros; the others are in between.
  void build_tap(const T* base, const Tap& tap, const Run& run, const T** out) const {
    const int64_t y = run.gy * image_.step_y + tap.dy, x = run.gx * image_.step_x + tap.dx;
    const int64_t step = std::max<int64_t>(image_.step_x, 1);
    int64_t begin = 0, end = 0;  // of the positions inside the image
    if (y >= 0 && y < image_.h) {
      begin = std::clamp<int64_t>(x < 0 ? (-x + step - 1) / step : 0, 0, run.count);
      end = std::clamp<int64_t>(x < image_.w ? (image_.w - x + step - 1) / step : 0, begin,
                                run.count);
    }
    std::fill(out, out + begin, zeros_.get());
    for (int64_t i = begin; i < end; ++i)
      out[i] = base + (y * image_.w + x + i * step) * image_.pixel;
    std::fill(out + end, out + run.count, zeros_.get());
  }

  const GridImage<T>& image_;
  int64_t capacity_;
  Scratch<const T*> pointers_;
  Scratch<T> zeros_;
};

}  // namespace nnarch
