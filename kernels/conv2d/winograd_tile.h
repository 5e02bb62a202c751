// The geometry of Winograd's algorithm: a tile of outputs, the taps of the kernel, and the products
// that they take.
#pragma once

#include <cstdint>

namespace nnarch {

// m × m outputs of a kernel of rows × columns taps, read with a stride of 1 or 2. A value belongs
// to each pair of points of F(m, rows) and F(m, columns). One row of taps has nothing to save: its
// tiles are 1 × m, one column's m × 1, and the stride is along the taps.
//
// With stride 2 even rows of taps meet even rows of the input and odd ones odd ones, columns alike:
// the convolution is the sum of four phases with stride 1 over every second pixel. The second phase
// has one tap, and so one point, less; at a point that two phases share their products can be added
// up before they are transformed back, as if their channels were one after the other. So values lie
// plane by plane (one for each pair of points), and in a plane slot by slot, one for each phase
// that has its points: 4, 2 or 1. Three taps in tiles of 4 × 4 take (5 + 4)² = 81 products for 16
// outputs, where the direct product takes 144; nine in tiles of 3 × 3 take 169 for 729.
struct WinogradTile {
  int64_t m = 0;  // 0: no tile, the direct product
  int64_t rows = 3, columns = 3, stride = 1;

  constexpr int64_t taps() const { return rows * columns; }
  // Whether these are pairs of pixels of a 1×1 kernel, for Strassen's product (cpu/strassen.h).
  constexpr bool is_pair() const { return m > 0 && taps() == 1; }
  constexpr int64_t row_step() const { return step(rows); }
  constexpr int64_t column_step() const { return step(columns); }
  constexpr int64_t output_rows() const { return outputs(rows); }
  constexpr int64_t output_columns() const { return outputs(columns); }
  constexpr int64_t window_rows() const { return (outputs(rows) - 1) * step(rows) + rows; }
  constexpr int64_t window_columns() const {
    return (outputs(columns) - 1) * step(columns) + columns;
  }

  constexpr int64_t point_rows() const { return points(rows, 0); }
  constexpr int64_t point_columns() const { return points(columns, 0); }
  constexpr int64_t planes() const { return point_rows() * point_columns(); }
  // The products of a pair of channels.
  constexpr int64_t values() const { return all_points(rows) * all_points(columns); }

  // Whether the last tile of a line may have fewer outputs, and the points that it then takes.
  constexpr bool has_ends() const { return m == 4 && rows == 3 && columns == 3 && stride == 1; }
  constexpr bool end_has(int64_t outputs, int64_t point) const {
    return point < outputs + 1 || point == m + 1;
  }

  constexpr int64_t slots(int64_t plane) const {
    return phases_at(rows, plane / point_columns()) * phases_at(columns, plane % point_columns());
  }
  constexpr int64_t most_slots() const { return step(rows) * step(columns); }

  // Of one side with so many taps: the points of a phase, the point that its value i belongs to
  // (the last one is infinity), and how many phases have a point.
  constexpr int64_t points(int64_t taps, int64_t phase) const {
    return outputs(taps) + (taps + step(taps) - 1 - phase) / step(taps) - 1;
  }
  constexpr int64_t point(int64_t taps, int64_t phase, int64_t i) const {
    return i == points(taps, phase) - 1 ? points(taps, 0) - 1 : i;
  }
  constexpr int64_t phases_at(int64_t taps, int64_t point) const {
    if (step(taps) == 1) return 1;
    return point < points(taps, 0) - 1 && point >= points(taps, 1) - 1 ? 1 : 2;
  }

 private:
  constexpr int64_t step(int64_t taps) const { return taps == 1 ? 1 : stride; }
  constexpr int64_t outputs(int64_t taps) const { return taps == 1 ? 1 : m; }
  constexpr int64_t all_points(int64_t taps) const {
    return points(taps, 0) + (step(taps) == 2 ? points(taps, 1) : 0);
  }
};

}  // namespace nnarch
