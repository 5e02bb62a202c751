// Convolution of signals: register tiles of output channels × samples. It is the tile of
// cpu/gemm_tile_isa.h with the roles exchanged: weights are broadcast, and the two vectors of a
// step are samples, read where they lie. Packed first, as panels of a matrix are, they took 8 % of
// the time for 64 channels, and three times the cache for 3 taps.
#include "conv2d/signal.h"

#include "cpu/gemm_tile_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
struct SignalTile {
  const SignalBlock<T>& block;
  int64_t column, columns;  // from `column` on
  bool clamps;              // what follows is none, relu or relu6
  bool plain;               // whole vectors, and nothing but bounds between sum and store
};

// Some steps of the sum. With `Outputs`, each brings the lines of a row of outputs into cache; with
// `Samples`, those of the next panel's samples.
template <class T, bool Outputs, bool Samples, int... I>
NNARCH_INLINE void signal_steps(Indices<I...>, EvenRows<T>& a, const T* const*& b, int64_t column,
                                int64_t steps, const T* line, int64_t line_step, Vec<T>* left,
                                Vec<T>* right) {
  constexpr int w = kLanes<T>;
#pragma GCC unroll 4
  for (int64_t k = 0; k < steps; ++k) {
    const T* at = *b++ + column;
    if constexpr (Samples) {
      __builtin_prefetch(at + 2 * w);
      __builtin_prefetch(at + 3 * w);
    }
    if constexpr (Outputs) {
      __builtin_prefetch(line, 1);
      __builtin_prefetch(line + w, 1);
      __builtin_prefetch(line + 2 * w - 1, 1);
      line += line_step;
    }
    Vec<T> b0 = load(at), b1 = load(at + w);
    keep_in_register(b0);
    keep_in_register(b1);
    Vec<T> x;
    ((x = broadcast(a.template value<I>(0)), left[I] += x * b0, right[I] += x * b1), ...);
    a.next();
  }
}

template <class T>
NNARCH_INLINE void finish_signal_row(const SignalTile<T>& t, int64_t row, Vec<T> left, Vec<T> right,
                                     T* y) {
  constexpr int w = kLanes<T>;
  const Epilogue<T>& e = t.block.epilogue;
  const int64_t n0 = t.columns < w ? t.columns : w, n1 = t.columns > w ? t.columns - w : 0;
  if (e.scale) {
    const Vec<T> scale = broadcast(e.scale[row]);
    const Vec<T> shift = broadcast(e.shift ? e.shift[row] : T{0});
    left = left * scale + shift, right = right * scale + shift;
  }
  if (e.residual) {
    const T* residual = e.residual + row * t.block.y_step + t.column;
    left += load_n(residual, n0), right += load_n(residual + w, n1);
  }
  if (t.clamps) {
    const ClampBounds<T> bounds(e.activation);
    left = clamp<T>(left, bounds.low, bounds.high);
    right = clamp<T>(right, bounds.low, bounds.high);
  }
  store_n(y, left, n0), store_n(y + w, right, n1);
}

template <class T, bool First, int... I>
NNARCH_INLINE void signal_tile(Indices<I...> each, const SignalTile<T>& t, int64_t row) {
  constexpr int w = kLanes<T>;
  constexpr int64_t height = sizeof...(I);
  const SignalBlock<T>& g = t.block;
  const Epilogue<T>& e = g.epilogue;
  Vec<T> left[height], right[height];
  if (e.shift && !e.scale) {
    ((left[I] = broadcast(e.shift[row + I]), right[I] = left[I]), ...);
  } else {
    ((left[I] = Vec<T>{}, right[I] = Vec<T>{}), ...);
  }
  T* y = g.y + row * g.y_step + t.column;
  EvenRows<T> a(g.a + row * g.a_step, g.a_step);
  const T* const* b = g.b;
  const int64_t fetched = g.depth < height ? g.depth : height;
  signal_steps<T, true, First>(each, a, b, t.column, fetched, y, g.y_step, left, right);
  signal_steps<T, false, First>(each, a, b, t.column, g.depth - fetched, nullptr, 0, left, right);
  if (t.plain) {
    const ClampBounds<T> bounds(e.activation);
    (store_row<T, false>(y + I * g.y_step, bounds, left[I], right[I]), ...);
    return;
  }
  if (t.clamps) {
    (finish_signal_row<T>(t, row + I, left[I], right[I], y + I * g.y_step), ...);
    return;
  }
  alignas(kVectorBytes) T sums[height * 2 * w];
  SignalTile<T> staged = t;
  (finish_signal_row<T>(staged, row + I, left[I], right[I], sums + I * 2 * w), ...);
  const int64_t offset[height] = {(I * g.y_step)...};
  activate_tile<T>(e, sums, y, offset, height, t.columns, false);
}

