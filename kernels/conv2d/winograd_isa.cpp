// Winograd's transforms for 3 × 3 taps, and the two matrix products between transforms.
#include "conv2d/winograd.h"

#include "conv2d/winograd_transforms_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

#if defined(NNARCH_ISA_avx512)
constexpr int kRows = 14, kUnrolled = 1;
// Rows that read a panel as fast as memory gives it: all of a plane that has no more, and the first
// of one that has up to kRows (reading_rows).
constexpr int kReaders = 7, kFirstReaders = 4;
#else
constexpr int kRows = 6, kUnrolled = 4;  // steps at once: 2 % at 6 rows
constexpr int kReaders = 4, kFirstReaders = 0;
#endif

// c = or += the accumulators, whose indices are constants everywhere, or they would be in memory.
template <bool Half, int... I>
NNARCH_INLINE void put(V* left, V* right, float* c, int64_t step, bool add) {
  if (add) {
    ((left[I] += load(c + I * step)), ...);
    if constexpr (!Half) ((right[I] += load(c + I * step + kWidth)), ...);
  }
  ((store(c + I * step, left[I])), ...);
  if constexpr (!Half) ((store(c + I * step + kWidth, right[I])), ...);
}

// How the lines that come next are asked for, one or two a step. Those that several steps ask for
// come into the first-level cache, where asking again ends. Listed ones, too: one a step, so some
// are left out where there are more.
enum class Fetch { nothing, line, two_lines, line_again, two_lines_again, listed };
constexpr bool asks_two(Fetch f) { return f == Fetch::two_lines || f == Fetch::two_lines_again; }
constexpr bool asks_again(Fetch f) { return f == Fetch::line_again || f == Fetch::two_lines_again; }

template <Fetch F>
NNARCH_INLINE void fetch(const float* first, const float* second) {
  constexpr int level = asks_again(F) ? 3 : 2;
  if constexpr (F != Fetch::nothing) __builtin_prefetch(first, 0, level);
  if constexpr (asks_two(F)) __builtin_prefetch(second, 0, level);
}

// Lines that come into cache while tiles are multiplied: of every tile its share of the panel that
// follows, or of a part of that, and its rows of the values that do. In the first of several tiles
// alone, all of the panel would be more than a core can wait for.
struct Ahead {
  const float *panel, *rows;
  int64_t share, panel_stride, rows_stride;
  Fetch fetch;
  const float* line_data;
  const int64_t* line_offsets;
  uint64_t lines_a_tile = 0, lines_a_step = 0;  // in 2^-32

  // `tiles` of at most `height` rows and `count` steps.
  NNARCH_INLINE Ahead(const PanelProduct& p, int64_t tiles, int64_t height, int64_t count,
                      int64_t part = 1)
      : rows(p.a_next),
        share(p.depth * 2 * kWidth / (part * p.shares * tiles)),
        panel_stride(share / count),
        rows_stride(rows ? height * p.a_step / count : 0),
        line_data(p.lines.data),
        line_offsets(p.lines.offsets) {
    panel = p.b + p.depth * 2 * kWidth + p.share * tiles * share;
    const bool two = rows || part * p.shares * tiles == 1, again = !p.far && panel_stride < 12;
    fetch = two ? (again ? Fetch::two_lines_again : Fetch::two_lines)
                : (again ? Fetch::line_again : Fetch::line);
    if (line_data) ask_for_lines(static_cast<uint64_t>(p.lines.count), tiles, count);
  }

  NNARCH_INLINE void ask_for_lines(uint64_t lines, int64_t tiles, int64_t count) {
    fetch = lines > 0 ? Fetch::listed : Fetch::nothing;
    lines_a_tile = (lines << 32) / static_cast<uint64_t>(tiles);
    lines_a_step = lines_a_tile / static_cast<uint64_t>(count);
  }
};

