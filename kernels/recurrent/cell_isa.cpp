// The cells: what follows the products of one step, for a block of units; and the table of kernels.
#include "cpu/simd.h"
#include "recurrent/cell_math_isa.h"
#include "recurrent/cpu_kernels.h"
#include "recurrent/few_rows_isa.h"
#include "recurrent/norm_cell_isa.h"
#include "recurrent/step_product_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

// One row of a block.
template <class T>
struct CellRow {
  const CellBlock<T>& p;
  int64_t row;

  // The input's and the state's part of a gate, for up to `n` units from u on.
  NNARCH_INLINE Vec<T> input(int64_t gate, int64_t u, int64_t n) const {
    return load_n(p.gx + row * p.gx_step + gate * p.width + u, n);
  }
  NNARCH_INLINE Vec<T> state(int64_t gate, int64_t u, int64_t n) const {
    return load_n(p.gh + row * p.gh_step + gate * p.width + u, n);
  }
  NNARCH_INLINE Vec<T> both(int64_t gate, int64_t u, int64_t n) const {
    return p.gx ? input(gate, u, n) + state(gate, u, n) : state(gate, u, n);
  }
  NNARCH_INLINE void keep(int64_t vector, int64_t u, int64_t n, Vec<T> v) const {
    store_n(p.kept + row * p.kept_step + vector * p.hidden + u, v, n);
  }
  NNARCH_INLINE void finish(int64_t u, int64_t n, Vec<T> h) const {
    store_n(p.next + row * p.next_step + u, h, n);
    if (p.y) store_n(p.y + row * p.y_step + u, h, n);
  }
};

#if defined(NNARCH_ISA_avx512)
// The LSTM's cell in float32, from σ = 1 / (1 + e) and tanh as a quotient: factors share a
// division, of which one takes as long as 12 multiplications.
template <int N, class F>
NNARCH_INLINE void lstm_of_parts(const CellRow<float>& r, int64_t u, int64_t n, float* cell,
                                 Vec<float> (&before)[N], Vec<float> (&i)[N], Vec<float> (&f)[N],
                                 Vec<float> (&g)[N], Vec<float> (&o)[N], const F& add_peephole) {
  constexpr int64_t w = kLanes<float>;
  Vec<float> below[N], c[N];
  cell_exp_minus<N>(i), cell_exp_minus<N>(f);
  quotient_parts<N>(g, below, CellTanh::p, CellTanh::q, CellTanh::most);
  for (int k = 0; k < N; ++k) {
    const int64_t at = u + k * w;
    c[k] = before[k] / (f[k] + 1.0f) + g[k] / (below[k] + below[k] * i[k]);
    add_peephole(k, c[k]);
    store_n(cell + k * w, c[k], n);
    if (r.p.kept)
      r.keep(0, at, n, one_over_one_plus<float>(i[k])),
          r.keep(1, at, n, one_over_one_plus<float>(f[k])), r.keep(2, at, n, g[k] / below[k]),
          r.keep(4, at, n, c[k]);
  }
  cell_exp_minus<N>(o);
  quotient_parts<N>(c, below, CellTanh::p, CellTanh::q, CellTanh::most);
  for (int k = 0; k < N; ++k) {
    if (r.p.kept) r.keep(3, u + k * w, n, one_over_one_plus<float>(o[k]));
    r.finish(u + k * w, n, c[k] / (below[k] + below[k] * o[k]));
  }
}
#endif

