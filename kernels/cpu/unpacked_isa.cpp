// Products with B as it lies: the register tile of gemm_tile_isa.h, with a step from row to row of
// B that is known at run time only. The first tile of rows leaves a copy of the panel in the
// first-level cache for the others: its stores go beside the products, and the panel's lines, each
// in a page of its own, are read once.
#include "cpu/unpacked.h"

#include "cpu/gemm_step_isa.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {
namespace {

// Lines are fetched ahead for so many steps at a time.
constexpr int64_t kTurn = (kRows + 3) / 4 * 4;

// The rows of B of the next part of the sum, fetched ahead one line a step, in the order in which
// they lie: prefetchers run ahead in a page that they see read.
template <class T>
class RowsAhead {
 public:
  explicit RowsAhead(const UnpackedBlock<T>& g) : row_(g.after), step_(g.b_step) {
    if (!g.after) return;
    const bool joined = g.b_step == g.n;
    rows_ = joined ? 1 : g.after_rows;
    width_ = joined ? g.after_rows * g.n : g.n;
  }
  bool some() const { return rows_ > 0; }
  EvenLines<T> turn() {
    const EvenLines<T> lines{row_ + at_, kLine<T>};
    at_ += kTurn * kLine<T>;
    if (at_ >= width_) at_ = 0, row_ += step_, --rows_;
    return lines;
  }

 private:
  const T* row_;
  int64_t step_, rows_ = 0, width_ = 0, at_ = 0;
};

// A panel of B whose rows lie `step` apart.
template <class T>
struct RowsOfB {
  const T* at;
  int64_t step;
};
template <class T>
NNARCH_INLINE const T* vectors_of(const RowsOfB<T>& b) {
  return b.at;
}
template <class T>
NNARCH_INLINE void go_on(RowsOfB<T>& b, Vec<T>, Vec<T>) {
  b.at += b.step;
}

// The same, packed by the way.
template <class T>
struct CopiedRowsOfB {
  RowsOfB<T> rows;
  T* copy;
};
template <class T>
NNARCH_INLINE const T* vectors_of(const CopiedRowsOfB<T>& b) {
  return b.rows.at;
}
template <class T>
NNARCH_INLINE void go_on(CopiedRowsOfB<T>& b, Vec<T> left, Vec<T> right) {
  store(b.copy, left), store(b.copy + kLanes<T>, right);
  b.copy += kColumns<T>;
  go_on(b.rows, left, right);
}

// One panel of B and its columns of C.
template <class T>
struct UnpackedPanel {
  const UnpackedBlock<T>& g;
  RowsOfB<T> b;
  T* c;
  int64_t columns;
  T* copy;  // where the first tile puts the panel, or null

