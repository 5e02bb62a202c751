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
    const GridImage<T>& g = image_;
    const int64_t plane = g.grid_h * g.grid_w;
    for (int64_t done = 0; done < count;) {  // one grid row, or the part of it that is asked for
      const int64_t at = first + done;
      const int64_t image = at / plane, gy = at % plane / g.grid_w, gx = at % g.grid_w;
      const int64_t run = std::min(g.grid_w - gx, count - done);
      const T* base = g.data + image * g.h * g.w * g.pixel;
      for (size_t t = 0; t < g.taps.size(); ++t)
        build_run(base, g.taps[t], gy, gx, run, &pointers_[t * capacity_ + done]);
      done += run;
    }
  }

 private:
  void build_run(const T* base, const Tap& tap, int64_t gy, int64_t gx, int64_t run,
                 const T** out) const {
    const int64_t y = gy * image_.step_y + tap.dy;
    int64_t x = gx * image_.step_x + tap.dx;
    const bool row_inside = y >= 0 && y < image_.h;
    const T* row = base + y * image_.w * image_.pixel;
    for (int64_t i = 0; i < run; ++i, x += image_.step_x)
      out[i] = row_inside && x >= 0 && x < image_.w ? row + x * image_.pixel : zeros_.get();
  }

  const GridImage<T>& image_;
  int64_t capacity_;
  Scratch<const T*> pointers_;
  Scratch<T> zeros_;
};

}  // namespace nnarch
