// Winograd's transforms on vectors of channels, and the two matrix products between them.
#include "conv2d/winograd.h"

#include "conv2d/winograd_lines_isa.h"
#include "cpu/epilogue_isa.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {
namespace {

constexpr int kWidth = kLanes<float>;

// Half a vector of floats as doubles, and two of these as a vector of floats.
typedef float HalfVector __attribute__((vector_size(kVectorBytes / 2), aligned(4), may_alias));
NNARCH_INLINE Vec<double> to_double(const float* p) {
  return __builtin_convertvector(*reinterpret_cast<const HalfVector*>(p), Vec<double>);
}
template <int... I>
NNARCH_INLINE V join(Indices<I...>, HalfVector low, HalfVector high) {
  return __builtin_shufflevector(low, high, I...);
}
NNARCH_INLINE V rounded(Vec<double> low, Vec<double> high) {
  return join(MakeIndices<kWidth>{}, __builtin_convertvector(low, HalfVector),
              __builtin_convertvector(high, HalfVector));
}

// --------------------------------------------------------------------------- transforms of a tile

// planes[xi][c] = Matrix · d · Matrixᵀ, with d from `pixels`, for one vector of channels.
template <class Matrix, class Load>
NNARCH_INLINE void spread_tile(const float* const* pixels, float* planes, int64_t plane,
                               const Load& load_pixel) {
  constexpr int from = Matrix::columns, to = Matrix::rows;
  V middle[to][from];
  for (int j = 0; j < from; ++j) {
    V d[from], line[to];
    for (int i = 0; i < from; ++i) d[i] = load_pixel(pixels[i * from + j]);
    spread<Matrix>(d, line);
    for (int i = 0; i < to; ++i) middle[i][j] = line[i];
  }
  for (int i = 0; i < to; ++i) {
    V line[to];
    spread<Matrix>(middle[i], line);
    for (int j = 0; j < to; ++j, planes += plane) store(planes, line[j]);
  }
}

template <class Matrix>
void spread_channels(const float* const* pixels, int64_t channels, float* planes, int64_t plane) {
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth)
    spread_tile<Matrix>(pixels, planes + c, plane, [&](const float* p) { return load(p + c); });
  if (c < channels)
    spread_tile<Matrix>(pixels, planes + c, plane,
                        [&](const float* p) { return load_n(p + c, channels - c); });
}

// finish(i, line) for every row of Matrix · planes · Matrixᵀ.
template <class Matrix, class Finish>
NNARCH_INLINE void collect_tile(const float* planes, int64_t plane, const Finish& finish) {
  constexpr int from = Matrix::columns, to = Matrix::rows;
  V middle[to][from];
  for (int j = 0; j < from; ++j) {
    V d[from], line[to];
    for (int i = 0; i < from; ++i) d[i] = load(planes + (i * from + j) * plane);
    collect<Matrix>(d, line);
    for (int i = 0; i < to; ++i) middle[i][j] = line[i];
  }
  for (int i = 0; i < to; ++i) {
    V line[to];
    collect<Matrix>(middle[i], line);
    finish(i, line);
  }
}

NNARCH_NOINLINE void activate_line(V* line, int count, int64_t activation, float alpha) {
  with_activation(activation, [&](auto kind) {
    for (int j = 0; j < count; ++j) line[j] = activate_as<float, kind.code>(line[j], alpha);
  });
}

// One vector of channels, of which `count` exist.
template <int M, bool Whole>
NNARCH_INLINE void output_vector(const float* planes, int64_t plane, int64_t count,
                                 const Epilogue<float>& e, const OutputTile& tile, float* y,
                                 bool stream_out) {
  const V scale = e.scale ? load(e.scale) : broadcast(1.0f);
  const V shift = e.shift ? load(e.shift) : V{};
  const bool clamps = is_clamp(e.activation);
  const ClampBounds<float> bounds(clamps ? e.activation : int64_t{kNone});
  collect_tile<OutputMatrix<M>>(planes, plane, [&](int i, V* line) {
    if (i >= tile.rows) return;
    const int64_t row = tile.offset + i * tile.row_step;
    for (int j = 0; j < M; ++j) line[j] = line[j] * scale + shift;
    if (e.residual) {
      const float* r = e.residual + row;
      for (int64_t j = 0; j < tile.columns; ++j, r += tile.column_step)
        line[j] += Whole ? load(r) : load_n(r, count);
    }
    if (!clamps) activate_line(line, M, e.activation, e.alpha);
    float* to = y + row;
    for (int64_t j = 0; j < tile.columns; ++j, to += tile.column_step) {
      const V value = clamp<float>(line[j], bounds.low, bounds.high);
      if (Whole && stream_out)
        stream(to, value);
      else if (Whole)
        store(to, value);
      else
        store_n(to, value, count);
    }
  });
}