// The register tile's rows are a constant distance apart, so a few registers address them all. The
// bases are opaque, or GCC would keep a pointer for every row. `Half`: the left vector only.
template <bool Half, Fetch F, int... I>
NNARCH_INLINE void panel_tile(Indices<I...>, const PanelProduct& p, int64_t row, int64_t from,
                              int64_t count, const Ahead& ahead, int64_t tile) {
  const int64_t step = p.a_step, first_stride = ahead.panel_stride;
  const float* first = ahead.panel + tile * ahead.share;
  const float* second = ahead.rows ? ahead.rows + row * step : first + kWidth;
  const int64_t second_stride = ahead.rows ? ahead.rows_stride : first_stride;
  uint64_t line = ahead.lines_a_tile * static_cast<uint64_t>(tile);
  const float* a0 = p.a + row * step + from;
  const float* a7 = a0 + 7 * step;
  const float* b = p.b + from * 2 * kWidth;
  V left[sizeof...(I)] = {(static_cast<void>(I), V{})...};
  V right[sizeof...(I)] = {(static_cast<void>(I), V{})...};
#pragma GCC unroll kUnrolled
  for (int64_t k = 0; k < count; ++k) {
    asm("" : "+r"(a0), "+r"(a7));
    if constexpr (F == Fetch::listed) {
      __builtin_prefetch(ahead.line_data + ahead.line_offsets[line >> 32], 0, 3);
      line += ahead.lines_a_step;
    } else {
      fetch<F>(first, second);
      first += first_stride;
      if constexpr (asks_two(F)) second += second_stride;
    }
    V b0 = load(b), b1, x;
    keep_in_register(b0);
    if constexpr (Half) {
      ((left[I] += broadcast(I < 7 ? a0[I * step] : a7[(I - 7) * step]) * b0), ...);
    } else {
      b1 = load(b + kWidth);
      keep_in_register(b1);
      ((x = broadcast(I < 7 ? a0[I * step] : a7[(I - 7) * step]), left[I] += x * b0,
        right[I] += x * b1),
       ...);
    }
    ++a0, ++a7, b += 2 * kWidth;
  }
  put<Half, I...>(left, right, p.c + row * p.c_step, p.c_step, p.add || from > 0);
}

// c of `Rows` rows by two vectors, or one with `Half`, of `depth` terms from `from` on.
template <bool Half, int... I>
NNARCH_INLINE void outer_tile(Indices<I...>, const OuterProduct& p, int64_t row, int64_t column,
                              int64_t from, int64_t depth) {
  const float* a = p.a + row + from * p.a_step;
  const float* b = p.b + column + from * p.b_step;
  V left[sizeof...(I)] = {(static_cast<void>(I), V{})...};
  V right[sizeof...(I)] = {(static_cast<void>(I), V{})...};
  for (int64_t k = 0; k < depth; ++k, a += p.a_step, b += p.b_step) {
    V b0 = load(b), b1, x;
    keep_in_register(b0);
    if constexpr (Half) {
      ((left[I] += broadcast(a[I]) * b0), ...);
    } else {
      b1 = load(b + kWidth);
      keep_in_register(b1);
      ((x = broadcast(a[I]), left[I] += x * b0, right[I] += x * b1), ...);
    }
  }
  put<Half, I...>(left, right, p.c + row * p.c_step + column, p.c_step, p.add || from > 0);
}

#if defined(NNARCH_ISA_avx512)
// Fewer rows, whose chains are added up in registers: adding each to memory took a 14th of the
// weight's gradient with stride 2, whose chains are 32 terms. 14 sums and 14 totals are 28 of 32.
constexpr int kChainRows = 7;
constexpr int64_t kChainDepth = 128;  // of a panel that stays in L1 for all tiles of rows

template <int... I>
NNARCH_INLINE void panel_chains(Indices<I...>, const PanelProduct& p, int64_t row,
                                const Ahead& ahead, int64_t tile) {
  const int64_t step = p.a_step, stride = ahead.panel_stride;
  const float* fetched = ahead.panel + tile * ahead.share;
  const float* a = p.a + row * step;
  const float* b = p.b;
  V left_total[sizeof...(I)] = {(static_cast<void>(I), V{})...};
  V right_total[sizeof...(I)] = {(static_cast<void>(I), V{})...};
  const int64_t chains = (p.depth + p.chain - 1) / p.chain;
  for (int64_t i = 0; i < chains; ++i) {
    const float* const end = p.b + p.depth * (i + 1) / chains * 2 * kWidth;
    V left[sizeof...(I)] = {(static_cast<void>(I), V{})...};
    V right[sizeof...(I)] = {(static_cast<void>(I), V{})...};
#pragma GCC unroll 1
    for (; b != end; ++a, b += 2 * kWidth) {
      asm("" : "+r"(a));
      fetch<Fetch::two_lines_again>(fetched, fetched + kWidth);
      fetched += stride;
      V b0 = load(b), b1 = load(b + kWidth), x;
      keep_in_register(b0);
      keep_in_register(b1);
      ((x = broadcast(a[I * step]), left[I] += x * b0, right[I] += x * b1), ...);
    }
    ((left_total[I] += left[I], right_total[I] += right[I]), ...);
  }
  put<false, I...>(left_total, right_total, p.c + row * p.c_step, p.c_step, p.add);
}

