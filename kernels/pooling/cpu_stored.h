// What a task of pooling reads and writes, where the tensors may be of a half type (cpu/half.h).
#pragma once

#include <algorithm>

#include "cpu/half.h"
#include "pooling/cpu_kernels.h"

namespace nnarch {

// Input rows [top, bottom) that the windows of output rows [from, to) reach.
struct RowsReached {
  int64_t top, bottom;

  RowsReached(const Axis& h, int64_t from, int64_t to) : top(h.inputs), bottom(0) {
    for (int64_t row = from; row < to; ++row) {
      if (h.start[row] >= h.end[row]) continue;
      top = std::min(top, h.start[row]);
      bottom = std::max(bottom, h.end[row]);
    }
    top = std::min(top, bottom);
  }
};

// Output rows [from, to) of the units [first, last), images or planes, whose rows have `in` and
// `out` elements. More than one unit is taken with all its rows.
template <class T>
class PooledUnits {
 public:
  PooledUnits(const Stored& x, const Stored& y, const Axis& h, int64_t in, int64_t out,
              int64_t first, int64_t last, int64_t from, int64_t to)
      : x_(x, reached(x.half, h, in, first, last, from, to)),
        y_(y,
           {(first * h.outputs + from) * out, ((last - first - 1) * h.outputs + to - from) * out}),
        in_(first * h.inputs * in),
        out_(first * h.outputs * out) {}

  // Where the first unit begins.
  const T* x() const { return x_.origin() + in_; }
  T* y() const { return y_.origin() + out_; }

 private:
  static StoredBlock reached(bool half, const Axis& h, int64_t in, int64_t first, int64_t last,
                             int64_t from, int64_t to) {
    if (!half) return {0, 0};
    if (last - first > 1) return {first * h.inputs * in, (last - first) * h.inputs * in};
    const RowsReached rows(h, from, to);
    return {(first * h.inputs + rows.top) * in, (rows.bottom - rows.top) * in};
  }

  Reading<T> x_;
  Writing<T> y_;
  int64_t in_, out_;
};

}  // namespace nnarch
