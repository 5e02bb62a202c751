// The register tile of the matrix product: up to kRows rows by two vectors of columns, every
// accumulator in a register. For gemm_isa.cpp.
//
// The cost of a tile beside its multiplications is what decides with few channels: 1800 cycles of
// FMAs at depth 64. It was 150 cycles: fetching C's lines in one burst, a pointer for every row, a
// call for every tile, all bounds before all stores. Without these it was 75, of it
// 48 for stores one after the other (kLastStepsOf).
#pragma once

#include "cpu/gemm_ahead_isa.h"
#include "cpu/gemm_step_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

// How many last steps are left for the halves of a tile.
template <Finish How, Used Use, int Rows>
constexpr int kStaggered = How != kAnyFinish && Use == kBothVectors ? kLastStepsOf<Rows> : 0;

// Where a tile's products stand before its last steps.
template <class T>
struct LastSteps {
  EvenRows<T> rows;
  const T* b;
  EvenLines<T> line;
  int64_t second;
  bool some;  // whether there are any
};

// Sums of the steps so far, put aside in memory: see GemmBlock's longest_sum.
template <class T, int Rows>
struct Aside {
  alignas(kVectorBytes) T sums[Rows * kColumns<T>];
  bool any = false;

  NNARCH_INLINE Aside() {
    asm("" : "=m"(sums));  // GCC would warn that they may be read before they are written
  }
  template <int... I>
  NNARCH_INLINE void put(Indices<I...> each, Vec<T>* left, Vec<T>* right) {
    constexpr int w = kLanes<T>;
    add_to(each, left, right);
    any = true;
    ((store(sums + I * 2 * w, left[I]), store(sums + I * 2 * w + w, right[I]), left[I] = Vec<T>{},
      right[I] = Vec<T>{}),
     ...);
  }
  template <int... I>
  NNARCH_INLINE void add_to(Indices<I...>, Vec<T>* left, Vec<T>* right) const {
    constexpr int w = kLanes<T>;
    if (any) ((left[I] += load(sums + I * 2 * w), right[I] += load(sums + I * 2 * w + w)), ...);
  }
};

// The products of a tile of even rows, but for the last steps where its rows are stored by halves.
// While its first steps run, the lines of C that it will write come into cache, then those of the
// residual, then what is `ahead`.
template <class T, Finish How, Used Use, int... I>
NNARCH_INLINE LastSteps<T> add_products(Indices<I...> each, const EvenPanel<T>& p,
                                        Ahead<T>& rows_ahead, Ahead<T>& panel_ahead, const T* a,
                                        const T* c, const T* residual, Vec<T>* left,
                                        Vec<T>* right) {
  constexpr int64_t staggered = kStaggered<How, Use, sizeof...(I)>;
  const T* b = p.b;
  const T* lines = p.stream ? residual : c;
  const int64_t* tap = p.first_tap;
  const int64_t turn = steps_of_turn(p.last_tap - p.first_tap, p.count);
  constexpr bool cuts = cuts_sums(How);
  Aside<T, cuts ? sizeof...(I) : 1> aside;
  const int64_t* part = p.first_tap + p.part;  // the end of a running sum
  while (true) {
    EvenRows<T> rows(a + *tap, p.a_step);
    const bool last_tap = ++tap == p.last_tap;
    const int64_t kept = last_tap && p.count >= staggered ? staggered : 0;
    EvenLines<T> line{b, 0};  // in cache anyway
    int64_t second = 0;
    for (int64_t k = cuts && !last_tap ? p.first_count : p.count; k > kept; k -= turn) {
      const int64_t steps = k - kept < turn ? k - kept : turn;
      line = {b, 0}, second = 0;
      if (lines) {
        line = {lines, How == kPlainFetching ? p.lines_step : p.c_step}, second = kColumns<T> - 1;
        lines = lines == residual ? nullptr : residual;
      } else if (rows_ahead.turns > 0) {
        line = rows_ahead.turn(), second = rows_ahead.second;
      } else if (panel_ahead.is_due()) {
        line = panel_ahead.turn(), second = panel_ahead.second;
      }
      multiply<T, Use>(each, rows, 0, steps, b, line, second, left, right);
      if constexpr (staggered > 0) line.at += steps * line.stride;
    }
    if (last_tap) {
      if constexpr (cuts) aside.add_to(each, left, right);
      return {rows, b, line, second, kept > 0};
    }
    if constexpr (cuts)
      if (tap == part) aside.put(each, left, right), part += p.part;
  }
}