template <int... I>
NNARCH_INLINE void outer_chains(Indices<I...>, const OuterProduct& p, int64_t row, int64_t column) {
  const float* a = p.a + row;
  const float* b = p.b + column;
  V left_total[sizeof...(I)] = {(static_cast<void>(I), V{})...};
  V right_total[sizeof...(I)] = {(static_cast<void>(I), V{})...};
  const int64_t chains = (p.depth + p.chain - 1) / p.chain;
  for (int64_t i = 0; i < chains; ++i) {
    V left[sizeof...(I)] = {(static_cast<void>(I), V{})...};
    V right[sizeof...(I)] = {(static_cast<void>(I), V{})...};
#pragma GCC unroll 1
    for (int64_t k = p.depth * (i + 1) / chains - p.depth * i / chains; k > 0;
         --k, a += p.a_step, b += p.b_step) {
      V b0 = load(b), b1 = load(b + kWidth), x;
      keep_in_register(b0);
      keep_in_register(b1);
      ((x = broadcast(a[I]), left[I] += x * b0, right[I] += x * b1), ...);
    }
    ((left_total[I] += left[I], right_total[I] += right[I]), ...);
  }
  put<false, I...>(left_total, right_total, p.c + row * p.c_step + column, p.c_step, p.add);
}

template <int Rows>
NNARCH_NOINLINE void panel_chains_of(const PanelProduct& p, int64_t row, const Ahead& ahead,
                                     int64_t tile) {
  panel_chains(MakeIndices<Rows>{}, p, row, ahead, tile);
}
template <int Rows>
NNARCH_NOINLINE void outer_chains_of(const OuterProduct& p, int64_t row, int64_t column) {
  outer_chains(MakeIndices<Rows>{}, p, row, column);
}
template <int... I>
NNARCH_INLINE auto panel_chains_with(Indices<I...>, int64_t rows) {
  static constexpr decltype(&panel_chains_of<1>) tiles[] = {panel_chains_of<I + 1>...};
  return tiles[rows - 1];
}
template <int... I>
NNARCH_INLINE auto outer_chains_with(Indices<I...>, int64_t rows) {
  static constexpr decltype(&outer_chains_of<1>) tiles[] = {outer_chains_of<I + 1>...};
  return tiles[rows - 1];
}
#endif

template <bool Half, Fetch F, int Rows>
NNARCH_NOINLINE void panel_tile_of(const PanelProduct& p, int64_t row, int64_t from, int64_t count,
                                   const Ahead& ahead, int64_t tile) {
  panel_tile<Half, F>(MakeIndices<Rows>{}, p, row, from, count, ahead, tile);
}
template <bool Half, int Rows>
NNARCH_NOINLINE void outer_tile_of(const OuterProduct& p, int64_t row, int64_t column) {
  const int64_t chains = p.depth > p.chain ? (p.depth + p.chain - 1) / p.chain : 1;
  for (int64_t i = 0; i < chains; ++i) {
    const int64_t from = p.depth * i / chains;
    outer_tile<Half>(MakeIndices<Rows>{}, p, row, column, from, p.depth * (i + 1) / chains - from);
  }
}

using PanelTile = void (*)(const PanelProduct&, int64_t row, int64_t from, int64_t count,
                           const Ahead&, int64_t tile);
template <bool Half, Fetch F, int... I>
NNARCH_INLINE PanelTile panel_tile_with(Indices<I...>, int64_t rows) {
  static constexpr PanelTile tiles[] = {panel_tile_of<Half, F, I + 1>...};
  return tiles[rows - 1];
}
NNARCH_INLINE PanelTile panel_tile_with(Fetch f, bool half, int64_t rows) {
  constexpr MakeIndices<kRows> each;
  if (f == Fetch::nothing || (half && f == Fetch::listed))
    return half ? panel_tile_with<true, Fetch::nothing>(each, rows)
                : panel_tile_with<false, Fetch::nothing>(each, rows);
  if (half) return panel_tile_with<true, Fetch::two_lines_again>(each, rows);
  switch (f) {
    case Fetch::line:
      return panel_tile_with<false, Fetch::line>(each, rows);
    case Fetch::two_lines:
      return panel_tile_with<false, Fetch::two_lines>(each, rows);
    case Fetch::line_again:
      return panel_tile_with<false, Fetch::line_again>(each, rows);
    case Fetch::listed:
      return panel_tile_with<false, Fetch::listed>(each, rows);
    default:
      return panel_tile_with<false, Fetch::two_lines_again>(each, rows);
  }
}
template <bool Half, int... I>
NNARCH_INLINE auto outer_tile_with(Indices<I...>, int64_t rows) {
  static constexpr decltype(&outer_tile_of<Half, 1>) tiles[] = {outer_tile_of<Half, I + 1>...};
  return tiles[rows - 1];
}

