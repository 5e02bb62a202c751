// Winograd's transforms of a tile on vectors of channels, for any tile and kernel whose points
// winograd_points.h has. For *_isa.cpp files.
#pragma once

#include <type_traits>

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

// put(i, j, v) for every v of Rows · d · Columnsᵀ, row by row, with d[i][j] = get(i, j).
template <class Rows, class Columns, class X, class Get, class Put>
NNARCH_INLINE void transform_tile(const Get& get, const Put& put) {
  X middle[Rows::rows][Columns::columns];
  for (int j = 0; j < Columns::columns; ++j) {
    X d[Rows::columns], line[Rows::rows];
    for (int i = 0; i < Rows::columns; ++i) d[i] = get(i, j);
    spread<Rows>(d, line);
    for (int i = 0; i < Rows::rows; ++i) middle[i][j] = line[i];
  }
  for (int i = 0; i < Rows::rows; ++i) {
    X line[Columns::rows];
    spread<Columns>(middle[i], line);
    for (int j = 0; j < Columns::rows; ++j) put(i, j, line[j]);
  }
}

// planes[xi][c] = Rows · d · Columnsᵀ, with d from `pixels`, for one vector of channels.
template <class Rows, class Columns, class Load>
NNARCH_INLINE void spread_tile(const float* const* pixels, float* planes, int64_t plane,
                               const Load& load_pixel) {
  int at = 0;  // known at compile time, as i and j are
  transform_tile<Rows, Columns, V>(
      [&](int i, int j)
          NNARCH_INLINE_LAMBDA { return load_pixel(pixels[i * Columns::columns + j]); },
      [&](int i, int j, V v) NNARCH_INLINE_LAMBDA {
        const int xi = Rows::point(i) * Columns::points + Columns::point(j);
        planes += (xi - at) * plane, at = xi;
        store(planes, v);
      });
}

template <class Rows, class Columns>
void spread_channels(const float* const* pixels, int64_t channels, float* planes, int64_t plane,
                     int64_t) {
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth)
    spread_tile<Rows, Columns>(pixels, planes + c, plane,
                               [&](const float* p) { return load(p + c); });
  if (c < channels)
    spread_tile<Rows, Columns>(pixels, planes + c, plane,
                               [&](const float* p) { return load_n(p + c, channels - c); });
}

template <class Matrix, int... I>
NNARCH_INLINE void load_points(Indices<I...>, const EvenRows<float>& from, V* to) {
  ((to[I] = load(from.row<Matrix::point(I)>())), ...);
}

// finish(i, line) for every row of Rows · planes · Columnsᵀ.
template <class Rows, class Columns, class Finish>
NNARCH_INLINE void collect_tile(const float* planes, int64_t plane, const Finish& finish) {
  V middle[Rows::rows][Columns::columns];
  // 36 offsets of their own were spilled: 83 → 40 ns.
  EvenRows<float> column(planes, Columns::points * plane);
  for (int j = 0; j < Columns::columns; ++j) {
    V d[Rows::columns], line[Rows::rows];
    load_points<Rows>(MakeIndices<Rows::columns>{}, column, d);
    column.next((Columns::point(j + 1) - Columns::point(j)) * plane);
    collect<Rows>(d, line);
    for (int i = 0; i < Rows::rows; ++i) middle[i][j] = line[i];
  }
  for (int i = 0; i < Rows::rows; ++i) {
    V line[Columns::rows];
    collect<Columns>(middle[i], line);
    finish(i, line);
  }
}

NNARCH_NOINLINE void activate_line(V* line, int count, int64_t activation, float alpha) {
  with_activation(activation, [&](auto kind) {
    for (int j = 0; j < count; ++j) line[j] = activate_as<float, kind.code>(line[j], alpha);
  });
}

