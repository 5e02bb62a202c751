// 7×7 kernels at stride 1 by Winograd's algorithm along the rows: 14 products for four outputs of a
// kernel row, not 28. cpu_row_winograd.h says how.
#include "cpu/epilogue_isa.h"
#include "depthwise/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {

#if defined(NNARCH_ISA_avx512)
namespace {

using T = float;
using V = Vec<T>;
constexpr int64_t w = kLanes<T>;
constexpr int kTaps = 7, kOut = 4;       // of a row: taps of the kernel, outputs of a quad
constexpr int kRows = kRowWinogradRows;  // output rows at a time
constexpr int kInputRows = kRows + kTaps - 1;
constexpr int64_t kQuad = kRowWinogradPoints * w;  // what a quad of input pixels becomes

// ------------------------------------------------------------------------------ transforms

// What the kernel's values at 0, 1, -1, 2, -2, 1/2 and -1/2 meet, of seven pixels: their products
// with the coefficients of the polynomial that is zero at all other points.
NNARCH_INLINE void to_points(const V* d, T* to) {
  store(to, (d[6] - d[0]) + T(5.25) * (d[2] - d[4]));
  V even = (d[6] + d[2]) - T(4.25) * d[4], odd = (d[5] + d[1]) - T(4.25) * d[3];
  store(to + w, even + odd), store(to + 2 * w, even - odd);
  even = d[6] + (T(0.25) * d[2] - T(1.25) * d[4]);
  odd = T(2) * d[5] + (T(0.5) * d[1] - T(2.5) * d[3]);
  store(to + 3 * w, even + odd), store(to + 4 * w, even - odd);
  even = d[6] + (T(4) * d[2] - T(5) * d[4]);
  odd = T(0.5) * d[5] + (T(2) * d[1] - T(2.5) * d[3]);
  store(to + 5 * w, even + odd), store(to + 6 * w, even - odd);
}

// One row of pixels from column `column` on, those outside of it being zero.
NNARCH_INLINE void row_to_points(const T* x, int64_t pixel, int64_t column, int64_t width,
                                 int64_t quads, T* to) {
  const auto at = [&](int64_t j) NNARCH_INLINE_LAMBDA {
    return j >= 0 && j < width ? load(x + j * pixel) : V{};
  };
  V d[kTaps] = {at(column), at(column + 1), at(column + 2)};
  for (int64_t i = 0; i < quads; ++i, column += kOut, to += kQuad) {
    if (column >= 0 && column + kTaps <= width) {
      const T* p = x + (column + 3) * pixel;
      d[3] = load(p), d[4] = load(p + pixel), d[5] = load(p + 2 * pixel),
      d[6] = load(p + 3 * pixel);
    } else {
      d[3] = at(column + 3), d[4] = at(column + 4), d[5] = at(column + 5), d[6] = at(column + 6);
    }
    to_points(d, to);
    d[0] = d[4], d[1] = d[5], d[2] = d[6];
  }
}

constexpr T kPoints[kRowWinogradPoints] = {0, 1, -1, 2, -2, 0.5, -0.5};
constexpr double distances(T a) {
  double product = 1;
  for (const T b : kPoints)
    if (b != a) product *= double{a} - b;
  return product;
}

// Half a row of the kernel at a point: its polynomial's value, over the distances to all other
// points.
template <int Point, int Half>
NNARCH_INLINE V weight_at(const T* row) {
  constexpr T a = kPoints[Point], scale = static_cast<T>(1 / distances(a));
  V value{};
  for (int s = Half ? kTaps - 1 : kOut - 1; s >= Half * kOut; --s)
    value = value * a + load(row + s * kDepthwiseBlock);
  return value * scale;
}

template <int Point, int... Row>
NNARCH_INLINE T* weights_at(const T* kernel, T* to, Indices<Row...>) {
  ((store(to + Row * w, weight_at<Point, 0>(kernel + Row * kTaps * kDepthwiseBlock)),
    store(to + (kTaps + Row) * w, weight_at<Point, 1>(kernel + Row * kTaps * kDepthwiseBlock))),
   ...);
  return to + 2 * kTaps * w;
}

// [points][2][7][16] from a packed vector of channels [49][16].
template <int... Point>
NNARCH_INLINE void weights_to_points(const T* kernel, T* to, Indices<Point...>) {
  ((to = weights_at<Point>(kernel, to, MakeIndices<kTaps>{})), ...);
}

// -------------------------------------------------------------------------------- products

// Input row I times the weights of those kernel rows with which it meets output rows R.
template <int I, int... R>
NNARCH_INLINE void use_row(V value, const V* weight, V* sum, Indices<R...>) {
  ((I - R >= 0 && I - R < kTaps
        ? void(sum[R] += value * weight[I - R >= 0 && I - R < kTaps ? I - R : 0])
        : void()),
   ...);
}

template <int I>
NNARCH_INLINE void add_row(const T* row, int64_t at, const V* weight, V* sum) {
  if (!row) return;  // outside the image
  V value = load(row + at);
  keep_in_register(value);
  use_row<I>(value, weight, sum, MakeIndices<kRows>{});
}

template <int... I>
NNARCH_INLINE void add_rows(Indices<I...>, const T* const* rows, int64_t at, const V* weight,
                            V* sum) {
  (add_row<I>(rows[I], at, weight, sum), ...);
}

// One half of the taps of a row, of all kernel rows: the quad itself, or the one after it.
template <int... K>
NNARCH_INLINE void add_half(Indices<K...>, const T* const* rows, int64_t at, const T*& weights,
                            V* sum) {
  const V weight[kTaps] = {load(weights + K * w)...};
  add_rows(MakeIndices<kInputRows>{}, rows, at, weight, sum);
  weights += kTaps * w;
  asm("" : "+r"(weights));
}

NNARCH_INLINE void add_point(const T* const* rows, int64_t at, const T*& weights, V* sum) {
  add_half(MakeIndices<kTaps>{}, rows, at, weights, sum);
  add_half(MakeIndices<kTaps>{}, rows, at + kQuad, weights, sum);
}

// The sums of points a and -a join the four outputs, as even and odd powers of a.
template <int... R>
NNARCH_INLINE void join(Indices<R...>, const V* plus, const V* minus, T a, V* y0, V* y1, V* y2,
                        V* y3) {
  ((y0[R] += plus[R] + minus[R], y1[R] += a * (plus[R] - minus[R]),
    y2[R] += a * a * (plus[R] + minus[R]), y3[R] += a * a * a * (plus[R] - minus[R])),
   ...);
}

template <int... R>
NNARCH_INLINE void add_points(Indices<R...> each, const T* const* rows, int64_t at,
                              const T*& weights, T a, V* y0, V* y1, V* y2, V* y3) {
  V plus[kRows] = {(static_cast<void>(R), V{})...}, minus[kRows] = {(static_cast<void>(R), V{})...};
  add_point(rows, at, weights, plus);
  add_point(rows, at + w, weights, minus);
  join(each, plus, minus, a, y0, y1, y2, y3);
}

// --------------------------------------------------------------------------------- outputs

struct Outputs {
  T* y;
  const T* residual;  // or null
  int64_t row, pixel;
  int64_t columns;  // 1 to 4
  const Epilogue<T>& epilogue;
};

// One column, whose rows follow each other.
template <int... R>
NNARCH_INLINE void put(Indices<R...>, const Outputs& out, int64_t column, V* value) {
  const Epilogue<T>& e = out.epilogue;
  if (column >= out.columns) return;
  if (e.scale) {
    const V scale = load(e.scale);
    ((value[R] *= scale), ...);
  }
  if (e.shift) {
    const V shift = load(e.shift);
    ((value[R] += shift), ...);
  }
  if (out.residual) ((value[R] += load(out.residual + R * out.row + column * out.pixel)), ...);
  if (e.activation == kRelu || e.activation == kRelu6) {
    const ClampBounds<T> bounds(e.activation);
    ((value[R] = clamp<T>(value[R], bounds.low, bounds.high)), ...);
  }
  T* y = out.y + column * out.pixel;
  (store(y + R * out.row, value[R]), ...);
}

NNARCH_NOINLINE void activate_quad(const Outputs& out) {
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t j = 0; j < out.columns; ++j) {
      T* y = out.y + r * out.row + j * out.pixel;
      store(y, activate<T>(load(y), out.epilogue.activation, out.epilogue.alpha));
    }
}

