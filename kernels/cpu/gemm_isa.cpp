// The matrix product: chunks of the sum, panels of columns, tiles of rows.
#include "cpu/gemm.h"

#include "cpu/few_rows_isa.h"
#include "cpu/gemm_tile_isa.h"
#include "cpu/layout.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
using RunEvenTiles = void (*)(const Panel<T>&, Ahead<T>&, const EvenTiles<T>&);
template <class T, int... I>
NNARCH_INLINE RunEvenTiles<T> select_even(Indices<I...>, const Panel<T>& p, int64_t rows) {
  static constexpr RunEvenTiles<T> plain[] = {even_tiles_of<T, kPlain, kBothVectors, I + 1>...};
  static constexpr RunEvenTiles<T> residual[] = {
      even_tiles_of<T, kPlainResidual, kBothVectors, I + 1>...};
  static constexpr RunEvenTiles<T> fetching[] = {
      even_tiles_of<T, kPlainFetching, kBothVectors, I + 1>...};
  static constexpr RunEvenTiles<T> both[] = {even_tiles_of<T, kAnyFinish, kBothVectors, I + 1>...};
  static constexpr RunEvenTiles<T> one[] = {even_tiles_of<T, kAnyFinish, kOneVector, I + 1>...};
  if (p.how == kPlain) return plain[rows - 1];
  if (p.how == kPlainResidual) return residual[rows - 1];
  if (p.how == kPlainFetching) return fetching[rows - 1];
  const Used used = used_vectors<T>(p.columns);
  if constexpr (kHasHalves) {
    static constexpr RunEvenTiles<T> more[] = {
        even_tiles_of<T, kAnyFinish, kVectorAndHalf, I + 1>...};
    if (used == kVectorAndHalf) return more[rows - 1];
  }
  return used == kOneVector ? one[rows - 1] : both[rows - 1];
}

template <class T>
using AnyTiles = void (*)(const Panel<T>&, Ahead<T>&, int64_t, int64_t);
template <class T, int... I>
NNARCH_INLINE AnyTiles<T> any_tiles_of(Indices<I...>, const Panel<T>& p, int64_t rows) {
  static constexpr AnyTiles<T> both[] = {any_tiles<T, kBothVectors, I + 1>...};
  static constexpr AnyTiles<T> one[] = {any_tiles<T, kOneVector, I + 1>...};
  return used_vectors<T>(p.columns) == kOneVector ? one[rows - 1] : both[rows - 1];
}

// The height of register tiles: see shares_a_set.
NNARCH_INLINE int64_t most_rows(uint64_t bytes_apart) {
  return kRows > 8 && bytes_apart % 4096 == 0 ? kRows / 2 : kRows;
}

// Cuts rows [begin, end) into tiles of nearly equal height: 13 rows are 5 + 4 + 4, not 6 + 6 + 1.
// Calls f(height, first row, tiles) for the taller ones and for the others.
template <class F>
NNARCH_INLINE void cut_tiles(int64_t begin, int64_t end, int64_t most, const F& f) {
  const int64_t rows = end - begin, tiles = (rows + most - 1) / most;
  if (tiles == 0) return;
  const int64_t height = rows / tiles, taller = rows % tiles;
  if (taller > 0) f(height + 1, begin, taller);
  f(height, begin + taller * (height + 1), tiles - taller);
}

template <class T>
void run_strips(const Panel<T>& p) {
  const GemmBlock<T>& g = p.g;
  const int64_t most = most_rows(static_cast<uint64_t>(p.a_step) * sizeof(T));
  int64_t rows = 0;
  for (int64_t i = 0; i < g.strip_count; ++i) rows += g.strips[i].rows;
  Ahead<T> next = Ahead<T>::next_panel(p, rows);
  T* room = g.room;
  for (int64_t i = 0; i < g.strip_count; ++i) {
    const Strip<T>& strip = g.strips[i];
    cut_tiles(0, strip.rows, most, [&](int64_t height, int64_t first, int64_t tiles) {
      const int64_t last = first + height * tiles;
      const bool next_strip = last == strip.rows && i + 1 < g.strip_count;
      const T* after = next_strip ? g.strips[i + 1].a : strip.a + last * g.a_step;
      select_even<T>(MakeIndices<kRows>{}, p, height)(
          p, next,
          {strip.a + first * g.a_step + p.chunk.from, room, strip.c + first * g.c_step, tiles,
           after + p.chunk.from});
      if (room) room += height * tiles * p.a_step;
    });
  }
}

