// One step backwards, elementwise: from the gradient of h and c to those of the products.
#include "cpu/simd.h"
#include "recurrent/backward.h"
#include "recurrent/backward_cell_isa.h"
#include "recurrent/backward_norm_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

// One row of a step; `w` units from u on, of which the first n are real.
template <class T>
struct GradRow {
  const CellGrad<T>& p;
  int64_t row;
  const T* kept;
  const T* before;
  T *grad, *carry;

  NNARCH_INLINE GradRow(const CellGrad<T>& cell, int64_t r)
      : p(cell),
        row(r),
        kept(cell.kept + r * cell.kept_step),
        before(cell.before ? cell.before[r] : nullptr),
        grad(cell.grad + r * cell.grad_step),
        carry(cell.carry + r * cell.carry_step) {}

  NNARCH_INLINE Vec<T> of_h(int64_t u, int64_t n) const {
    const Vec<T> dh = load_n(p.dh + row * p.dh_step + u, n);
    return p.dy ? dh + load_n(p.dy + row * p.dy_step + u, n) : dh;
  }
  NNARCH_INLINE Vec<T> keep(int64_t vector, int64_t u, int64_t n) const {
    return load_n(kept + vector * p.hidden + u, n);
  }
  NNARCH_INLINE void put(int64_t vector, int64_t u, int64_t n, Vec<T> v) const {
    store_n(grad + vector * p.hidden + u, v, n);
  }
};

template <class T>
NNARCH_INLINE void lstm(const GradRow<T>& r, int64_t u, int64_t n) {
  const CellGrad<T>& p = r.p;
  const Vec<T> before = load_n(r.before + u, n);
  const Gates<T> gate{r.keep(0, u, n), r.keep(1, u, n), r.keep(2, u, n), r.keep(3, u, n)};
  const Vec<T> c = r.keep(4, u, n), seen = grad_tanh<T>(c), dh = r.of_h(u, n);
  const Vec<T> d_o = dh * seen * gate.o * (T(1) - gate.o);
  Vec<T> dc = load_n(r.carry + u, n) + dh * gate.o * (T(1) - seen * seen);
  const Gates<T> d = gates_of_cell(p, u, n, gate, before, c, d_o, dc);
  store_n(r.carry + u, dc, n);
  r.put(0, u, n, d.i), r.put(1, u, n, d.f), r.put(2, u, n, d.g), r.put(3, u, n, d.o);
  if (p.hidden_out) store_n(p.hidden_out + r.row * p.hidden_out_step + u, gate.o * seen, n);
}

template <class T>
NNARCH_INLINE void gru(const GradRow<T>& row, int64_t u, int64_t n) {
  const Vec<T> before = load_n(row.before + u, n);
  const Vec<T> r = row.keep(0, u, n), z = row.keep(1, u, n), fresh = row.keep(2, u, n);
  const Vec<T> dh = row.of_h(u, n) + load_n(row.carry + u, n);
  const Vec<T> d_fresh = dh * (T(1) - z) * (T(1) - fresh * fresh);
  store_n(row.carry + u, dh * z, n);
  row.put(0, u, n, d_fresh);
  row.put(1, u, n, d_fresh * row.keep(3, u, n) * r * (T(1) - r));
  row.put(2, u, n, dh * (before - fresh) * z * (T(1) - z));
  row.put(3, u, n, d_fresh * r);
}

template <class T, int64_t Kind>
NNARCH_INLINE void unit(const GradRow<T>& r, int64_t u, int64_t n) {
  if constexpr (Kind == 2) {
    lstm(r, u, n);
  } else if constexpr (Kind == 3) {
    gru(r, u, n);
  } else {
    const Vec<T> y = r.keep(0, u, n), dh = r.of_h(u, n);
    r.put(0, u, n, Kind == 1 ? (y <= T(0) ? Vec<T>{} : dh) : dh * (T(1) - y * y));
  }
}

template <class T, int64_t Kind>
NNARCH_NOINLINE void cell_of(const CellGrad<T>& p) {
  constexpr int64_t w = kLanes<T>;
  const int64_t whole = p.hidden / w * w;
  for (int64_t row = 0; row < p.rows; ++row) {
    const GradRow<T> r(p, row);
    for (int64_t u = 0; u < whole; u += w) unit<T, Kind>(r, u, w);
    if (whole < p.hidden) unit<T, Kind>(r, whole, p.hidden - whole);
  }
}

template <class T>
void cell(const CellGrad<T>& p) {
  if (p.kind == 0) return cell_of<T, 0>(p);
  if (p.kind == 1) return cell_of<T, 1>(p);
  if (p.kind == 3) return cell_of<T, 3>(p);
  if (!p.norm) return cell_of<T, 2>(p);
  for (int64_t row = 0; row < p.rows; ++row) norm_cell_grad(p, row);
}

// Vectors of columns at a time, so that the additions of one row do not wait for each other.
template <class T>
void column_sums(const T* rows, int64_t step, int64_t count, int64_t n, bool add, T* sums) {
  constexpr int64_t w = kLanes<T>;
  int64_t j = 0;
  for (; j + 4 * w <= n; j += 4 * w) {
    Vec<T> sum[4] = {};
    for (int64_t r = 0; r < count; ++r)
      for (int v = 0; v < 4; ++v) sum[v] += load(rows + r * step + j + v * w);
    for (int v = 0; v < 4; ++v) {
      T* to = sums + j + v * w;
      store(to, add ? load(to) + sum[v] : sum[v]);
    }
  }
  for (; j < n; j += w) {
    Vec<T> sum{};
    for (int64_t r = 0; r < count; ++r) sum += load_n(rows + r * step + j, n - j);
    store_n(sums + j, add ? load_n(sums + j, n - j) + sum : sum, n - j);
  }
}

template <class T>
void add_rows(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t rows, int64_t n,
              T* to, int64_t to_step) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < n; j += kLanes<T>) {
      const Vec<T> sum = load_n(b + r * b_step + j, n - j);
      store_n(to + r * to_step + j, a ? sum + load_n(a + r * a_step + j, n - j) : sum, n - j);
    }
}

template <class T>
const RecurrentGradTable<T>& table() {
  static constexpr RecurrentGradTable<T> entries = {cell<T>, column_sums<T>, add_rows<T>};
  return entries;
}

}  // namespace

template <>
const RecurrentGradTable<float>& recurrent_grad_table<float>() {
  return table<float>();
}
template <>
const RecurrentGradTable<double>& recurrent_grad_table<double>() {
  return table<double>();
}

}  // namespace nnarch::NNARCH_ISA
