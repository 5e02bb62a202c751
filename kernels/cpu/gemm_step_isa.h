// One step of the matrix product's register tile: what a tile multiplies, where its rows lie, and
// the multiplication itself. For gemm_tile_isa.h.
#pragma once

#include "cpu/epilogue_isa.h"
#include "cpu/even_rows_isa.h"
#include "cpu/gemm.h"
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
template <class T>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));  // elements of a cache line

// What comes before in the source stays before, and what comes after stays after.
template <class T, class V>
NNARCH_INLINE void keep_order(T*& p, V& a, V& b) {
#if defined(__x86_64__)
  asm volatile("" : "+r"(p), "+v"(a), "+v"(b) : : "memory");
#elif defined(__aarch64__)
  asm volatile("" : "+r"(p), "+w"(a), "+w"(b) : : "memory");
#endif
}

// The part of the sum that one pass over a block adds: taps [first, last), depth [from,
// from+count).
struct Chunk {
  int64_t first_tap, last_tap;
  int64_t from, count;
  bool first, last;
};

// How many taps of a chunk are one running sum.
template <class T>
NNARCH_INLINE int64_t taps_of_part(const GemmBlock<T>& g, const Chunk& c) {
  const int64_t taps = c.last_tap - c.first_tap;
  if (taps * c.count <= g.longest_sum) return taps;
  const int64_t most = c.count < g.longest_sum ? g.longest_sum / c.count : 1;
  const int64_t parts = (taps + most - 1) / most;
  return (taps + parts - 1) / parts;
}

// What comes between sum and store: nothing but bounds, or a residual and bounds, of whole vectors;
// or anything. kPlainFetching: as kPlain, while other lines than those of C come into cache.
enum Finish { kAnyFinish, kPlain, kPlainResidual, kPlainFetching };
// Which of them may cut long sums: the code alone costs short ones 1 to 3 %.
constexpr bool cuts_sums(Finish how) { return how == kAnyFinish || how == kPlainFetching; }

// What the tiles of one chunk and one panel of columns have in common.
template <class T>
struct Panel {
  const GemmBlock<T>& g;
  const Chunk& chunk;
  const T* b;        // the chunk's part of the panel
  Later<T> next;     // mostly that part of the next panel; or nothing
  T* c;              // the panel's first column
  int64_t columns;   // of the panel: whole, or fewer at the end
  bool add, stream;  // C is added to; C is written past the caches
  Finish how;
  ClampBounds<T> bounds;  // of the activation
  bool meets_rows;        // reads its rows of A for the first time
  int64_t a_step;         // of strips' rows, where they lie or in the block's room
  Epilogue<T> epilogue;
  alignas(kVectorBytes) T start[kColumns<T>];  // what sums begin with: the shift, or zeros

  Panel(const GemmBlock<T>& block, const Chunk& part, int64_t column)
      : g(block),
        chunk(part),
        b(block.b + column / kColumns<T> * step_of(block) +
          (part.first_tap * block.depth + part.from) * kColumns<T>),
        c(block.c + column),
        columns(block.n - column),
        add(!part.first || block.accumulate),
        stream(block.stream && part.first && part.last && !add && columns >= kColumns<T>),
        bounds(part.last ? block.epilogue.activation : kNone),
        epilogue(block.epilogue.from_channel(column)) {
    const bool shifted = part.last && epilogue.shift && !epilogue.scale;
    for (int i = 0; i < kColumns<T>; ++i) start[i] = shifted ? epilogue.shift[i] : T{0};
    if (shifted) epilogue.shift = nullptr;
    if (!part.last) epilogue.residual = nullptr;
    const bool untouched = !epilogue.scale && !epilogue.shift && is_clamp(epilogue.activation);
    // What C holds is a residual, too.
    if (add && whole() && untouched && !epilogue.residual && part.last)
      epilogue.residual = c, add = false;
    const bool is_long = (part.last_tap - part.first_tap) * part.count > block.longest_sum;
    how = !whole() || add || (part.last && !untouched) ? kAnyFinish
          : g.fetched && !epilogue.residual            ? kPlainFetching
          : is_long                                    ? kAnyFinish
          : epilogue.residual                          ? kPlainResidual
                                                       : kPlain;
    meets_rows = column == 0;
    a_step = g.room ? ((part.count + kLine<T> - 1) / kLine<T> | 1) * kLine<T> : g.a_step;
    next = what_is_next(column);
  }

  Later<T> what_is_next(int64_t column) const {
    const int64_t panel = step_of(g), i = column / kColumns<T>;
    if (g.b_is_near)
      return g.after.part(chunk.from, chunk.from + chunk.count, g.depth)
          .part(i, i + 1, (g.n + kColumns<T> - 1) / kColumns<T>);
    const int64_t size = (chunk.last_tap - chunk.first_tap) * chunk.count * kColumns<T>;
    const bool last_panel = column + kColumns<T> >= g.n;
    if (!last_panel) return {b + panel, size};
    if (!chunk.last) return {b - i * panel + size, size};  // its part of the first panel
    return g.after.at ? g.after : Later<T>{g.b_after, size};
  }

  static int64_t step_of(const GemmBlock<T>& g) {
    return g.panel_step > 0 ? g.panel_step : g.taps * g.depth * kColumns<T>;
  }

  bool whole() const { return columns >= kColumns<T>; }
};

// What tiles of even rows read of it all, in registers as far as there are any.
template <class T>
struct EvenPanel {
  const T* b;
  const int64_t *first_tap, *last_tap;  // their offsets
  int64_t part;                         // taps of a running sum
  int64_t first_count, count;           // of all taps but the last, of the last
  int64_t a_step, c_step, lines_step;   // of the lines that come into cache
  ClampBounds<T> bounds;
  bool stream;
};