// Whether all rows of a tile lie in the padding.
template <class T, int... I>
NNARCH_INLINE bool in_padding(Indices<I...>, const T* const* at, const T* zeros) {
  return at[0] == zeros && ((at[I] == zeros) && ...);
}

// Lines of C for rows [m + first, m + last) of a tile.
template <class T>
NNARCH_INLINE void fetch_rows(const Panel<T>& p, int64_t m, int64_t first, int64_t last) {
  for (int64_t i = m + first; i < m + last; ++i) {
    const T* c = p.c + p.g.c_offset[i];
    __builtin_prefetch(c);
    __builtin_prefetch(c + kColumns<T> - 1);
  }
}

// The same for rows anywhere; `m` is the first of them. Each tap fetches a few lines of C, and in
// the first panel the rows that the next tile will read.
template <class T, Used Use, int... I>
NNARCH_INLINE void add_products(Indices<I...> each, const Panel<T>& p, Ahead<T>& next_panel,
                                int64_t m, Vec<T>* left, Vec<T>* right) {
  constexpr int64_t mr = sizeof...(I);
  const Chunk& chunk = p.chunk;
  const int64_t taps = chunk.last_tap - chunk.first_tap;
  const bool next_rows = p.meets_rows && m + mr + kFetchSteps <= p.g.m;
  const T* b = p.b;
  Aside<T, mr> aside;
  const int64_t half = taps == 1 && chunk.count > p.g.longest_sum ? chunk.count / 2 : chunk.count;
  const int64_t part = taps_of_part(p.g, chunk);
  for (int64_t i = 0; i < taps; ++i) {
    if (i > 0 && i % part == 0) aside.put(each, left, right);
    const T* const* at = p.g.rows + (chunk.first_tap + i) * p.g.row_stride + m;
    if (p.whole() && !p.stream) fetch_rows(p, m, mr * i / taps, mr * (i + 1) / taps);
    if (in_padding<T>(each, at, p.g.zeros)) {
      b += chunk.count * kColumns<T>;
      continue;
    }
    AnyRows<T, mr> rows{{(at[I] + chunk.from)...}};
    int64_t k = 0;
    for (int64_t column = 0; next_rows && k + kFetchSteps <= chunk.count && column < chunk.count;
         k += kFetchSteps, column += 2 * kLine<T>)
      multiply<T, Use>(each, rows, k, kFetchSteps, b, ListedLines<T>{at + mr, chunk.from + column},
                       kLine<T>, left, right);
    for (; k < chunk.count; k += kFetchSteps) {
      const int64_t steps = chunk.count - k < kFetchSteps ? chunk.count - k : kFetchSteps;
      if (k >= half && !aside.any) aside.put(each, left, right);
      const bool fetch = next_panel.is_due();
      const int64_t second = fetch ? next_panel.second : 0;
      const EvenLines<T> line = fetch ? next_panel.turn() : EvenLines<T>{b, 0};
      multiply<T, Use>(each, rows, k, steps, b, line, second, left, right);
    }
  }
  aside.add_to(each, left, right);
}

// All that may follow the products: what C holds is added, then the epilogue. `offset` is where
// the rows of C start.
template <class T, int... I>
NNARCH_INLINE void finish(Indices<I...> each, const Panel<T>& p, const int64_t* offset,
                          Vec<T>* left, Vec<T>* right) {
  constexpr int w = kLanes<T>;
  T* c = p.c;
  const int64_t n0 = p.columns < w ? p.columns : w, n1 = p.columns > w ? p.columns - w : 0;
  // Added last: the rounding error of a running sum grows with its length, so chunks start anew.
  if (p.add && p.whole()) {
    ((left[I] += load(c + offset[I]), right[I] += load(c + offset[I] + w)), ...);
  } else if (p.add) {
    ((left[I] += load_n(c + offset[I], n0), right[I] += load_n(c + offset[I] + w, n1)), ...);
  }
  if (p.chunk.last) apply_epilogue<T>(each, p.epilogue, offset, p.columns, left, right);
  if (p.chunk.last && !is_clamp(p.epilogue.activation)) {
    alignas(kVectorBytes) T sums[sizeof...(I) * kColumns<T>];
    ((store(sums + I * kColumns<T>, left[I]), store(sums + I * kColumns<T> + w, right[I])), ...);
    activate_tile<T>(p.epilogue, sums, c, offset, sizeof...(I), p.columns, p.stream);
  } else if (p.stream) {
    ((stream(c + offset[I], left[I]), stream(c + offset[I] + w, right[I])), ...);
  } else if (p.whole()) {
    ((store(c + offset[I], left[I]), store(c + offset[I] + w, right[I])), ...);
  } else {
    ((store_n(c + offset[I], left[I], n0), store_n(c + offset[I] + w, right[I], n1)), ...);
  }
}

