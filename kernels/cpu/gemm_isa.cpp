// The register tile: MR rows by two vectors of columns, every accumulator in a register.
#include "cpu/gemm.h"

#include "cpu/epilogue_isa.h"
#include "cpu/layout.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {
namespace {

#if defined(NNARCH_ISA_avx512)
constexpr int kRows = 14;  // 28 accumulators, 2 vectors of B, 1 broadcast: 31 of 32 registers
#else
constexpr int kRows = 6;  // 12 accumulators, 2 vectors of B, 1 broadcast: 15 of 16 registers
#endif
template <class T>
constexpr int kColumns = 2 * kLanes<T>;

// A panel of this many B rows is read from L2 again for every tile of rows; that keeps up with the
// FMAs, and a longer sum saves loads and stores of C. Measured: 1024 floats beat what fits L1 by
// 3-8 %, and half of it by 20 % under AVX-512.
template <class T>
constexpr int64_t kPanelDepth = 4096 / static_cast<int64_t>(sizeof(T));

// The part of the sum that one pass over a block adds: taps [first, last), depth [from,
// from+count).
struct Chunk {
  int64_t first_tap, last_tap;
  int64_t from, count;
  bool first, last;
};

// left[I], right[I] += `count` products of row I with the panel's two vectors; with `Half`, with
// the left one only. Meanwhile the same part of the next panel, `next_panel` elements further,
// comes into L2: at batch 1 a network reads its weights from memory (1 % of a ResNet-50's time).
template <class T, bool Half, int... I>
NNARCH_INLINE void multiply(Indices<I...>, const T* const* a, int64_t from, int64_t count,
                            const T*& b, int64_t next_panel, Vec<T>* left, Vec<T>* right) {
  constexpr int w = kLanes<T>;
#pragma GCC unroll 4
  for (int64_t k = from; k < from + count; ++k) {
    __builtin_prefetch(b + next_panel, 0, 2);
    __builtin_prefetch(b + next_panel + w, 0, 2);
    Vec<T> b0 = load(b);
    keep_in_register(b0);
    if constexpr (Half) {
      ((left[I] += broadcast(a[I][k]) * b0), ...);
    } else {
      Vec<T> b1 = load(b + w);
      keep_in_register(b1);
      Vec<T> x;
      ((x = broadcast(a[I][k]), left[I] += x * b0, right[I] += x * b1), ...);
    }
    b += 2 * w;
  }
}

// Whether all rows of a tile lie in the padding.
template <class T, int... I>
NNARCH_INLINE bool in_padding(Indices<I...>, const T* const* at, const T* zeros) {
  return at[0] == zeros && ((at[I] == zeros) && ...);
}

// The chunk's part of the sum. With `Ahead`, the rows of the next tile come into cache meanwhile:
// a matrix product meets each row of A first in its first panel, and straight from memory.
template <class T, bool Half, bool Ahead, int... I>
NNARCH_INLINE void accumulate(Indices<I...> each, const T* const* rows, int64_t row_stride,
                              const Chunk& chunk, const T* zeros, const T* b, int64_t next_panel,
                              Vec<T>* left, Vec<T>* right) {
  for (int64_t tap = chunk.first_tap; tap < chunk.last_tap; ++tap) {
    const T* const* at = rows + tap * row_stride;
    if (in_padding<T>(each, at, zeros)) {
      b += chunk.count * kColumns<T>;
      continue;
    }
    const T* a[sizeof...(I)] = {(at[I] + chunk.from)...};
    if constexpr (Ahead) {
      constexpr int64_t line = 64 / sizeof(T);
      int64_t k = 0;
      for (; k + line <= chunk.count; k += line) {
        (__builtin_prefetch(at[sizeof...(I) + I] + chunk.from + k), ...);
        multiply<T, Half>(each, a, k, line, b, next_panel, left, right);
      }
      multiply<T, Half>(each, a, k, chunk.count - k, b, next_panel, left, right);
    } else {
      multiply<T, Half>(each, a, 0, chunk.count, b, next_panel, left, right);
    }
  }
}

template <bool ForWriting, class T, int... I>
NNARCH_INLINE void prefetch_rows(Indices<I...>, const T* c, const int64_t* offset) {
  ((__builtin_prefetch(c + offset[I], ForWriting),
    __builtin_prefetch(c + offset[I] + kColumns<T> - 1, ForWriting)),
   ...);
}

// One register tile of C: a row of it for every index, one panel of columns. Every access to an
// accumulator has a constant index, or GCC would keep them in memory.
template <class T, bool Half, int... I>
NNARCH_INLINE void tile(Indices<I...> each, const GemmBlock<T>& g, const Chunk& chunk, int64_t m,
                        const T* b, int64_t column) {
  constexpr int w = kLanes<T>;
  const int64_t* offset = g.c_offset + m;
  T* c = g.c + column;
  const int64_t columns = g.n - column;
  const bool whole = columns >= 2 * w, add = !chunk.first || g.accumulate;
  const int64_t n0 = columns < w ? columns : w, n1 = columns > w ? columns - w : 0;
  const bool alone = chunk.first && chunk.last && !g.accumulate, stream_out = alone && g.stream;
  Epilogue<T> epilogue = g.epilogue.from_channel(column);
  Vec<T> left[sizeof...(I)] = {(static_cast<void>(I), Vec<T>{})...};
  Vec<T> right[sizeof...(I)] = {(static_cast<void>(I), Vec<T>{})...};
  if (alone && epilogue.shift && !epilogue.scale) {  // the sum begins with it: one addition saved
    const Vec<T> s0 = load(epilogue.shift), s1 = load(epilogue.shift + w);
    ((left[I] = s0, right[I] = s1), ...);
    epilogue.shift = nullptr;
  }
  if (whole) {  // lines that are written or added come into cache while the sum is formed
    if (!stream_out) prefetch_rows<true>(each, c, offset);
    if (epilogue.residual) prefetch_rows<false>(each, epilogue.residual, offset);
  }
  const int64_t next_panel = columns > 2 * w ? g.taps * g.depth * kColumns<T> : 0;
  if (column == 0 && g.taps == 1 && m + 2 * int64_t{sizeof...(I)} <= g.m)
    accumulate<T, Half, true>(each, g.rows + m, g.row_stride, chunk, g.zeros, b, next_panel, left,
                              right);
  else
    accumulate<T, Half, false>(each, g.rows + m, g.row_stride, chunk, g.zeros, b, next_panel, left,
                               right);
  // Added last: the rounding error of a running sum grows with its length, so chunks start anew.
  if (add && whole) {
    ((left[I] += load(c + offset[I]), right[I] += load(c + offset[I] + w)), ...);
  } else if (add) {
    ((left[I] += load_n(c + offset[I], n0), right[I] += load_n(c + offset[I] + w, n1)), ...);
  }
  if (chunk.last) apply_epilogue<T>(each, epilogue, offset, columns, left, right);
  if (chunk.last && !is_clamp(epilogue.activation)) {
    alignas(kVectorBytes) T sums[sizeof...(I) * kColumns<T>];
    ((store(sums + I * kColumns<T>, left[I]), store(sums + I * kColumns<T> + w, right[I])), ...);
    activate_tile<T>(epilogue, sums, c, offset, sizeof...(I), columns, stream_out);
  } else if (whole && stream_out) {
    ((stream(c + offset[I], left[I]), stream(c + offset[I] + w, right[I])), ...);
  } else if (whole) {
    ((store(c + offset[I], left[I]), store(c + offset[I] + w, right[I])), ...);
  } else {
    ((store_n(c + offset[I], left[I], n0), store_n(c + offset[I] + w, right[I], n1)), ...);
  }
}

template <class T, bool Half, int MR>
NNARCH_NOINLINE void tile_of(const GemmBlock<T>& g, const Chunk& chunk, int64_t m, const T* b,
                             int64_t column) {
  tile<T, Half>(MakeIndices<MR>{}, g, chunk, m, b, column);
}

template <class T>
using TileFn = void (*)(const GemmBlock<T>&, const Chunk&, int64_t, const T*, int64_t);
template <class T, int... I>
NNARCH_INLINE TileFn<T> tile_with(Indices<I...>, int64_t rows, int64_t columns) {
  static constexpr TileFn<T> whole[] = {tile_of<T, false, I + 1>...};
  static constexpr TileFn<T> half[] = {tile_of<T, true, I + 1>...};
  return columns > kLanes<T> ? whole[rows - 1] : half[rows - 1];
}

// The height of register tiles. Rows of A that lie a multiple of 4 KB apart share one set of the L1
// cache, of 8 lines as a rule: 14 such rows evict each other at every step (a quarter slower).
template <class T>
NNARCH_INLINE int64_t tile_rows(const GemmBlock<T>& g) {
  if (kRows <= 8 || g.m < 2) return kRows;
  const auto apart =
      reinterpret_cast<uintptr_t>(g.rows[1]) - reinterpret_cast<uintptr_t>(g.rows[0]);
  return apart % 4096 == 0 ? kRows / 2 : kRows;
}

// Rows [begin, end) in tiles of nearly equal height: 13 rows are 4 + 4 + 5, not 6 + 6 + 1.
template <class T>
NNARCH_INLINE void run_segment(const GemmBlock<T>& g, const Chunk& chunk, int64_t begin,
                               int64_t end, const T* b, int64_t column) {
  const int64_t most = tile_rows(g), rows = end - begin, tiles = (rows + most - 1) / most;
  for (int64_t t = 0, m = begin; t < tiles; ++t) {
    const int64_t next = begin + rows * (t + 1) / tiles;
    tile_with<T>(MakeIndices<kRows>{}, next - m, g.n - column)(g, chunk, m, b, column);
    m = next;
  }
}

// All tiles of a block for one chunk of the sum: a panel of B stays in cache while the rows pass.
template <class T>
void run_chunk(const GemmBlock<T>& g, const Chunk& chunk) {
  const int64_t panel = g.taps * g.depth * kColumns<T>;
  const T* b = g.b + (chunk.first_tap * g.depth + chunk.from) * kColumns<T>;
  for (int64_t column = 0; column < g.n; column += kColumns<T>, b += panel) {
    for (int64_t i = 0, m = 0; i < g.segments; ++i) {
      const int64_t end = g.segment_end ? g.segment_end[i] : g.m;
      run_segment(g, chunk, m, end, b, column);
      m = end;
    }
  }
}

// Cuts the sum into chunks whose panel of B fits the cache: several taps of a small depth, or
// parts of one tap of a large depth.
template <class T>
void run_chunks(const GemmBlock<T>& g) {
  const int64_t total = g.taps * g.depth;
  if (total <= kPanelDepth<T> * 3 / 2) return run_chunk(g, {0, g.taps, 0, g.depth, true, true});
  if (g.depth <= kPanelDepth<T>) {
    const int64_t chunks = (total + kPanelDepth<T> - 1) / kPanelDepth<T>;
    int64_t tap = 0;
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t next = (i + 1) * g.taps / chunks;
      if (next == tap) continue;
      run_chunk(g, {tap, next, 0, g.depth, tap == 0, next == g.taps});
      tap = next;
    }
    return;
  }
  const int64_t parts = (g.depth + kPanelDepth<T> - 1) / kPanelDepth<T>;
  for (int64_t tap = 0; tap < g.taps; ++tap) {
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t from = g.depth * i / parts, to = g.depth * (i + 1) / parts;
      run_chunk(g, {tap, tap + 1, from, to - from, tap == 0 && i == 0,
                    tap + 1 == g.taps && i + 1 == parts});
    }
  }
}

