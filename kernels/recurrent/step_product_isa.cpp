// Both products of a step in one register tile: the accumulators go from x·W_ih on to h·W_hh.
#include "recurrent/step_product_isa.h"

#include "recurrent/step_tile_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

// The sums of rows from First on go to C.
template <class T, int First, int... I>
NNARCH_INLINE void store_rows(Indices<I...>, const EvenRows<T>& c, const Vec<T>* left,
                              const Vec<T>* right) {
  constexpr int w = kLanes<T>;
  ((store(c.template row<First + I>(), left[First + I]),
    store(c.template row<First + I>() + w, right[First + I])),
   ...);
}

// All sums join what C holds, if any.
template <class T, int... I>
NNARCH_INLINE void leave_in(Indices<I...> each, T* c, int64_t c_step, bool held, Vec<T>* left,
                            Vec<T>* right) {
  constexpr int w = kLanes<T>;
  EvenRows<T> to(c, c_step);
  to.pin();
  if (held)
    ((left[I] += load(to.template row<I>()), right[I] += load(to.template row<I>() + w)), ...);
  store_rows<T, 0>(each, to, left, right);
}

// The last products and the stores of the first half of the rows, then of the others.
template <class T, int Rows>
NNARCH_INLINE void finish_by_halves(const EvenRows<T>& rows, const T* b, T* c, int64_t c_step,
                                    Vec<T>* left, Vec<T>* right) {
  constexpr int half = (Rows + 1) / 2;
  constexpr MakeIndices<half> first;
  constexpr MakeIndices<Rows - half> second;
  EvenRows<T> to(c, c_step);
  to.pin();
  multiply_last<T, 0>(first, rows, b, [] {}, left, right);
  store_rows<T, 0>(first, to, left, right);
  multiply_last<T, half>(second, rows, b, [] {}, left, right);
  store_rows<T, half>(second, to, left, right);
}

// Rows [row, row + MR) of one panel, tile `i` of `all`, each of which fetches its share of the
// next.
template <class T, bool Ahead, int... I>
NNARCH_INLINE void tile(Indices<I...> each, const StepProduct<T>& p, int64_t panel, int64_t row,
                        int64_t i, int64_t all) {
  constexpr int height = sizeof...(I);
  constexpr int64_t last_steps = kLastStepsOf<height>;
  const T* start = p.start + panel * kColumns<T>;
  asm("" : "+r"(start));
  const Vec<T> s0 = load(start), s1 = load(start + kLanes<T>);
  Vec<T> left[height] = {(static_cast<void>(I), s0)...};
  Vec<T> right[height] = {(static_cast<void>(I), s1)...};
  EvenRows<T> rows(nullptr, 0);
  const T* b = nullptr;
  T* c = p.c + row * p.c_step + panel * kColumns<T>;
  bool held = false, by_halves = false;
  for (int64_t n = 0; n < p.parts; ++n) {
    const StepPart<T>& part = p.part[n];
    if (part.apart) {
      leave_in<T>(each, c, p.c_step, held, left, right);
      ((left[I] = Vec<T>{}, right[I] = Vec<T>{}), ...);
      held = true;
    }
    rows = EvenRows<T>(part.a + (p.row + row) * part.a_step, part.a_step);
    b = part.b + (p.first + panel) * part.panel_step;
    by_halves = last_steps > 0 && n + 1 == p.parts && !held && part.depth >= last_steps;
    const int64_t share = part.depth * kColumns<T> / all / kLine<T> * kLine<T>;
    AheadLines<T> ahead{b + part.panel_step + i * share};
    add_products<T, Ahead>(each, rows, by_halves ? part.depth - last_steps : part.depth, b, ahead,
                           left, right);
  }
  if constexpr (last_steps > 0)
    if (by_halves) return finish_by_halves<T, height>(rows, b, c, p.c_step, left, right);
  leave_in<T>(each, c, p.c_step, held, left, right);
}

template <class T, bool Ahead, int MR>
NNARCH_NOINLINE void tiles(const StepProduct<T>& p, int64_t panel, int64_t row, int64_t first,
                           int64_t last, int64_t in_panel) {
  for (int64_t i = first; i < last; ++i, row += MR) {
    fetch(p.ahead, panel * in_panel + i, p.panels * in_panel);
    tile<T, Ahead>(MakeIndices<MR>{}, p, panel, row, i, in_panel);
  }
}

template <class T>
using Tiles = void (*)(const StepProduct<T>&, int64_t, int64_t, int64_t, int64_t, int64_t);
template <class T, bool Ahead, int... I>
NNARCH_INLINE Tiles<T> tiles_of(Indices<I...>, int64_t height) {
  static constexpr Tiles<T> of[] = {tiles<T, Ahead, I + 1>...};
  return of[height - 1];
}

}  // namespace

template <class T>
void step_product(const StepProduct<T>& p) {
  const int64_t count = (p.rows + kRows - 1) / kRows;
  const int64_t height = p.rows / count, taller = p.rows % count;
  // With a single tile a panel the products wait for their weights, whoever fetches them.
  const auto of = [&](int64_t rows) {
    return p.fetches_weights && count > 1 ? tiles_of<T, true>(MakeIndices<kRows>{}, rows)
                                          : tiles_of<T, false>(MakeIndices<kRows>{}, rows);
  };
  for (int64_t panel = 0; panel < p.panels; ++panel) {
    if (taller > 0) of(height + 1)(p, panel, 0, 0, taller, count);
    of(height)(p, panel, taller * (height + 1), taller, count, count);
  }
}

template void step_product<float>(const StepProduct<float>&);
template void step_product<double>(const StepProduct<double>&);

}  // namespace nnarch::NNARCH_ISA