// Of N vectors of units: with two, one's chain of dependent operations fills the gaps of the
// other's.
template <class T, int N>
NNARCH_INLINE void lstm(const CellRow<T>& r, int64_t u, int64_t n) {
  constexpr int64_t w = kLanes<T>;
  const CellBlock<T>& p = r.p;
  T* cell = p.c + r.row * p.c_step + u;
  Vec<T> before[N], i[N], f[N], g[N], o[N], c[N], h[N];
  for (int k = 0; k < N; ++k) {
    before[k] = load_n(cell + k * w, n);
    i[k] = r.both(0, u + k * w, n), f[k] = r.both(1, u + k * w, n);
    g[k] = r.both(2, u + k * w, n), o[k] = r.both(3, u + k * w, n);
    if (p.peephole) {
      i[k] += load_n(p.peephole + u + k * w, n) * before[k];
      f[k] += load_n(p.peephole + p.hidden + u + k * w, n) * before[k];
    }
  }
  const auto add_peephole = [&](int k, Vec<T> c) NNARCH_INLINE_LAMBDA {
    if (p.peephole) o[k] += load_n(p.peephole + 2 * p.hidden + u + k * w, n) * c;
  };
#if defined(NNARCH_ISA_avx512)
  if constexpr (sizeof(T) == 4)
    return lstm_of_parts<N>(r, u, n, cell, before, i, f, g, o, add_peephole);
#endif
  cell_sigmoid<N>(i), cell_sigmoid<N>(f), cell_tanh<N>(g);
  for (int k = 0; k < N; ++k) {
    h[k] = c[k] = f[k] * before[k] + i[k] * g[k];
    add_peephole(k, c[k]);
    store_n(cell + k * w, c[k], n);
  }
  cell_sigmoid<N>(o), cell_tanh<N>(h);
  for (int k = 0; k < N; ++k) {
    const int64_t at = u + k * w;
    if (p.kept)
      r.keep(0, at, n, i[k]), r.keep(1, at, n, f[k]), r.keep(2, at, n, g[k]),
          r.keep(3, at, n, o[k]), r.keep(4, at, n, c[k]);
    r.finish(at, n, o[k] * h[k]);
  }
}

template <class T>
NNARCH_INLINE void gru(const CellRow<T>& row, int64_t u, int64_t n) {
  const CellBlock<T>& p = row.p;
  const Vec<T> before = load_n(p.h + row.row * p.h_before_step + u, n);
  const Vec<T> r = cell_sigmoid(row.both(0, u, n)), z = cell_sigmoid(row.both(1, u, n));
  Vec<T> state = row.state(2, u, n);
  if (p.bias_n) state += load_n(p.bias_n + u, n);
  const Vec<T> fresh = cell_tanh(row.input(2, u, n) + r * state);
  if (p.kept)
    row.keep(0, u, n, r), row.keep(1, u, n, z), row.keep(2, u, n, fresh), row.keep(3, u, n, state);
  row.finish(u, n, (T(1) - z) * fresh + z * before);
}

template <class T, int64_t Kind>
NNARCH_INLINE void unit(const CellRow<T>& r, int64_t u, int64_t n) {
  if constexpr (Kind == 2)
    lstm<T, 1>(r, u, n);
  else if constexpr (Kind == 3)
    gru(r, u, n);
  else if constexpr (Kind == 1)
    r.finish(u, n, at_least<T>(r.both(0, u, n), Vec<T>{}));
  else
    r.finish(u, n, cell_tanh(r.both(0, u, n)));
}

template <class T, int64_t Kind>
NNARCH_NOINLINE void cell_of(const CellBlock<T>& p) {
  constexpr int64_t w = kLanes<T>;
  const int64_t whole = p.units / w * w;
  for (int64_t row = 0; row < p.rows; ++row) {
    const CellRow<T> r{p, row};
    int64_t u = 0;
    if constexpr (Kind == 2)
      for (; u + 2 * w <= whole; u += 2 * w) lstm<T, 2>(r, u, w);
    for (; u < whole; u += w) unit<T, Kind>(r, u, w);
    if (whole < p.units) unit<T, Kind>(r, whole, p.units - whole);
  }
}

template <class T>
void cell(const CellBlock<T>& p) {
  if (p.kind == 0) return cell_of<T, 0>(p);
  if (p.kind == 1) return cell_of<T, 1>(p);
  if (p.kind == 2) return cell_of<T, 2>(p);
  cell_of<T, 3>(p);
}

}  // namespace

template <>
const RecurrentTable<float>& recurrent_table<float>() {
  static constexpr RecurrentTable<float> table = {
      kMostFewRows, few_rows<float, float>, few_rows<float, uint16_t>, step_product<float>,
      cell<float>,  normalize_row<float>,   norm_cell<float>,          to_bfloat16,
      from_bfloat16};
  return table;
}
template <>
const RecurrentTable<double>& recurrent_table<double>() {
  static constexpr RecurrentTable<double> table = {
      kMostFewRows, few_rows<double, double>, nullptr,           step_product<double>,
      cell<double>, normalize_row<double>,    norm_cell<double>, nullptr,
      nullptr};
  return table;
}

}  // namespace nnarch::NNARCH_ISA
