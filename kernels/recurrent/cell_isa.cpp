// The cells: what follows the products of one step, for a block of units; and the table of kernels.
#include "cpu/simd.h"
#include "recurrent/cell_math_isa.h"
#include "recurrent/cpu_kernels.h"
#include "recurrent/few_rows_isa.h"
#include "recurrent/norm_cell_isa.h"
#include "recurrent/step_pairs_isa.h"
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
    if (p.y_past_caches)
      stream(p.y + row * p.y_step + u, h);
    else if (p.y)
      store_n(p.y + row * p.y_step + u, h, n);
  }
};

// c' = σ(f)·c + σ(i)·tanh(g) of N vectors of units.
template <int N, bool Kept, class T>
NNARCH_INLINE void lstm_state(const CellRow<T>& r, int64_t u, int64_t n) {
  constexpr int64_t w = kLanes<T>;
  const CellBlock<T>& p = r.p;
  T* cell = p.c + r.row * p.c_step + u;
  Vec<T> before[N], i[N], f[N], g[N], fresh[N];
  for (int k = 0; k < N; ++k) {
    const int64_t at = u + k * w;
    before[k] = load_n(cell + k * w, n);
    i[k] = r.both(0, at, n), f[k] = r.both(1, at, n), g[k] = r.both(2, at, n);
    if (p.peephole) {
      i[k] += load_n(p.peephole + at, n) * before[k];
      f[k] += load_n(p.peephole + p.hidden + at, n) * before[k];
    }
  }
  sigmoid_times_tanh<Kept>(i, g, fresh);
  cell_sigmoid<N>(f);
  for (int k = 0; k < N; ++k) {
    const int64_t at = u + k * w;
    const Vec<T> c = f[k] * before[k] + fresh[k];
    store_n(cell + k * w, c, n);
    if constexpr (Kept)
      r.keep(0, at, n, i[k]), r.keep(1, at, n, f[k]), r.keep(2, at, n, g[k]), r.keep(4, at, n, c);
  }
}

// h' = σ(o)·tanh(c').
template <int N, bool Kept, class T>
NNARCH_INLINE void lstm_output(const CellRow<T>& r, int64_t u, int64_t n) {
  constexpr int64_t w = kLanes<T>;
  const CellBlock<T>& p = r.p;
  Vec<T> c[N], o[N], h[N];
  for (int k = 0; k < N; ++k) {
    const int64_t at = u + k * w;
    c[k] = load_n(p.c + r.row * p.c_step + at, n), o[k] = r.both(3, at, n);
    if (p.peephole) o[k] += load_n(p.peephole + 2 * p.hidden + at, n) * c[k];
  }
  sigmoid_times_tanh<Kept>(o, c, h);
  for (int k = 0; k < N; ++k) {
    if constexpr (Kept) r.keep(3, u + k * w, n, o[k]);
    r.finish(u + k * w, n, h[k]);
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
  if constexpr (Kind == 3)
    gru(r, u, n);
  else if constexpr (Kind == 1)
    r.finish(u, n, at_least<T>(r.both(0, u, n), Vec<T>{}));
  else
    r.finish(u, n, cell_tanh(r.both(0, u, n)));
}

// f(Count<vectors>{}, row, first unit, units a vector) for all of a block, N vectors at a time.
template <int N, class T, class F>
NNARCH_INLINE void over_units(const CellBlock<T>& p, const F& f) {
  constexpr int64_t w = kLanes<T>;
  const auto over_rows = [&](auto vectors, int64_t u, int64_t n) NNARCH_INLINE_LAMBDA {
    for (int64_t row = 0; row < p.rows; ++row) f(vectors, CellRow<T>{p, row}, u, n);
  };
  int64_t u = 0;
  if constexpr (N > 1)
    for (; u + N * w <= p.units; u += N * w) over_rows(Count<N>{}, u, w);
  for (; u + w <= p.units; u += w) over_rows(Count<1>{}, u, w);
  if (u < p.units) over_rows(Count<1>{}, u, p.units - u);
}

template <class T, int64_t Kind>
NNARCH_NOINLINE void cell_of(const CellBlock<T>& p) {
  over_units<1>(p, [](auto, const CellRow<T>& r, int64_t u, int64_t n)
                       NNARCH_INLINE_LAMBDA { unit<T, Kind>(r, u, n); });
}

// All states, then all outputs: each is a chain of dependent operations, and of half a chain more
// vectors are under way at once.
template <class T, bool Kept>
NNARCH_NOINLINE void lstm(const CellBlock<T>& p) {
  over_units<2>(p,
                [](auto vectors, const CellRow<T>& r, int64_t u, int64_t n)
                    NNARCH_INLINE_LAMBDA { lstm_state<decltype(vectors)::count, Kept>(r, u, n); });
  over_units<2>(p,
                [](auto vectors, const CellRow<T>& r, int64_t u, int64_t n)
                    NNARCH_INLINE_LAMBDA { lstm_output<decltype(vectors)::count, Kept>(r, u, n); });
}

template <class T>
void cell(const CellBlock<T>& p) {
  if (p.kind == 0) return cell_of<T, 0>(p);
  if (p.kind == 1) return cell_of<T, 1>(p);
  if (p.kind == 2) return p.kept ? lstm<T, true>(p) : lstm<T, false>(p);
  cell_of<T, 3>(p);
}

}  // namespace

template <>
const RecurrentTable<float>& recurrent_table<float>() {
  static constexpr RecurrentTable<float> table = {
      kMostFewRows,        few_rows<float, float>, few_rows<float, uint16_t>,
      step_product<float>, pair_factors,           pair_product,
      cell<float>,         normalize_row<float>,   norm_cell<float>,
      to_bfloat16,         from_bfloat16};
  return table;
}
template <>
const RecurrentTable<double>& recurrent_table<double>() {
  static constexpr RecurrentTable<double> table = {kMostFewRows,
                                                   few_rows<double, double>,
                                                   nullptr,
                                                   step_product<double>,
                                                   nullptr,
                                                   nullptr,
                                                   cell<double>,
                                                   normalize_row<double>,
                                                   norm_cell<double>,
                                                   nullptr,
                                                   nullptr};
  return table;
}

}  // namespace nnarch::NNARCH_ISA