// Rows of A that lie anywhere.
template <class T, int MR>
struct AnyRows {
  const T* at[MR];

  template <int I>
  NNARCH_INLINE T value(int64_t k) const {
    return at[I][k];
  }
  NNARCH_INLINE void next() {}
};

// The first of the two lines that every step brings into cache: evenly apart, or of listed rows.
template <class T>
struct EvenLines {
  const T* at;
  int64_t stride;
  NNARCH_INLINE const T* next() {
    const T* line = at;
    at += stride;
    return line;
  }
};
template <class T>
struct ListedLines {
  const T* const* rows;
  int64_t column;
  NNARCH_INLINE const T* next() { return *rows++ + column; }
};

// How much of a panel's two vectors has columns.
enum Used { kBothVectors, kVectorAndHalf, kOneVector };

// Half a vector more costs half as much where a 512-bit operation is two of 256 bits: 144 to 24
// channels of 56×56 took 262 µs with whole vectors, 214 with one and a half.
#if defined(NNARCH_ISA_avx512)
constexpr bool kHasHalves = true;
NNARCH_INLINE Vec<float> add_half(Vec<float> sum, Vec<float> x, const float* b) {
  const __m256 half = _mm256_fmadd_ps(_mm512_castps512_ps256((__m512)x), _mm256_loadu_ps(b),
                                      _mm512_castps512_ps256((__m512)sum));
  return (Vec<float>)_mm512_castps256_ps512(half);
}
NNARCH_INLINE Vec<double> add_half(Vec<double> sum, Vec<double> x, const double* b) {
  const __m256d half = _mm256_fmadd_pd(_mm512_castpd512_pd256((__m512d)x), _mm256_loadu_pd(b),
                                       _mm512_castpd512_pd256((__m512d)sum));
  return (Vec<double>)_mm512_castpd256_pd512(half);
}
#else
constexpr bool kHasHalves = false;
template <class T>
NNARCH_INLINE Vec<T> add_half(Vec<T> sum, Vec<T> x, const T* b) {
  return sum + x * load(b);
}
#endif

template <class T>
NNARCH_INLINE Used used_vectors(int64_t columns) {
  if (columns <= kLanes<T>) return kOneVector;
  return kHasHalves && columns <= kLanes<T> + kLanes<T> / 2 ? kVectorAndHalf : kBothVectors;
}

// Where a step's vectors of B lie, and the way to the next step's: in a packed panel one behind the
// other. B that lies otherwise brings a class of its own.
template <class T>
NNARCH_INLINE const T* vectors_of(const T* b) {
  return b;
}
template <class T>
NNARCH_INLINE void go_on(const T*& b, Vec<T>, Vec<T>) {
  b += kColumns<T>;
}

// left[I], right[I] += `count` products of row I with two vectors of B, as far as they are used.
// Meanwhile two lines a step come into cache, `second` elements apart. (In one burst the same
// prefetches delay a tile by 50 cycles.)
template <class T, Used Use, class Rows, class B, class Lines, int... I>
NNARCH_INLINE void multiply(Indices<I...>, Rows& rows, int64_t from, int64_t count, B& b,
                            Lines line, int64_t second, Vec<T>* left, Vec<T>* right) {
  constexpr int w = kLanes<T>;
#pragma GCC unroll 4
  for (int64_t k = from; k < from + count; ++k) {
    const T* fetched = line.next();
    __builtin_prefetch(fetched);
    __builtin_prefetch(fetched + second);
    const T* at = vectors_of(b);
    Vec<T> b0 = load(at), b1 = b0;
    keep_in_register(b0);
    if constexpr (Use == kOneVector) {
      ((left[I] += broadcast(rows.template value<I>(k)) * b0), ...);
    } else if constexpr (Use == kVectorAndHalf) {
      Vec<T> x;
      ((x = broadcast(rows.template value<I>(k)), left[I] += x * b0,
        right[I] = add_half(right[I], x, at + w)),
       ...);
    } else {
      b1 = load(at + w);
      keep_in_register(b1);
      Vec<T> x;
      ((x = broadcast(rows.template value<I>(k)), left[I] += x * b0, right[I] += x * b1), ...);
    }
    go_on(b, b0, b1);
    rows.next();
  }
}

// The last steps of a tile whose rows are stored by halves: 28 stores in a row delay the next
// tile's products by 48 cycles, two times 14 with some products in between by none.
#if defined(NNARCH_ISA_avx512)
constexpr int kLastSteps = 4;
#else
constexpr int kLastSteps = 0;  // half a tile has too few sums for the latency of a product
#endif
template <int Rows>
constexpr int kLastStepsOf = Rows > 8 ? kLastSteps : 0;

// The products of these steps in rows from First on. What the first half of the rows leaves in
// cache, the second one reads again. `meanwhile` runs with every step.
template <class T, int First, class F, int... I>
NNARCH_INLINE void multiply_last(Indices<I...>, const EvenRows<T>& rows, const T*& b,
                                 const F& meanwhile, Vec<T>* left, Vec<T>* right) {
  constexpr int w = kLanes<T>;
  // Not before what the other half has stored.
  ((keep_order(b, left[First + I], right[First + I])), ...);
#pragma GCC unroll 4
  for (int k = 0; k < kLastSteps; ++k) {
    meanwhile();
    Vec<T> b0 = load(b + k * 2 * w), b1 = load(b + k * 2 * w + w), x;
    keep_in_register(b0), keep_in_register(b1);
    ((x = broadcast(rows.template row<First + I>()[k]), left[First + I] += x * b0,
      right[First + I] += x * b1),
     ...);
  }
}

}  // namespace
}  // namespace nnarch::NNARCH_ISA