// One vector of channels, of which `count` exist.
template <class Rows, class Columns, bool Whole>
NNARCH_INLINE void output_vector(const float* planes, int64_t plane, int64_t count,
                                 const Epilogue<float>& e, const OutputTile& tile, float* y,
                                 bool stream_out) {
  const V scale = e.scale ? load(e.scale) : broadcast(1.0f);
  const V shift = e.shift ? load(e.shift) : V{};
  const bool clamps = is_clamp(e.activation);
  const ClampBounds<float> bounds(clamps ? e.activation : int64_t{kNone});
  constexpr int M = Columns::rows;
  collect_tile<Rows, Columns>(planes, plane, [&](int i, V* line) {
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

template <class Rows, class Columns>
void output_channels(const float* planes, int64_t plane, int64_t channels,
                     const Epilogue<float>& epilogue, const OutputTile& tile, float* y,
                     bool stream_out) {
  for (int64_t c = 0; c < channels && c < 2 * kWidth; c += kWidth) {
    const Epilogue<float> e = epilogue.from_channel(c);
    const int64_t count = channels - c;
    if (count >= kWidth)
      output_vector<Rows, Columns, true>(planes + c, plane, kWidth, e, tile, y + c, stream_out);
    else
      output_vector<Rows, Columns, false>(planes + c, plane, count, e, tile, y + c, false);
  }
}

template <class Rows, class Columns>
void weight_grad_channels(const float* planes, int64_t plane, int64_t, int64_t channels, float* dw,
                          int64_t tap, bool stream_out) {
  constexpr int taps = Columns::rows;
  for (int64_t c = 0; c < channels; c += kWidth)
    collect_tile<Rows, Columns>(planes + c, plane, [&](int i, const V* line) {
      for (int j = 0; j < taps; ++j) {
        float* const to = dw + (i * taps + j) * tap + c;
        if (stream_out)
          stream(to, line[j]);
        else
          store_n(to, line[j], channels - c);
      }
    });
  if (stream_out) finish_streaming();
}

// put(i, j, v) for every v of Rows · d · Columnsᵀ, with the vectors d[i][j] at from(i, j). In
// double: values of a weight are rounded once and used in every product.
template <class Rows, class Columns, class From, class Put>
NNARCH_INLINE void transform_halves(const From& from, const Put& put) {
  using Half = Vec<double>;
  Half low[Rows::rows][Columns::columns], high[Rows::rows][Columns::columns];
  for (int j = 0; j < Columns::columns; ++j) {
    Half d0[Rows::columns], d1[Rows::columns], line0[Rows::rows], line1[Rows::rows];
    for (int i = 0; i < Rows::columns; ++i)
      d0[i] = to_double(from(i, j)), d1[i] = to_double(from(i, j) + kWidth / 2);
    spread<Rows>(d0, line0);
    spread<Rows>(d1, line1);
    for (int i = 0; i < Rows::rows; ++i) low[i][j] = line0[i], high[i][j] = line1[i];
  }
  for (int i = 0; i < Rows::rows; ++i) {
    Half line0[Columns::rows], line1[Columns::rows];
    spread<Columns>(low[i], line0);
    spread<Columns>(high[i], line1);
    for (int j = 0; j < Columns::rows; ++j) put(i, j, rounded(line0[j], line1[j]));
  }
}

// Of the vector that begins with value w of [channel][nr].
NNARCH_INLINE const float* weights_at(const TapWeights& from, int64_t w) {
  return from.data + w / (2 * kWidth) * from.step + w % (2 * kWidth);
}

// In double for more than six points, whose values round further: 5 × 5 and 6 × 6 outputs.
template <class Rows, class Columns>
void weight_panel(const TapWeights& from, float* values, int64_t slot, int64_t gap) {
  const int64_t plane = slot + gap;
  for (int64_t w = 0; w < from.channels * 2 * kWidth; w += kWidth) {
    const float* const weights = weights_at(from, w);
    float* to = values + w;
    const auto tap = [&](int i, int j) NNARCH_INLINE_LAMBDA {
      return weights + from.taps[i * Columns::columns + j];
    };
    const auto put = [&](int, int, V v) NNARCH_INLINE_LAMBDA { store(to, v), to += plane; };
    if constexpr (Rows::rows > 6)
      transform_halves<Rows, Columns>(tap, put);
    else
      transform_tile<Rows, Columns, V>(
          [&](int i, int j) NNARCH_INLINE_LAMBDA { return load(tap(i, j)); }, put);
  }
}

// Of m outputs by R taps in rows and S in columns; by one tap nothing is transformed. Those of the
// forward pass alone, and with the weight's gradient.
template <int R, class Matrix>
using OfTaps = std::conditional_t<R == 1, NoMatrix, Matrix>;
template <int M, int R, int S = R>
constexpr WinogradTransforms forward_transforms = {
    spread_channels<OfTaps<R, InputMatrix<M, R>>, OfTaps<S, InputMatrix<M, S>>>,
    weight_panel<OfTaps<R, WeightMatrix<M, R>>, OfTaps<S, WeightMatrix<M, S>>>,
    output_channels<OfTaps<R, OutputMatrix<M, R>>, OfTaps<S, OutputMatrix<M, S>>>, nullptr,
    nullptr};
template <int M, int R, int S = R>
constexpr WinogradTransforms all_transforms = {
    forward_transforms<M, R, S>.input, forward_transforms<M, R, S>.weight,
    forward_transforms<M, R, S>.output,
    spread_channels<OfTaps<R, GradMatrix<M, R>>, OfTaps<S, GradMatrix<M, S>>>,
    weight_grad_channels<OfTaps<R, WeightGradMatrix<M, R>>, OfTaps<S, WeightGradMatrix<M, S>>>};

}  // namespace
}  // namespace nnarch::NNARCH_ISA