template <class T>
void run(const GemmBlock<T>& g) {
  if (g.m <= 0 || g.n <= 0) return;
  run_chunks(g);
  if (g.stream) finish_streaming();
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
  if (stride_k == 1 && n == nr) {  // columns are dense: transpose tiles in registers
    const auto transpose = transpose_kernel<T>();
    const int64_t full = depth / 16 * 16;
    for (; k < full; k += 16) transpose(src + k, stride_n, dst + k * nr, nr, nr, 16);
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

// y[r] = Σ_k x[r][k]·w[k] for a few rows r, each in `Chains` independent sums.
template <class T, int Chains, int... I>
NNARCH_INLINE void dot_rows(Indices<I...>, const T* x, int64_t x_stride, const T* w, int64_t depth,
                            T* y, int64_t y_stride) {
  constexpr int64_t lanes = kLanes<T>, step = lanes * Chains, rows = sizeof...(I) / Chains;
  const T* at[sizeof...(I)] = {(x + I / Chains * x_stride + I % Chains * lanes)...};
  Vec<T> sum[sizeof...(I)] = {(static_cast<void>(I), Vec<T>{})...};
  int64_t k = 0;
  for (; k + step <= depth; k += step)
    ((sum[I] += load(at[I] + k) * load(w + k + I % Chains * lanes)), ...);
  for (; k < depth; k += lanes) {
    const int64_t left = depth - k < lanes ? depth - k : lanes;
    for (int64_t r = 0; r < rows; ++r)
      sum[r * Chains] += load_n(at[r * Chains] + k, left) * load_n(w + k, left);
  }
  for (int64_t r = 0; r < rows; ++r) {
    Vec<T> total = sum[r * Chains];
    for (int i = 1; i < Chains; ++i) total += sum[r * Chains + i];
    y[r * y_stride] = horizontal_sum<T>(total);
  }
}

// One row of weights after the other: a single stream is what the hardware's prefetchers follow
// best. Four rows at a time reached half of the memory's bandwidth.
template <class T, int Rows, int Chains>
NNARCH_NOINLINE void rows_by_weights(const T* x, int64_t x_stride, const T* w, int64_t w_stride,
                                     int64_t depth, int64_t n, T* y, int64_t y_stride) {
  for (int64_t j = 0; j < n; ++j)
    dot_rows<T, Chains>(MakeIndices<Rows * Chains>{}, x, x_stride, w + j * w_stride, depth, y + j,
                        y_stride);
}

template <class T>
void few_rows(const T* x, int64_t x_stride, int64_t m, const T* w, int64_t w_stride, int64_t depth,
              int64_t n, T* y, int64_t y_stride, const Epilogue<T>& epilogue) {
  for (int64_t r = 0; r < m; r += 4) {
    constexpr decltype(&rows_by_weights<T, 1, 8>) of[] = {
        rows_by_weights<T, 1, 8>, rows_by_weights<T, 2, 4>, rows_by_weights<T, 3, 2>,
        rows_by_weights<T, 4, 2>};
    const int64_t count = m - r < 4 ? m - r : 4;
    of[count - 1](x + r * x_stride, x_stride, w, w_stride, depth, n, y + r * y_stride, y_stride);
  }
  for (int64_t r = 0; r < m; ++r) finish_row<T>(epilogue, r * y_stride, n, y + r * y_stride);
}

template <class T>
const GemmTable<T>& table() {
  static constexpr GemmTable<T> entries = {kRows,         kColumns<T>,  run<T>,
                                           pack_panel<T>, pack_rows<T>, few_rows<T>};
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
