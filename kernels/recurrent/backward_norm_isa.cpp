// One step backwards of the layer-normalized LSTM, row by row: the cell, the gates, then both
// products.
#include "recurrent/backward_norm_isa.h"

#include "cpu/simd.h"
#include "recurrent/backward_cell_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

inline constexpr int64_t kGates = 4;

template <class T>
NNARCH_INLINE Vec<T> first_lanes(Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) return v;
  alignas(kVectorBytes) T lanes[kLanes<T>];
  store(lanes, v);
  return load_n(lanes, n);
}

// Mean and 1 / standard deviation of n values.
template <class T>
struct Moments {
  T mean, scale;

  Moments(const T* v, int64_t n, T eps) {
    constexpr int64_t w = kLanes<T>;
    Vec<T> sum{}, squares{};
    for (int64_t j = 0; j < n; j += w) sum += load_n(v + j, n - j);
    mean = horizontal_sum<T>(sum) / static_cast<T>(n);
    for (int64_t j = 0; j < n; j += w) {
      const Vec<T> apart = first_lanes<T>(load_n(v + j, n - j) - mean, n - j);
      squares += apart * apart;
    }
    scale = T(1) / root(horizontal_sum<T>(squares) / static_cast<T>(n) + eps);
  }

  NNARCH_INLINE Vec<T> normalized(const T* v, int64_t n) const {
    return (load_n(v, n) - mean) * scale;
  }

 private:
  static float root(float x) { return __builtin_sqrtf(x); }
  static double root(double x) { return __builtin_sqrt(x); }
};

// grad[j] becomes the gradient of v[j], where it was that of normalized v[j] · gain[j] + bias[j];
// gain_sums collects the gradient of the gain, if any.
template <class T>
NNARCH_NOINLINE void normalization_grad(const T* v, int64_t n, const Moments<T>& m, const T* gain,
                                        const T* grad, T* gain_sums, T* result) {
  constexpr int64_t w = kLanes<T>;
  Vec<T> sum{}, along{};
  for (int64_t j = 0; j < n; j += w) {
    const int64_t left = n - j;
    const Vec<T> unit = m.normalized(v + j, left), dy = load_n(grad + j, left);
    if (gain_sums) add_to<T>(gain_sums + j, left, dy * unit);
    const Vec<T> d = dy * load_n(gain + j, left);
    sum += d, along += first_lanes<T>(d * unit, left);
  }
  const T mean = horizontal_sum<T>(sum) / static_cast<T>(n);
  const T slope = horizontal_sum<T>(along) / static_cast<T>(n);
  for (int64_t j = 0; j < n; j += w) {
    const int64_t left = n - j;
    const Vec<T> d = load_n(grad + j, left) * load_n(gain + j, left);
    store_n(result + j, (d - mean - m.normalized(v + j, left) * slope) * m.scale, left);
  }
}

}  // namespace

template <class T>
void norm_cell_grad(const CellGrad<T>& p, int64_t row) {
  constexpr int64_t w = kLanes<T>;
  const int64_t hidden = p.hidden;
  const T* kept = p.kept + row * p.kept_step;
  const T *c = kept + kGates * hidden, *before = p.before[row];
  T *dc = p.carry + row * p.carry_step, *sums = p.norm_sums;
  T *by_input = p.grad + row * p.grad_step, *by_state = by_input + kGates * hidden;
  const auto gate = [&](int64_t g, int64_t u) { return load_n(kept + g * hidden + u, hidden - u); };
  const T *cell_gain = p.norm + 16 * hidden, *cell_bias = p.norm + 17 * hidden;

  // The gradients of o and of the normalized cell, which wait in by_state and by_input.
  const Moments<T> cell(c, hidden, p.eps);
  for (int64_t u = 0; u < hidden; u += w) {
    const int64_t n = hidden - u;
    Vec<T> dh = load_n(p.dh + row * p.dh_step + u, n);
    if (p.dy) dh += load_n(p.dy + row * p.dy_step + u, n);
    const Vec<T> o = gate(3, u);
    const Vec<T> seen = grad_tanh<T>(cell.normalized(c + u, n) * load_n(cell_gain + u, n) +
                                     load_n(cell_bias + u, n));
    const Vec<T> d_seen = dh * o * (T(1) - seen * seen);
    if (sums) add_to<T>(sums + 17 * hidden + u, n, d_seen);
    store_n(by_input + u, d_seen, n);
    store_n(by_state + 3 * hidden + u, dh * seen * o * (T(1) - o), n);
    if (p.hidden_out) store_n(p.hidden_out + row * p.hidden_out_step + u, o * seen, n);
  }
  normalization_grad<T>(c, hidden, cell, cell_gain, by_input, sums ? sums + 16 * hidden : nullptr,
                        by_input);
  for (int64_t u = 0; u < hidden; u += w) {
    const int64_t n = hidden - u;
    const Gates<T> gates{gate(0, u), gate(1, u), gate(2, u), gate(3, u)};
    Vec<T> grad = load_n(dc + u, n) + load_n(by_input + u, n);
    const Gates<T> d = gates_of_cell<T>(p, u, n, gates, load_n(before + u, n), load_n(c + u, n),
                                        load_n(by_state + 3 * hidden + u, n), grad);
    store_n(dc + u, grad, n);
    store_n(by_state + u, d.i, n), store_n(by_state + hidden + u, d.f, n);
    store_n(by_state + 2 * hidden + u, d.g, n);
  }
  const int64_t width = kGates * hidden;
  if (sums)  // the biases of both products
    for (int64_t j = 0; j < width; j += w)
      add_to<T>(sums + width + j, width - j, load_n(by_state + j, width - j));
  const T *gx = kept + 5 * hidden, *gh = gx + width;
  normalization_grad<T>(gx, width, Moments<T>(gx, width, p.eps), p.norm, by_state, sums, by_input);
  normalization_grad<T>(gh, width, Moments<T>(gh, width, p.eps), p.norm + 2 * width, by_state,
                        sums ? sums + 2 * width : nullptr, by_state);
}

template void norm_cell_grad<float>(const CellGrad<float>&, int64_t);
template void norm_cell_grad<double>(const CellGrad<double>&, int64_t);

}  // namespace nnarch::NNARCH_ISA