template <class T, int Height>
NNARCH_NOINLINE void signal_tiles(const SignalTile<T>& t, int64_t row, int64_t tiles) {
  constexpr MakeIndices<Height> each;
  // Fetched once a panel; a short sum would wait for them.
  if (row == 0 && tiles > 0 && t.block.depth >= 4 * kRows) {
    signal_tile<T, true>(each, t, 0);
    --tiles, row += Height;
  }
  for (; tiles > 0; --tiles, row += Height) signal_tile<T, false>(each, t, row);
}

template <class T, int... I>
NNARCH_INLINE auto signal_tiles_of(Indices<I...>, int64_t height) {
  using Tiles = void (*)(const SignalTile<T>&, int64_t, int64_t);
  static constexpr Tiles of[] = {signal_tiles<T, I + 1>...};
  return of[height - 1];
}

// `tall` tiles of one row more than the `low` ones after them, from `row` on.
struct SignalRows {
  int64_t row, height, tall, low;
};

template <class T>
void run_signal_rows(const SignalBlock<T>& g, const SignalRows& r) {
  constexpr MakeIndices<kRows> heights;
  const auto tall = signal_tiles_of<T>(heights, r.height + (r.tall > 0 ? 1 : 0));
  const auto low = signal_tiles_of<T>(heights, r.height);
  for (int64_t j = 0; j < g.columns; j += kColumns<T>) {
    const int64_t left = g.columns - j;
    const Epilogue<T>& e = g.epilogue;
    const bool plain = left >= kColumns<T> && !e.scale && !e.residual && is_clamp(e.activation);
    const SignalTile<T> t{g, j, left < kColumns<T> ? left : kColumns<T>, is_clamp(e.activation),
                          plain};
    tall(t, r.row, r.tall);
    low(t, r.row + r.tall * (r.height + 1), r.low);
  }
}

template <class T>
void run_signal(const SignalBlock<T>& g) {
  // Rows of weights a multiple of 4 KB apart share a set of the first-level cache.
  const bool collide = g.a_step * int64_t{sizeof(T)} % 4096 == 0;
  const int64_t most = collide && kRows > 8 ? kRows / 2 : kRows;
  const int64_t tiles = (g.rows + most - 1) / most;
  const int64_t height = g.rows / tiles, tall = g.rows % tiles;
  // Where the samples of all columns stay in the first-level cache, outputs are written row by row.
  if (g.depth * g.columns * int64_t{sizeof(T)} > 24 << 10)
    return run_signal_rows(g, {0, height, tall, tiles - tall});
  for (int64_t i = 0, row = 0; i < tiles; ++i) {
    run_signal_rows(g, {row, height, i < tall, i >= tall});
    row += height + (i < tall);
  }
}

// As scalars: two loads and two stores a cycle are more than a gather does.
template <class T>
void every(const T* src, int64_t step, int64_t n, T* dst) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4, src += 4 * step, dst += 4) {
    T a = src[0], b = src[step], c = src[2 * step], d = src[3 * step];
    dst[0] = a, dst[1] = b, dst[2] = c, dst[3] = d;
  }
  for (; i < n; ++i, src += step) *dst++ = *src;
}

template <class T>
const SignalTable<T>& table() {
  static constexpr SignalTable<T> entries = {kColumns<T>, run_signal<T>, every<T>};
  return entries;
}

}  // namespace

template <>
const SignalTable<float>& signal_table<float>() {
  return table<float>();
}
template <>
const SignalTable<double>& signal_table<double>() {
  return table<double>();
}

}  // namespace nnarch::NNARCH_ISA