// f(first, count) for tiles of nearly equal height.
template <int Most = kRows, class F>
NNARCH_INLINE void for_row_tiles(int64_t rows, const F& f) {
  const int64_t tiles = (rows + Most - 1) / Most;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles;
    f(first, rows * (t + 1) / tiles - first);
  }
}

// Tiles of nearly equal height; at most so many rows.
constexpr int64_t tiles_of(int64_t rows, int64_t most) { return (rows + most - 1) / most; }

// How many rows, alone at first, read the panel from where it is. A core has some 20 steps of a
// tile under way: of few rows those reach as many lines ahead as memory can serve, in the order
// that the hardware follows, and instructions that ask for others would break it. Of more rows they
// do not reach far enough. A far last-level cache (`far`) brings what it is asked for early.
NNARCH_INLINE int64_t reading_rows(const PanelProduct& p) {
  if (p.far || p.shares > 1 || p.lines.data) return 0;
  return p.rows <= kReaders ? p.rows : p.rows <= kRows ? kFirstReaders : 0;
}

// A longer chain of additions loses accuracy: one of 1024 has three times the error of its parts.
void panel_product(const PanelProduct& p) {
  if (p.rows <= 0 || p.depth <= 0) return;
  int64_t done = 0;
#if defined(NNARCH_ISA_avx512)
  if (p.depth > p.chain && p.depth <= kChainDepth && p.columns > kWidth) {
    const Ahead ahead(p, tiles_of(p.rows, kChainRows), kChainRows, p.depth);
    return for_row_tiles<kChainRows>(p.rows, [&](int64_t row, int64_t rows) {
      panel_chains_with(MakeIndices<kChainRows>{}, rows)(p, row, ahead, done++);
    });
  }
#endif
  const int64_t chains = (p.depth + p.chain - 1) / p.chain, readers = reading_rows(p);
  const int64_t rest = p.rows - readers, tiles = rest > 0 ? tiles_of(rest, kRows) : 1;
  const Ahead ahead(p, chains * tiles, rest / tiles + 1, p.depth / chains + 1, readers ? 4 : 1);
  const bool half = p.columns <= kWidth;
  for (int64_t i = 0; i < chains; ++i) {
    const int64_t from = p.depth * i / chains, count = p.depth * (i + 1) / chains - from;
    if (readers) panel_tile_with(Fetch::nothing, half, readers)(p, 0, from, count, ahead, 0);
    for_row_tiles(rest, [&](int64_t row, int64_t rows) {
      panel_tile_with(ahead.fetch, half, rows)(p, readers + row, from, count, ahead, done++);
    });
  }
}

void outer_product(const OuterProduct& p) {
  for (int64_t column = 0; column < p.columns; column += 2 * kWidth) {
#if defined(NNARCH_ISA_avx512)
    if (p.depth > p.chain && p.columns - column > kWidth) {
      for_row_tiles<kChainRows>(p.rows, [&](int64_t row, int64_t rows) {
        outer_chains_with(MakeIndices<kChainRows>{}, rows)(p, row, column);
      });
      continue;
    }
#endif
    for_row_tiles(p.rows, [&](int64_t row, int64_t rows) {
      const bool half = p.columns - column <= kWidth;
      const auto tile = half ? outer_tile_with<true>(MakeIndices<kRows>{}, rows)
                             : outer_tile_with<false>(MakeIndices<kRows>{}, rows);
      tile(p, row, column);
    });
  }
}

}  // namespace

const WinogradTable& winograd_table() {
  static constexpr WinogradTable table = {2 * kWidth,
                                          kRows,
                                          kReaders,
                                          all_transforms<2, 3>,
                                          all_transforms<4, 3>,
                                          all_transforms<5, 3>,
                                          all_transforms<6, 3>,
                                          panel_product,
                                          outer_product};
  return table;
}

}  // namespace nnarch::NNARCH_ISA
