// The order in which a block takes its output positions: those that lose the same kernel taps to
// the padding side by side, so that whole register tiles skip these taps. On a 7 x 7 image a 3 x 3
// convolution multiplies 18 % of its taps by zeros otherwise.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/grid_image.h"

namespace nnarch {

// Numbers the grid's rows (columns) by the set of taps that lie inside the image there.
inline std::vector<int64_t> tap_classes(int64_t grid, int64_t step, int64_t size,
                                        const std::vector<int64_t>& offsets) {
  std::vector<int64_t> classes(static_cast<size_t>(grid), 0);
  const auto inside = [&](int64_t at, int64_t offset) {
    return at * step + offset >= 0 && at * step + offset < size;
  };
  for (int64_t at = 1; at < grid; ++at) {
    bool same = true;
    for (int64_t offset : offsets) same &= inside(at, offset) == inside(at - 1, offset);
    classes[at] = classes[at - 1] + (same ? 0 : 1);
  }
  return classes;
}

// The classes of a whole grid; without windows that overlap the padding there is one.
struct PaddingClasses {
  std::vector<int64_t> of_row, of_column;  // empty: all positions are of class 0

  template <class T>
  explicit PaddingClasses(const GridImage<T>& g) {
    if (g.taps.size() <= 1) return;
    std::vector<int64_t> dy, dx;
    for (const Tap& tap : g.taps) dy.push_back(tap.dy), dx.push_back(tap.dx);
    of_row = tap_classes(g.grid_h, g.step_y, g.h, dy);
    of_column = tap_classes(g.grid_w, g.step_x, g.w, dx);
  }

  int64_t columns() const { return of_column.empty() ? 1 : of_column.back() + 1; }
  int64_t count() const { return of_row.empty() ? 1 : (of_row.back() + 1) * columns(); }

  // Calls f(class, part) for the parts of a run that are each of one class.
  template <class F>
  void split(const Run& run, const F& f) const {
    if (of_column.empty()) return f(0, run);
    const int64_t row = of_row[run.gy] * columns(), end = run.gx + run.count;
    for (int64_t gx = run.gx; gx < end;) {
      int64_t next = gx + 1;
      while (next < end && of_column[next] == of_column[gx]) ++next;
      f(row + of_column[gx], Run{run.image, run.gy, gx, next - gx});
      gx = next;
    }
  }
};

// The order of one block: calls place(part, row) for every part, and gives the segments that
// register tiles must not mix. Classes too small for a tile of their own join a neighbour.
class PaddingOrder {
 public:
  explicit PaddingOrder(const PaddingClasses& classes)
      : classes_(classes), next_(static_cast<size_t>(classes.count())) {}

  template <class T, class F>
  void arrange(const GridImage<T>& g, int64_t first, int64_t count, const F& place) {
    std::fill(next_.begin(), next_.end(), 0);
    for_each_run(first, count, g, [&](const Run& run) {
      classes_.split(run, [&](int64_t c, const Run& part) { next_[c] += part.count; });
    });
    cut_segments();
    for_each_run(first, count, g, [&](const Run& run) {
      classes_.split(run, [&](int64_t c, const Run& part) {
        place(part, next_[c]);
        next_[c] += part.count;
      });
    });
  }

  const int64_t* segment_end() const { return segment_end_.data(); }
  int64_t segments() const { return static_cast<int64_t>(segment_end_.size()); }

 private:
  // Turns the sizes in next_ into first rows.
  void cut_segments() {
    constexpr int64_t least = 4;  // fewer rows cannot hide the latency of an FMA
    segment_end_.clear();
    int64_t row = 0, open = 0;  // rows so far; rows of the segment that may still grow
    for (size_t c = 0; c < next_.size(); ++c) {
      const int64_t size = next_[c];
      const bool new_row = static_cast<int64_t>(c) % classes_.columns() == 0;
      if (size > 0 && !segment_end_.empty() && !new_row && (open < least || size < least)) {
        segment_end_.back() = row + size;
        open += size;
      } else if (size > 0) {
        segment_end_.push_back(row + size);
        open = size;
      }
      next_[c] = row;
      row += size;
    }
  }

  const PaddingClasses& classes_;
  std::vector<int64_t> next_;  // of each class: its size, then the row that comes next
  std::vector<int64_t> segment_end_;
};

}  // namespace nnarch
