// Winograd's transforms of a tile on vectors of channels, for any tile and kernel whose points
// winograd_points.h has. For *_isa.cpp files.
#pragma once

#include "conv2d/winograd.h"
#include "conv2d/winograd_lines_isa.h"
#include "cpu/epilogue_isa.h"
#include "cpu/even_rows_isa.h"
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

template <int... I>
NNARCH_INLINE void load_rows(Indices<I...>, const EvenRows<float>& from, V* to) {
  ((to[I] = load(from.row<I>())), ...);
}

// finish(i, line) for every row of Matrix · planes · Matrixᵀ.
template <class Matrix, class Finish>
NNARCH_INLINE void collect_tile(const float* planes, int64_t plane, const Finish& finish) {
  constexpr int from = Matrix::columns, to = Matrix::rows;
  V middle[to][from];
  EvenRows<float> column(planes, from * plane);  // 36 offsets of their own were spilled: 83 → 40 ns
  for (int j = 0; j < from; ++j, column.next(plane)) {
    V d[from], line[to];
    load_rows(MakeIndices<from>{}, column, d);
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
template <int M, int R, bool Whole>
NNARCH_INLINE void output_vector(const float* planes, int64_t plane, int64_t count,
                                 const Epilogue<float>& e, const OutputTile& tile, float* y,
                                 bool stream_out) {
  const V scale = e.scale ? load(e.scale) : broadcast(1.0f);
  const V shift = e.shift ? load(e.shift) : V{};
  const bool clamps = is_clamp(e.activation);
  const ClampBounds<float> bounds(clamps ? e.activation : int64_t{kNone});
  collect_tile<OutputMatrix<M, R>>(planes, plane, [&](int i, V* line) {
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

template <int M, int R>
void output_channels(const float* planes, int64_t plane, int64_t channels,
                     const Epilogue<float>& epilogue, const OutputTile& tile, float* y,
                     bool stream_out) {
  for (int64_t c = 0; c < channels && c < 2 * kWidth; c += kWidth) {
    const Epilogue<float> e = epilogue.from_channel(c);
    const int64_t count = channels - c;
    if (count >= kWidth)
      output_vector<M, R, true>(planes + c, plane, kWidth, e, tile, y + c, stream_out);
    else
      output_vector<M, R, false>(planes + c, plane, count, e, tile, y + c, false);
  }
}

template <int M, int R>
void weight_grad_channels(const float* planes, int64_t plane, int64_t channels, float* dw,
                          int64_t tap) {
  for (int64_t c = 0; c < channels; c += kWidth)
    collect_tile<WeightGradMatrix<M, R>>(planes + c, plane, [&](int i, const V* line) {
      for (int j = 0; j < R; ++j) store_n(dw + (i * R + j) * tap + c, line[j], channels - c);
    });
}

// In double: these values are rounded once and used in every product. Whole vectors are written at
// once: half a line to each of 36 planes, and the first would have left L1 before its other half.
template <int M, int R>
void weight_panel(const float* packed, int64_t channels, float* planes, int64_t plane) {
  constexpr int t = M + R - 1;
  using Matrix = WeightMatrix<M, R>;
  const int64_t tap = channels * 2 * kWidth;
  for (int64_t at = 0; at < tap; at += kWidth) {
    Vec<double> low[t][R], high[t][R];
    for (int s = 0; s < R; ++s) {
      Vec<double> w0[R], w1[R], line0[t], line1[t];
      for (int r = 0; r < R; ++r) {
        w0[r] = to_double(packed + at + (R * r + s) * tap);
        w1[r] = to_double(packed + at + (R * r + s) * tap + kWidth / 2);
      }
      spread<Matrix>(w0, line0);
      spread<Matrix>(w1, line1);
      for (int i = 0; i < t; ++i) low[i][s] = line0[i], high[i][s] = line1[i];
    }
    for (int i = 0; i < t; ++i) {
      Vec<double> line0[t], line1[t];
      spread<Matrix>(low[i], line0);
      spread<Matrix>(high[i], line1);
      for (int j = 0; j < t; ++j)
        store(planes + (i * t + j) * plane + at, rounded(line0[j], line1[j]));
    }
  }
}

// Of m × m outputs with R × R taps; without the weight gradient, which only 3 × 3 has.
template <int M, int R>
constexpr WinogradTransforms forward_transforms = {spread_channels<InputMatrix<M, R>>,
                                                   weight_panel<M, R>, output_channels<M, R>,
                                                   nullptr, nullptr};
template <int M, int R>
constexpr WinogradTransforms all_transforms = {
    spread_channels<InputMatrix<M, R>>, weight_panel<M, R>, output_channels<M, R>,
    spread_channels<GradMatrix<M, R>>, weight_grad_channels<M, R>};

}  // namespace
}  // namespace nnarch::NNARCH_ISA