// A row of the common case: whole vectors, perhaps a residual, which lies as C does, and bounds. It
// is stored before the next one is bounded, in this order and with these few instructions: with all
// bounds before all stores the next tile starts 40 cycles later.
template <class T, bool Stream, bool Residual = false>
NNARCH_INLINE void store_row(T* c, const ClampBounds<T>& bounds, Vec<T> left, Vec<T> right,
                             int64_t to_residual = 0) {
  constexpr int w = kLanes<T>;
  keep_order(c, left, right);
  if constexpr (Residual) left += load(c + to_residual), right += load(c + to_residual + w);
  left = clamp<T>(left, bounds.low, bounds.high), right = clamp<T>(right, bounds.low, bounds.high);
  if constexpr (Stream) {
    stream(c, left), stream(c + w, right);
  } else {
    store(c, left), store(c + w, right);
  }
}

template <class T, bool Residual, int First, int... I>
NNARCH_INLINE void store_rows(Indices<I...>, const EvenRows<T>& to, bool past_caches,
                              const ClampBounds<T>& bounds, const Vec<T>* left, const Vec<T>* right,
                              int64_t to_residual) {
  if (past_caches)
    (store_row<T, true, Residual>(to.template row<First + I>(), bounds, left[First + I],
                                  right[First + I], to_residual),
     ...);
  else
    (store_row<T, false, Residual>(to.template row<First + I>(), bounds, left[First + I],
                                   right[First + I], to_residual),
     ...);
}

// The residual lies `to_residual` elements from C.
template <class T, Finish How, Used Use, int... I>
NNARCH_INLINE void finish_plain(Indices<I...> each, const EvenPanel<T>& p, LastSteps<T>& last, T* c,
                                int64_t to_residual, Vec<T>* left, Vec<T>* right) {
  EvenRows<T> to(c, p.c_step);
  to.pin();
  const ClampBounds<T> bounds = p.bounds;
  constexpr bool adds = How == kPlainResidual;
  constexpr int rows = sizeof...(I), half = (rows + 1) / 2;
  if constexpr (kStaggered<How, Use, rows> > 0) {
    constexpr MakeIndices<half> first;
    constexpr MakeIndices<rows - half> second;
    const auto fetch = [&]() NNARCH_INLINE_LAMBDA {
      const T* fetched = last.line.next();
      __builtin_prefetch(fetched);
      __builtin_prefetch(fetched + last.second);
    };
    if (last.some) multiply_last<T, 0>(first, last.rows, last.b, fetch, left, right);
    store_rows<T, adds, 0>(first, to, p.stream, bounds, left, right, to_residual);
    if (last.some) multiply_last<T, half>(second, last.rows, last.b, [] {}, left, right);
    store_rows<T, adds, half>(second, to, p.stream, bounds, left, right, to_residual);
  } else {
    store_rows<T, adds, 0>(each, to, p.stream, bounds, left, right, to_residual);
  }
}

// Tiles of one height, one after the other.
template <class T>
struct EvenTiles {
  const T* source;  // their first row of A
  T* room;          // where it is copied to first, or null
  int64_t c;        // offset of their first row of C
  int64_t count;
  const T* after;  // the row of A that follows them
};

// What was fetched during the tile before waits in cache.
template <class T>
NNARCH_NOINLINE void copy_rows(const T* from, int64_t from_step, int64_t rows, int64_t count, T* to,
                               int64_t to_step) {
  constexpr int64_t w = kLanes<T>;
  const int64_t whole = count / w * w;
  for (int64_t r = 0; r < rows; ++r, from += from_step, to += to_step) {
    for (int64_t k = 0; k < whole; k += w) {
      __builtin_prefetch(from + from_step + k);  // a page of its own
      store(to + k, load(from + k));
    }
    if (whole < count) store_n(to + whole, load_n(from + whole, count - whole), count - whole);
  }
}

