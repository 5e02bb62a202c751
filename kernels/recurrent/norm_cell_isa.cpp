// The LSTM with layer normalization: its products and its cell, a whole row at a time.
#include "recurrent/norm_cell_isa.h"

#include "cpu/simd.h"
#include "recurrent/cell_math_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

// Calls f(column, gate, unit, n) for vectors of up to n units that cover a row.
template <class T, class F>
NNARCH_INLINE void over_columns(const ColumnOrder& order, const F& f) {
  for (int64_t b = 0; b < order.blocks; ++b) {
    const int64_t units = order.units(b), width = order.width_of(b);
    for (int64_t gate = 0; gate < order.gates; ++gate)
      for (int64_t u = 0; u < units; u += kLanes<T>)
        f(order.start(b) + gate * width + u, gate, b * order.width + u,
          units - u < kLanes<T> ? units - u : kLanes<T>);
  }
}

// The sum over the row of what f(column, n) gives, lanes beyond n being zero.
template <class T>
struct Moments {
  T mean, scale;  // of (v - mean)·scale
};

template <class T>
NNARCH_INLINE Vec<T> first_lanes(Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) return v;
  alignas(kVectorBytes) T lanes[kLanes<T>];
  store(lanes, v);
  return load_n(lanes, n);
}

template <class T>
NNARCH_INLINE T inverse_deviation(T sum_of_squares, int64_t count, T eps) {
  const T variance = sum_of_squares / static_cast<T>(count) + eps;
  if constexpr (sizeof(T) == 4)
    return 1.0f / __builtin_sqrtf(variance);
  else
    return 1.0 / __builtin_sqrt(variance);
}

template <class T>
NNARCH_INLINE Moments<T> moments(const NormRow<T>& p, const T* row) {
  const int64_t count = p.order.gates * p.order.hidden;
  Vec<T> sum{};
  over_columns<T>(p.order, [&](int64_t c, int64_t, int64_t, int64_t n)
                               NNARCH_INLINE_LAMBDA { sum += load_n(row + c, n); });
  const T mean = horizontal_sum<T>(sum) / static_cast<T>(count);
  Vec<T> squares{};
  over_columns<T>(p.order, [&](int64_t c, int64_t, int64_t, int64_t n) NNARCH_INLINE_LAMBDA {
    const Vec<T> d = first_lanes<T>(load_n(row + c, n) - mean, n);
    squares += d * d;
  });
  return {mean, inverse_deviation<T>(horizontal_sum<T>(squares), count, p.eps)};
}

template <class T>
NNARCH_INLINE Moments<T> moments(const T* v, int64_t count, T eps) {
  constexpr int64_t w = kLanes<T>;
  Vec<T> sum{}, squares{};
  for (int64_t u = 0; u < count; u += w) sum += load_n(v + u, count - u);
  const T mean = horizontal_sum<T>(sum) / static_cast<T>(count);
  for (int64_t u = 0; u < count; u += w) {
    const Vec<T> d = first_lanes<T>(load_n(v + u, count - u) - mean, count - u);
    squares += d * d;
  }
  return {mean, inverse_deviation<T>(horizontal_sum<T>(squares), count, eps)};
}

}  // namespace

template <class T>
void normalize_row(const NormRow<T>& p, T* row, T* kept) {
  const Moments<T> m = moments(p, row);
  const int64_t hidden = p.order.hidden;
  over_columns<T>(p.order, [&](int64_t c, int64_t gate, int64_t u, int64_t n) NNARCH_INLINE_LAMBDA {
    const Vec<T> v = load_n(row + c, n);
    if (kept) store_n(kept + gate * hidden + u, v, n);
    const Vec<T> gain = load_n(p.gain + c, n), bias = load_n(p.bias + c, n);
    store_n(row + c, (v - m.mean) * m.scale * gain + bias, n);
  });
}

namespace {

// The gates and the cell of up to n units from unit `u` on, whose first gate is column `at`.
template <class T>
NNARCH_INLINE void gates(const NormCell<T>& p, int64_t at, int64_t width, int64_t u, int64_t n) {
  const int64_t hidden = p.state.order.hidden;
  const auto sum = [&](int64_t gate) NNARCH_INLINE_LAMBDA {
    return load_n(p.gx + at + gate * width, n) + load_n(p.gh + at + gate * width, n);
  };
  const Vec<T> before = load_n(p.c + u, n);
  Vec<T> i = sum(0), f = sum(1), o = sum(3);
  if (p.peephole) {
    i += load_n(p.peephole + u, n) * before;
    f += load_n(p.peephole + hidden + u, n) * before;
  }
  i = cell_sigmoid(i), f = cell_sigmoid(f);
  const Vec<T> g = cell_tanh(sum(2));
  const Vec<T> c = f * before + i * g;
  if (p.peephole) o += load_n(p.peephole + 2 * hidden + u, n) * c;
  o = cell_sigmoid(o);
  store_n(p.c + u, c, n);
  store_n(p.gh + at, o, n);  // waits there for the normalized cell
  if (!p.kept) return;
  const Vec<T> all[5] = {i, f, g, o, c};
  for (int v = 0; v < 5; ++v) store_n(p.kept + v * hidden + u, all[v], n);
}

}  // namespace

template <class T>
void norm_cell(const NormCell<T>& p) {
  const ColumnOrder& order = p.state.order;
  normalize_row<T>(p.state, p.gh, p.kept ? p.kept + 9 * order.hidden : nullptr);
  const auto over_units = [&](const auto& f) NNARCH_INLINE_LAMBDA {
    for (int64_t b = 0; b < order.blocks; ++b)
      for (int64_t u = 0; u < order.units(b); u += kLanes<T>)
        f(order.start(b) + u, order.width_of(b), b * order.width + u,
          order.units(b) - u < kLanes<T> ? order.units(b) - u : kLanes<T>);
  };
  over_units([&](int64_t at, int64_t width, int64_t u, int64_t n)
                 NNARCH_INLINE_LAMBDA { gates(p, at, width, u, n); });
  const Moments<T> m = moments(p.c, order.hidden, p.state.eps);
  over_units([&](int64_t at, int64_t, int64_t u, int64_t n) NNARCH_INLINE_LAMBDA {
    const Vec<T> c = (load_n(p.c + u, n) - m.mean) * m.scale * load_n(p.cell_gain + u, n) +
                     load_n(p.cell_bias + u, n);
    const Vec<T> h = load_n(p.gh + at, n) * cell_tanh(c);
    store_n(p.h + u, h, n);
    if (p.y) store_n(p.y + u, h, n);
  });
}

template void normalize_row<float>(const NormRow<float>&, float*, float*);
template void normalize_row<double>(const NormRow<double>&, double*, double*);
template void norm_cell<float>(const NormCell<float>&);
template void norm_cell<double>(const NormCell<double>&);

}  // namespace nnarch::NNARCH_ISA