template <class T>
void run_rows(const Panel<T>& p) {
  const GemmBlock<T>& g = p.g;
  const auto address = [&](int64_t m) { return reinterpret_cast<uintptr_t>(g.rows[m]); };
  const int64_t most = g.m < 2 ? kRows : most_rows(address(1) - address(0));
  Ahead<T> next = Ahead<T>::next_panel(p, g.m);
  for (int64_t i = 0, m = 0; i < g.segments; ++i) {
    const int64_t end = g.segment_end ? g.segment_end[i] : g.m;
    cut_tiles(m, end, most, [&](int64_t height, int64_t first, int64_t tiles) {
      any_tiles_of<T>(MakeIndices<kRows>{}, p, height)(p, next, first, tiles);
    });
    m = end;
  }
}

// All tiles of a block for one chunk of the sum: a panel of B stays in cache while the rows pass.
template <class T>
void run_panels(const GemmBlock<T>& g, const Chunk& chunk) {
  for (int64_t column = 0; column < g.n; column += kColumns<T>) {
    const Panel<T> panel(g, chunk, column);
    if (g.strips)
      run_strips(panel);
    else
      run_rows(panel);
  }
}

// Cuts the sum into chunks whose panel of B fits the cache: several taps of a small depth, or
// parts of one tap of a large depth.
template <class T>
void run_chunks(const GemmBlock<T>& g) {
  if (g.taps * g.depth <= kPartDepth<T>) return run_panels(g, {0, g.taps, 0, g.depth, true, true});
  if (g.depth <= kPartDepth<T>) {
    const int64_t most = kPartDepth<T> / g.depth, chunks = (g.taps + most - 1) / most;
    int64_t tap = 0;
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t next = (i + 1) * g.taps / chunks;
      run_panels(g, {tap, next, 0, g.depth, tap == 0, next == g.taps});
      tap = next;
    }
    return;
  }
  const int64_t parts = (g.depth + kPartDepth<T> - 1) / kPartDepth<T>;
  for (int64_t tap = 0; tap < g.taps; ++tap) {
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t from = g.depth * i / parts, to = g.depth * (i + 1) / parts;
      run_panels(g, {tap, tap + 1, from, to - from, tap == 0 && i == 0,
                     tap + 1 == g.taps && i + 1 == parts});
    }
  }
}

template <class T>
void run(const GemmBlock<T>& g) {
  if ((g.m <= 0 && !g.strips) || g.n <= 0) return;
  run_chunks(g);
  if (g.stream) finish_streaming();
}

// Some columns of a matrix, `step` apart, from memory: of each the lines of 16 values. Rows of a
// few lines that lie KBs apart are more streams than the hardware follows.
template <class T>
NNARCH_INLINE void fetch_columns(const T* at, int64_t step, int64_t n) {
  constexpr auto line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < 16; i += line) __builtin_prefetch(at + j * step + i, 0, 2);
}

template <class T>
void pack_panel(const T* src, int64_t stride_k, int64_t stride_n, int64_t depth, int64_t n,
                T* dst) {
  constexpr int64_t nr = kColumns<T>;
  if (stride_n == 1) {
    for (int64_t k = 0; k < depth; ++k, src += stride_k, dst += nr) {
      store(dst, load_n(src, n < nr / 2 ? n : nr / 2));
      store(dst + nr / 2, load_n(src + nr / 2, n > nr / 2 ? n - nr / 2 : 0));
    }
    return;
  }
  int64_t k = 0;
  if (stride_k == 1) {  // columns are dense: transpose tiles in registers
    const auto transpose = transpose_kernel<T>();
    const int64_t full = depth / 16 * 16;
    if (n < nr) __builtin_memset(dst, 0, static_cast<size_t>(full * nr) * sizeof(T));
    for (; k < full; k += 16) {
      if (k + 32 < depth) fetch_columns(src + k + 32, stride_n, n);
      transpose(src + k, stride_n, dst + k * nr, nr, n, 16);
    }
  }
  for (; k < depth; ++k)
    for (int64_t j = 0; j < nr; ++j)
      dst[k * nr + j] = j < n ? src[k * stride_k + j * stride_n] : T{0};
}

template <class T>
void pack_rows(const T* const* rows, int64_t offset, int64_t depth, int64_t n, T* dst) {
  constexpr int64_t w = kLanes<T>;
  const int64_t n0 = n < w ? n : w, n1 = n > w ? n - w : 0;
  for (int64_t k = 0; k < depth; ++k, dst += 2 * w) {
    const T* from = rows[k] + offset;
    store(dst, n0 == w ? load(from) : load_n(from, n0));
    store(dst + w, n1 == w ? load(from + w) : load_n(from + w, n1));
  }
}

template <class T>
const GemmTable<T>& table() {
  static constexpr GemmTable<T> entries = {kRows,         kColumns<T>,  run<T>,
                                           pack_panel<T>, pack_rows<T>, few_rows_of<T, T>};
  return entries;
}

}  // namespace

template <>
const GemmTable<float>& gemm_table<float>() {
  return table<float>();
}
template <>
const GemmTable<double>& gemm_table<double>() {
  return table<double>();
}

}  // namespace nnarch::NNARCH_ISA