// Four rows by four pixels.
template <int... R>
NNARCH_INLINE void quad_of(Indices<R...> each, const T* const* rows, int64_t at, const T* weights,
                           const Outputs& out) {
  V y0[kRows] = {(static_cast<void>(R), V{})...}, y1[kRows] = {(static_cast<void>(R), V{})...},
    y2[kRows] = {(static_cast<void>(R), V{})...}, y3[kRows] = {(static_cast<void>(R), V{})...};
  add_point(rows, at, weights, y0);
  add_points(each, rows, at + w, weights, T(1), y0, y1, y2, y3);
  add_points(each, rows, at + 3 * w, weights, T(2), y0, y1, y2, y3);
  add_points(each, rows, at + 5 * w, weights, T(0.5), y0, y1, y2, y3);
  put(each, out, 0, y0), put(each, out, 1, y1), put(each, out, 2, y2), put(each, out, 3, y3);
}

NNARCH_NOINLINE void quad(const T* const* rows, int64_t at, const T* weights, const Outputs& out) {
  quad_of(MakeIndices<kRows>{}, rows, at, weights, out);
  if (!is_clamp(out.epilogue.activation)) activate_quad(out);
}

// One vector of channels: rows [first, last) of the output, quads [from, to) of a row.
void run(const DepthwiseConv<T>& c, const RowWinogradTask& task, T* points) {
  const DepthwisePass<T>& pass = *c.passes;
  alignas(kVectorBytes) T weights[kRowWinogradPoints * 2 * kTaps * w];
  weights_to_points(pass.weight + task.channel * kTaps * kTaps, weights,
                    MakeIndices<kRowWinogradPoints>{});
  const int64_t quads = task.to - task.from, row_size = (quads + 1) * kQuad;
  const int64_t column = task.from * kOut;
  const T* x = c.x + task.channel;
  const Epilogue<T> epilogue = c.epilogue.from_channel(task.channel);
  const T* rows[kInputRows];
  int64_t ready = task.first + pass.row > 0 ? task.first + pass.row : 0;  // the next input row
  for (int64_t next = task.first; next < task.last; next += kRows) {
    // The last rows are moved up to end with the image, and computed twice.
    const int64_t oy = next < task.last - kRows ? next : task.last - kRows, top = oy + pass.row;
    for (; ready < c.h && ready < top + kInputRows; ++ready)
      row_to_points(x + ready * c.x_row, c.x_pixel, column + pass.column, c.w, quads + 1,
                    points + ready % kInputRows * row_size);
    for (int64_t i = 0; i < kInputRows; ++i)
      rows[i] =
          top + i < 0 || top + i >= c.h ? nullptr : points + (top + i) % kInputRows * row_size;
    for (int64_t i = 0; i < quads; ++i) {
      const int64_t ox = column + i * kOut, left = pass.ow - ox;
      const int64_t at = pass.y_offset + oy * c.y_row + ox * c.y_pixel + task.channel;
      quad(rows, i * kQuad, weights,
           {c.y + at, epilogue.residual ? c.epilogue.residual + at : nullptr, c.y_row, c.y_pixel,
            left < kOut ? left : kOut, epilogue});
    }
  }
}

}  // namespace

RowWinogradRun row_winograd_run() { return run; }
#else
// Sixteen registers hold too few sums.
RowWinogradRun row_winograd_run() { return nullptr; }
#endif

}  // namespace nnarch::NNARCH_ISA