// Every access to an accumulator has a constant index, or GCC would keep them in memory.
template <class T, Finish How, Used Use, int... I>
NNARCH_INLINE void even_tiles(Indices<I...> each, const Panel<T>& panel, Ahead<T>& next_panel,
                              const EvenTiles<T>& run) {
  constexpr int64_t rows = sizeof...(I);
  const GemmBlock<T>& g = panel.g;
  const Chunk& chunk = panel.chunk;
  const int64_t taps = chunk.last_tap - chunk.first_tap;
  // Two halves of a tap are two taps.
  const bool halves = cuts_sums(How) && taps == 1 && chunk.count > g.longest_sum;
  const int64_t first_half = halves ? chunk.count / 2 : 0;
  const int64_t half_taps[2] = {g.tap_offset ? g.tap_offset[chunk.first_tap] : 0,
                                half_taps[0] + first_half};
  const int64_t* tap = g.tap_offset && !halves ? g.tap_offset + chunk.first_tap : half_taps;
  const EvenPanel<T> p = {panel.b,
                          tap,
                          tap + (halves ? 2 : taps),
                          halves ? 1 : taps_of_part(g, chunk),
                          halves ? first_half : chunk.count,
                          chunk.count - first_half,
                          panel.a_step,
                          g.c_step,
                          g.fetched_step,
                          panel.bounds,
                          panel.stream};
  const T *source = run.source, *a = run.room ? run.room : source;
  int64_t at = run.c;
  const T* lines = nullptr;
  if constexpr (How == kPlainFetching)
    lines = g.fetched + (panel.c - g.c) + run.c / g.c_step * g.fetched_step;
  const bool meets_rows = panel.meets_rows && g.taps == 1;
  Ahead<T> next_rows;
  for (int64_t tiles = run.count; tiles > 0; --tiles) {
    if (meets_rows) {
      if (run.room) copy_rows(source, g.a_step, rows, chunk.count, const_cast<T*>(a), p.a_step);
      source = tiles > 1 ? source + rows * g.a_step : run.after;
      next_rows = Ahead<T>::next_rows(chunk.count, g.a_step, source);
    }
    const T* start = panel.start;
    // Loaded anew: kept, the two vectors would be spilled, and loaded as well.
    asm("" : "+r"(start));
    const Vec<T> s0 = load(start), s1 = load(start + kLanes<T>);
    Vec<T> left[rows] = {(static_cast<void>(I), s0)...};
    Vec<T> right[rows] = {(static_cast<void>(I), s1)...};
    T* c = panel.c + at;
    if constexpr (How == kPlain) {
      LastSteps<T> last =
          add_products<T, How, Use>(each, p, next_rows, next_panel, a, c, nullptr, left, right);
      finish_plain<T, How, Use>(each, p, last, c, 0, left, right);
    } else if constexpr (How == kPlainFetching) {
      const T* more = g.fetched_too ? lines + (g.fetched_too - g.fetched) : nullptr;
      LastSteps<T> last =
          add_products<T, How, Use>(each, p, next_rows, next_panel, a, lines, more, left, right);
      lines += rows * g.fetched_step;
      finish_plain<T, How, Use>(each, p, last, c, 0, left, right);
    } else if constexpr (How == kPlainResidual) {
      const T* residual = panel.epilogue.residual + at;
      LastSteps<T> last =
          add_products<T, How, Use>(each, p, next_rows, next_panel, a, c, residual, left, right);
      finish_plain<T, How, Use>(each, p, last, c, residual - c, left, right);
    } else {
      const T* residual = panel.epilogue.residual ? panel.epilogue.residual + at : nullptr;
      add_products<T, How, Use>(each, p, next_rows, next_panel, a, c, residual, left, right);
      const int64_t offset[rows] = {(at + I * p.c_step)...};
      finish<T>(each, panel, offset, left, right);
    }
    a += rows * p.a_step;
    at += rows * p.c_step;
  }
}
template <class T, Finish How, Used Use, int MR>
NNARCH_NOINLINE void even_tiles_of(const Panel<T>& panel, Ahead<T>& next_panel,
                                   const EvenTiles<T>& run) {
  even_tiles<T, How, Use>(MakeIndices<MR>{}, panel, next_panel, run);
}

template <class T, Used Use, int... I>
NNARCH_INLINE void any_tile(Indices<I...> each, const Panel<T>& p, Ahead<T>& ahead, int64_t m) {
  const Vec<T> s0 = load(p.start), s1 = load(p.start + kLanes<T>);
  Vec<T> left[sizeof...(I)] = {(static_cast<void>(I), s0)...};
  Vec<T> right[sizeof...(I)] = {(static_cast<void>(I), s1)...};
  add_products<T, Use>(each, p, ahead, m, left, right);
  finish<T>(each, p, p.g.c_offset + m, left, right);
}

// The same for rows anywhere.
template <class T, Used Use, int MR>
NNARCH_NOINLINE void any_tiles(const Panel<T>& p, Ahead<T>& panel, int64_t first, int64_t tiles) {
  for (; tiles > 0; --tiles, first += MR) any_tile<T, Use>(MakeIndices<MR>{}, p, panel, first);
}

}  // namespace
}  // namespace nnarch::NNARCH_ISA