template <int M>
void output_channels(const float* planes, int64_t plane, int64_t channels,
                     const Epilogue<float>& epilogue, const OutputTile& tile, float* y,
                     bool stream_out) {
  for (int64_t c = 0; c < channels && c < 2 * kWidth; c += kWidth) {
    const Epilogue<float> e = epilogue.from_channel(c);
    const int64_t count = channels - c;
    if (count >= kWidth)
      output_vector<M, true>(planes + c, plane, kWidth, e, tile, y + c, stream_out);
    else
      output_vector<M, false>(planes + c, plane, count, e, tile, y + c, false);
  }
}

template <int M>
void weight_grad_channels(const float* planes, int64_t plane, int64_t channels, float* dw,
                          int64_t tap) {
  for (int64_t c = 0; c < channels; c += kWidth)
    collect_tile<WeightGradMatrix<M>>(planes + c, plane, [&](int i, const V* line) {
      for (int j = 0; j < 3; ++j) store_n(dw + (i * 3 + j) * tap + c, line[j], channels - c);
    });
}

// In double: these values are rounded once and used in every product. Whole vectors are written at
// once: half a line to each of 36 planes, and the first would have left L1 before its other half.
template <int M>
void weight_panel(const float* packed, int64_t channels, float* planes, int64_t plane) {
  constexpr int t = M + 2;
  const int64_t tap = channels * 2 * kWidth;
  for (int64_t at = 0; at < tap; at += kWidth) {
    Vec<double> low[t][3], high[t][3];
    for (int s = 0; s < 3; ++s) {
      Vec<double> w0[3], w1[3], line0[t], line1[t];
      for (int r = 0; r < 3; ++r) {
        w0[r] = to_double(packed + at + (3 * r + s) * tap);
        w1[r] = to_double(packed + at + (3 * r + s) * tap + kWidth / 2);
      }
      spread<WeightMatrix<M>>(w0, line0);
      spread<WeightMatrix<M>>(w1, line1);
      for (int i = 0; i < t; ++i) low[i][s] = line0[i], high[i][s] = line1[i];
    }
    for (int i = 0; i < t; ++i) {
      Vec<double> line0[t], line1[t];
      spread<WeightMatrix<M>>(low[i], line0);
      spread<WeightMatrix<M>>(high[i], line1);
      for (int j = 0; j < t; ++j)
        store(planes + (i * t + j) * plane + at, rounded(line0[j], line1[j]));
    }
  }
}

// ------------------------------------------------------------------------------- matrix products

#if defined(NNARCH_ISA_avx512)
constexpr int kRows = 14;
#else
constexpr int kRows = 6;
#endif

// A longer chain of additions loses accuracy: one of 1024 has three times the error of its parts.
constexpr int64_t kChain = 128;

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

// The register tile's rows are a constant distance apart, so a few registers address them all. The
// bases are opaque, or GCC would keep a pointer for every row. `Half`: the left vector only.
template <bool Half, int... I>
NNARCH_INLINE void panel_tile(Indices<I...>, const PanelProduct& p, int64_t row, int64_t from,
                              int64_t count) {
  const int64_t step = p.a_step;
  const float* a0 = p.a + row * step + from;
  const float* a7 = a0 + 7 * step;
  const float* b = p.b + from * 2 * kWidth;
  const int64_t next = p.depth * 2 * kWidth;
  V left[sizeof...(I)] = {(static_cast<void>(I), V{})...};
  V right[sizeof...(I)] = {(static_cast<void>(I), V{})...};
#pragma GCC unroll 1
  for (int64_t k = 0; k < count; ++k) {
    asm("" : "+r"(a0), "+r"(a7));
    __builtin_prefetch(b + next, 0, 2);
    V b0 = load(b), b1, x;
    keep_in_register(b0);
    if constexpr (Half) {
      ((left[I] += broadcast(I < 7 ? a0[I * step] : a7[(I - 7) * step]) * b0), ...);
    } else {
      __builtin_prefetch(b + next + kWidth, 0, 2);
      b1 = load(b + kWidth);
      keep_in_register(b1);
      ((x = broadcast(I < 7 ? a0[I * step] : a7[(I - 7) * step]), left[I] += x * b0,
        right[I] += x * b1),
       ...);
    }
    ++a0, ++a7, b += 2 * kWidth;
  }
  put<Half, I...>(left, right, p.c + row * p.c_step, p.c_step, from > 0);
}