  template <bool Copy>
  NNARCH_INLINE auto steps() const {
    if constexpr (Copy) {
      return CopiedRowsOfB<T>{b, copy};
    } else {
      return b;
    }
  }
};

template <class T, bool Whole>
NNARCH_INLINE void put_row(const UnpackedPanel<T>& p, T* c, Vec<T> left, Vec<T> right) {
  constexpr int w = kLanes<T>;
  keep_order(c, left, right);
  if constexpr (Whole) {
    if (p.g.accumulate) left += load(c), right += load(c + w);
    store(c, left), store(c + w, right);
  } else {
    const int64_t n0 = p.columns < w ? p.columns : w, n1 = p.columns - n0;
    if (p.g.accumulate) left += load_n(c, n0), right += load_n(c + w, n1);
    store_n(c, left, n0), store_n(c + w, right, n1);
  }
}

template <class T, bool Whole, Used Use, bool Copy, int... I>
NNARCH_INLINE void unpacked_tile(Indices<I...> each, const UnpackedPanel<T>& p, const T* a, T* c,
                                 RowsAhead<T>& ahead) {
  const UnpackedBlock<T>& g = p.g;
  Vec<T> left[sizeof...(I)] = {(static_cast<void>(I), Vec<T>{})...};
  Vec<T> right[sizeof...(I)] = {(static_cast<void>(I), Vec<T>{})...};
  EvenRows<T> rows(a, g.a_step);
  auto b = p.template steps<Copy>();
  bool fetch_c = true;
  for (int64_t k = 0; k < g.depth; k += kTurn) {
    EvenLines<T> line{vectors_of(b), 0};
    int64_t second = 0;
    if (fetch_c)
      line = {c, g.c_step}, second = p.columns - 1;
    else if (ahead.some())
      line = ahead.turn();
    fetch_c = false;
    const int64_t steps = g.depth - k < kTurn ? g.depth - k : kTurn;
    multiply<T, Use>(each, rows, 0, steps, b, line, second, left, right);
  }
  EvenRows<T> to(c, g.c_step);
  to.pin();
  (put_row<T, Whole>(p, to.template row<I>(), left[I], right[I]), ...);
}

template <class T, bool Whole, Used Use, bool Copy, int MR>
NNARCH_NOINLINE void unpacked_tiles(const UnpackedPanel<T>& p, int64_t first, int64_t tiles,
                                    RowsAhead<T>& ahead) {
  for (; tiles > 0; --tiles, first += MR)
    unpacked_tile<T, Whole, Use, Copy>(MakeIndices<MR>{}, p, p.g.a + first * p.g.a_step,
                                       p.c + first * p.g.c_step, ahead);
}

template <class T>
using UnpackedTiles = void (*)(const UnpackedPanel<T>&, int64_t, int64_t, RowsAhead<T>&);
template <class T, bool Whole, Used Use, bool Copy, int... I>
UnpackedTiles<T> tiles_of(Indices<I...>, int64_t rows) {
  static constexpr UnpackedTiles<T> heights[] = {unpacked_tiles<T, Whole, Use, Copy, I + 1>...};
  return heights[rows - 1];
}
template <class T>
UnpackedTiles<T> select_tiles(const UnpackedPanel<T>& p, int64_t rows) {
  constexpr MakeIndices<kRows> all;
  if (p.copy) return tiles_of<T, true, kBothVectors, true>(all, rows);
  if (p.columns >= kColumns<T>) return tiles_of<T, true, kBothVectors, false>(all, rows);
  if (p.columns > kLanes<T>) return tiles_of<T, false, kBothVectors, false>(all, rows);
  return tiles_of<T, false, kOneVector, false>(all, rows);
}

// Rows in tiles of nearly equal height, taller ones first.
template <class T>
void run_panel(UnpackedPanel<T> p, RowsAhead<T>& ahead) {
  const int64_t m = p.g.m, tiles = (m + kRows - 1) / kRows, height = m / tiles;
  int64_t taller = m % tiles, others = tiles - taller, first = 0;
  const auto run = [&](int64_t rows, int64_t count) {
    if (count > 0) select_tiles(p, rows)(p, first, count, ahead);
    first += count * rows;
  };
  if (p.copy) {
    run(taller > 0 ? height + 1 : height, 1);
    taller > 0 ? --taller : --others;
    p.b = {p.copy, kColumns<T>}, p.copy = nullptr;
  }
  run(height + 1, taller);
  run(height, others);
}

template <class T>
void run_unpacked(const UnpackedBlock<T>& g) {
  if (g.m <= 0) return;
  RowsAhead<T> ahead(g);
  alignas(kVectorBytes) T near[kUnpackedDepth * kColumns<T>];
  T* const copy = g.m > kRows ? near : nullptr;
  int64_t column = 0;
  for (; column + kColumns<T> <= g.n; column += kColumns<T>)
    run_panel<T>({g, {g.b + column, g.b_step}, g.c + column, kColumns<T>, copy}, ahead);
  const int64_t columns = g.n - column;
  if (columns == 0) return;
  // What a vector would read past the end of a row is zero in a copy.
  gemm_table<T>().pack_panel(g.b + column, g.b_step, 1, g.depth, columns, near);
  run_panel<T>({g, {near, kColumns<T>}, g.c + column, columns, nullptr}, ahead);
}

}  // namespace

template <>
UnpackedProduct<float> unpacked_product<float>() {
  return run_unpacked<float>;
}
template <>
UnpackedProduct<double> unpacked_product<double>() {
  return run_unpacked<double>;
}

}  // namespace nnarch::NNARCH_ISA
