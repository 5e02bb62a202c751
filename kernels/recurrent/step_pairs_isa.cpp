// Both products of a step by Strassen's formulas (cpu/strassen.h): the left factors of pairs of
// rows, and the seven products, each added to where it belongs as it leaves its register tile.
#include "recurrent/step_pairs_isa.h"

#include "cpu/strassen.h"
#include "cpu/strassen_factors_isa.h"
#include "recurrent/step_tile_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

using T = float;
using V = Vec<T>;
constexpr int64_t w = kLanes<T>;

// --------------------------------------------------------------------------- left factors

// The larger of `most` and |x| as integers, which order alike; NaNs are the largest of all.
using Magnitudes = decltype(V{} < V{});
NNARCH_INLINE void raise(Magnitudes& most, V x) {
  const Magnitudes magnitude = (Magnitudes)x & 0x7fffffff;
  most = magnitude > most ? magnitude : most;
}

template <bool Both>
NNARCH_INLINE void factors_of_pair(const PairFactors<T>& p, int64_t pair, Magnitudes& most) {
  const T *first = p.first + pair * p.first_step, *second = p.second + pair * p.second_step;
  const int64_t low_first = p.pairs * p.first_step, low_second = p.pairs * p.second_step;
  T* to = p.to + pair * p.pair_step;
  for (int64_t k = 0; k < p.count; k += w) {
    const V left = load(p.first_scale + k), right = load(p.second_scale + k);
    const V a11 = load(first + k) * left, a12 = load(second + k) * right;
    V a21{}, a22{};
    if constexpr (Both)
      a21 = load(first + low_first + k) * left, a22 = load(second + low_second + k) * right;
    raise(most, a11), raise(most, a12), raise(most, a21), raise(most, a22);
    store_left_factors(to + k, p.product_step, a11, a12, a21, a22);
  }
}

// ------------------------------------------------------------------------------- products

// Where a product goes: to one or two of C11, C12, C21, C22, whose first one brings the start.
struct Place {
  bool low, right, first, minus;
};
struct Places {
  int count;
  Place at[2];
};
constexpr Places kPlaces[kStrassenProducts] = {
    {2, {{false, false, true, false}, {true, true, true, false}}},     // M1: C11, C22
    {2, {{true, false, true, false}, {true, true, false, true}}},      // M2: C21, -C22
    {2, {{false, true, true, false}, {true, true, false, false}}},     // M3: C12, C22
    {2, {{false, false, false, false}, {true, false, false, false}}},  // M4: C11, C21
    {2, {{false, true, false, false}, {false, false, false, true}}},   // M5: C12, -C11
    {1, {{true, true, false, false}, {}}},                             // M6: C22
    {1, {{false, false, false, false}, {}}},                           // M7: C11
};

template <bool Minus, int... I>
NNARCH_INLINE void add_to(Indices<I...>, T* c, int64_t c_step, const T* from, int64_t from_step,
                          const V* left, const V* right) {
  const auto sum = [](V a, V b) NNARCH_INLINE_LAMBDA { return Minus ? a - b : a + b; };
  EvenRows<T> to(c, c_step), held(from, from_step);
  to.pin(), held.pin();
  ((store(to.row<I>(), sum(load(held.row<I>()), left[I])),
    store(to.row<I>() + w, sum(load(held.row<I>() + w), right[I]))),
   ...);
}

// The sums of product m of some pairs with one panel go where they belong.
template <int... I>
NNARCH_INLINE void place(Indices<I...> each, const PairProduct<T>& p, int m, int64_t panel,
                         int64_t pair, bool starts, const V* left, const V* right) {
  for (int n = 0; n < kPlaces[m].count; ++n) {
    const Place& at = kPlaces[m].at[n];
    T* c = p.c + pair * p.c_step + (at.low ? p.c_low : 0) + (at.right ? p.c_right : 0) +
           panel * kColumns<T>;
    const T* start = (at.right ? p.start_right : p.start) + panel * kColumns<T>;
    const bool first = starts && at.first;
    if (at.minus)
      add_to<true>(each, c, p.c_step, c, p.c_step, left, right);
    else
      add_to<false>(each, c, p.c_step, first ? start : c, first ? 0 : p.c_step, left, right);
  }
}

// Product m of some pairs with one panel: tile `i` of `all`, each of which fetches its share of the
// next product's weights. Long sums are cut, as in convolutions by pairs.
template <bool Ahead, int... I>
NNARCH_INLINE void tile(Indices<I...> each, const PairProduct<T>& p, int m, int64_t panel,
                        int64_t pair, int64_t i, int64_t all) {
  constexpr int64_t longest = 256;
  constexpr int height = sizeof...(I);
  const int64_t size = p.depth * kColumns<T>, parts = (p.depth + longest - 1) / longest;
  const T* b = p.b + (panel * kStrassenProducts + m) * size;
  AheadLines<T> ahead{b + size + size / all / kLine<T> * kLine<T> * i};
  EvenRows<T> rows(p.a + m * p.product_step + pair * p.pair_step, p.pair_step);
  for (int64_t part = 0; part < parts; ++part) {
    V left[height] = {(static_cast<void>(I), V{})...};
    V right[height] = {(static_cast<void>(I), V{})...};
    const int64_t depth = p.depth * (part + 1) / parts - p.depth * part / parts;
    add_products<T, Ahead>(each, rows, depth, b, ahead, left, right);
    place(each, p, m, panel, pair, part == 0, left, right);
  }
}

template <bool Ahead, int MR>
NNARCH_NOINLINE void tiles(const PairProduct<T>& p, int m, int64_t panel, int64_t pair,
                           int64_t first, int64_t last, int64_t all) {
  for (int64_t i = first; i < last; ++i, pair += MR)
    tile<Ahead>(MakeIndices<MR>{}, p, m, panel, pair, i, all);
}

using Tiles = void (*)(const PairProduct<T>&, int, int64_t, int64_t, int64_t, int64_t, int64_t);
template <bool Ahead, int... I>
NNARCH_INLINE Tiles tiles_of(Indices<I...>, int64_t height) {
  static constexpr Tiles of[] = {tiles<Ahead, I + 1>...};
  return of[height - 1];
}

}  // namespace

float pair_factors(const PairFactors<T>& p) {
  Magnitudes most{};
  for (int64_t pair = 0; pair < p.pairs; ++pair)
    if (p.pairs + pair < p.rows)
      factors_of_pair<true>(p, pair, most);
    else
      factors_of_pair<false>(p, pair, most);
  int largest = 0;
  for (int i = 0; i < w; ++i) largest = most[i] > largest ? most[i] : largest;
  return __builtin_bit_cast(float, largest);
}

void pair_product(const PairProduct<T>& p) {
  const int64_t count = (p.pairs + kRows - 1) / kRows;
  const int64_t height = p.pairs / count, taller = p.pairs % count;
  const auto of = [&](int64_t rows) {
    return p.fetches_weights ? tiles_of<true>(MakeIndices<kRows>{}, rows)
                             : tiles_of<false>(MakeIndices<kRows>{}, rows);
  };
  for (int64_t panel = 0; panel < p.panels; ++panel)
    for (int m = 0; m < kStrassenProducts; ++m) {
      fetch(p.ahead, panel * kStrassenProducts + m, p.panels * kStrassenProducts);
      if (taller > 0) of(height + 1)(p, m, panel, 0, 0, taller, count);
      of(height)(p, m, panel, taller * (height + 1), taller, count, count);
    }
}

}  // namespace nnarch::NNARCH_ISA