// c of `Rows` rows by two vectors, or one with `Half`.
template <bool Half, int... I>
NNARCH_INLINE void outer_tile(Indices<I...>, const OuterProduct& p, int64_t row, int64_t column) {
  const float* a = p.a + row;
  const float* b = p.b + column;
  V left[sizeof...(I)] = {(static_cast<void>(I), V{})...};
  V right[sizeof...(I)] = {(static_cast<void>(I), V{})...};
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_step, b += p.b_step) {
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
  put<Half, I...>(left, right, p.c + row * p.c_step + column, p.c_step, p.add);
}

template <bool Half, int Rows>
NNARCH_NOINLINE void panel_tile_of(const PanelProduct& p, int64_t row, int64_t from,
                                   int64_t count) {
  panel_tile<Half>(MakeIndices<Rows>{}, p, row, from, count);
}
template <bool Half, int Rows>
NNARCH_NOINLINE void outer_tile_of(const OuterProduct& p, int64_t row, int64_t column) {
  outer_tile<Half>(MakeIndices<Rows>{}, p, row, column);
}

template <bool Half, int... I>
NNARCH_INLINE auto panel_tile_with(Indices<I...>, int64_t rows) {
  static constexpr decltype(&panel_tile_of<Half, 1>) tiles[] = {panel_tile_of<Half, I + 1>...};
  return tiles[rows - 1];
}
template <bool Half, int... I>
NNARCH_INLINE auto outer_tile_with(Indices<I...>, int64_t rows) {
  static constexpr decltype(&outer_tile_of<Half, 1>) tiles[] = {outer_tile_of<Half, I + 1>...};
  return tiles[rows - 1];
}

// f(first, count) for tiles of nearly equal height.
template <class F>
NNARCH_INLINE void for_row_tiles(int64_t rows, const F& f) {
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles;
    f(first, rows * (t + 1) / tiles - first);
  }
}

void panel_product(const PanelProduct& p) {
  const int64_t chains = (p.depth + kChain - 1) / kChain;
  for (int64_t i = 0; i < chains; ++i) {
    const int64_t from = p.depth * i / chains, count = p.depth * (i + 1) / chains - from;
    for_row_tiles(p.rows, [&](int64_t row, int64_t rows) {
      const auto tile = p.columns <= kWidth ? panel_tile_with<true>(MakeIndices<kRows>{}, rows)
                                            : panel_tile_with<false>(MakeIndices<kRows>{}, rows);
      tile(p, row, from, count);
    });
  }
}

void outer_product(const OuterProduct& p) {
  for (int64_t column = 0; column < p.columns; column += 2 * kWidth)
    for_row_tiles(p.rows, [&](int64_t row, int64_t rows) {
      const bool half = p.columns - column <= kWidth;
      const auto tile = half ? outer_tile_with<true>(MakeIndices<kRows>{}, rows)
                             : outer_tile_with<false>(MakeIndices<kRows>{}, rows);
      tile(p, row, column);
    });
}

template <int M>
constexpr WinogradTransforms transforms = {spread_channels<InputMatrix<M>>, weight_panel<M>,
                                           output_channels<M>, spread_channels<GradMatrix<M>>,
                                           weight_grad_channels<M>};

}  // namespace

const WinogradTable& winograd_table() {
  static constexpr WinogradTable table = {2 * kWidth,    kRows,         transforms<2>,
                                          transforms<4>, transforms<5>, transforms<6>,
                                          panel_product, outer_product};
  return table;
}

}  // namespace nnarch::NNARCH_ISA
