// The transforms of F(m × m, 2 × 2) on vectors of channels; the product between them is
// winograd_isa.cpp's.
#include "conv2d/two_taps.h"
#include "conv2d/winograd_lines_isa.h"
#include "cpu/epilogue_isa.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {
namespace {

constexpr int kWidth = kLanes<float>;

// ------------------------------------------------------------------------------------- matrices

// As in winograd_points.h: finite points, then infinity. ±3/4 and −3/2 have half the error of ±1
// and 2 for m = 4, which is then that of F(4×4, 3×3).
template <int M>
struct Points;
template <>
struct Points<3> {
  static constexpr double at[] = {0, 1, -1};
};
template <>
struct Points<4> {
  static constexpr double at[] = {0, 0.75, -0.75, -1.5};
};

// Row i of each matrix belongs to point i, the last one to infinity.
template <int M>
struct Matrices {
  static constexpr int size = M + 1;

  double input[size][size] = {};  // Bᵀ
  double weight[size][2] = {};    // G
  double output[size][M] = {};    // A

  constexpr Matrices() {
    constexpr int n = size - 1;
    const auto& point = Points<M>::at;
    for (int i = 0; i <= n; ++i) {
      double scale = 1;
      int degree = 0;
      input[i][0] = 1;
      for (int j = 0; j < n; ++j) {  // input[i] *= (x − p_j)
        if (j == i) continue;
        for (int d = ++degree; d >= 0; --d)
          input[i][d] = (d > 0 ? input[i][d - 1] : 0) - point[j] * input[i][d];
        if (i < n) scale *= point[i] - point[j];
      }
      if (i == n) {
        weight[i][1] = output[i][M - 1] = 1;
        continue;
      }
      weight[i][0] = 1 / scale;
      weight[i][1] = point[i] / scale;
      double power = 1;
      for (int k = 0; k < M; ++k, power *= point[i]) output[i][k] = power;
    }
  }
};
template <int M>
inline constexpr Matrices<M> kMatrices{};

template <int M>
struct Input {
  static constexpr int rows = M + 1, columns = M + 1;
  static constexpr double at(int i, int j) { return kMatrices<M>.input[i][j]; }
};
template <int M>
struct Weight {
  static constexpr int rows = M + 1, columns = 2;
  static constexpr double at(int i, int j) { return kMatrices<M>.weight[i][j]; }
};
template <int M>
struct Output {
  static constexpr int rows = M, columns = M + 1;
  static constexpr double at(int i, int j) { return kMatrices<M>.output[j][i]; }
};

// ------------------------------------------------------------------------------------- transforms

// planes[xi][c] = Bᵀ · d · B for one vector of channels.
template <int M, class Load>
NNARCH_INLINE void input_tile(const float* const* pixels, float* planes, int64_t plane,
                              const Load& load_pixel) {
  constexpr int t = M + 1;
  V middle[t][t];
  for (int j = 0; j < t; ++j) {
    V d[t], line[t];
    for (int i = 0; i < t; ++i) d[i] = load_pixel(pixels[i * t + j]);
    spread<Input<M>>(d, line);
    for (int i = 0; i < t; ++i) middle[i][j] = line[i];
  }
  for (int i = 0; i < t; ++i) {
    V line[t];
    spread<Input<M>>(middle[i], line);
    for (int j = 0; j < t; ++j, planes += plane) store(planes, line[j]);
  }
}

template <int M>
void input_channels(const float* const* pixels, int64_t channels, float* planes, int64_t plane) {
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth)
    input_tile<M>(pixels, planes + c, plane, [&](const float* p) { return load(p + c); });
  if (c < channels)
    input_tile<M>(pixels, planes + c, plane,
                  [&](const float* p) { return load_n(p + c, channels - c); });
}

NNARCH_NOINLINE void activate_line(V* line, int count, int64_t activation, float alpha) {
  with_activation(activation, [&](auto kind) {
    for (int j = 0; j < count; ++j) line[j] = activate_as<float, kind.code>(line[j], alpha);
  });
}

// The row of outputs `line`: epilogue and store. One vector of channels, of which `count` exist.
template <int M, bool Whole>
NNARCH_INLINE void put_line(V* line, int64_t row, int64_t count, const Epilogue<float>& e,
                            const OutputTile& tile, const ClampBounds<float>& bounds, float* y,
                            bool past_caches) {
  const V scale = e.scale ? load(e.scale) : broadcast(1.0f);
  const V shift = e.shift ? load(e.shift) : V{};
  for (int j = 0; j < M; ++j) line[j] = line[j] * scale + shift;
  if (e.residual) {
    const float* r = e.residual + row;
    for (int64_t j = 0; j < tile.columns; ++j, r += tile.column_step)
      line[j] += Whole ? load(r) : load_n(r, count);
  }
  if (!is_clamp(e.activation)) activate_line(line, M, e.activation, e.alpha);
  float* to = y + row;
  for (int64_t j = 0; j < tile.columns; ++j, to += tile.column_step) {
    const V value = clamp<float>(line[j], bounds.low, bounds.high);
    if (Whole && past_caches)
      stream(to, value);
    else if (Whole)
      store(to, value);
    else
      store_n(to, value, count);
  }
}

template <int M, bool Whole>
NNARCH_INLINE void output_vector(const float* planes, int64_t plane, int64_t count,
                                 const Epilogue<float>& e, const OutputTile& tile, float* y,
                                 bool past_caches) {
  constexpr int t = M + 1;
  const ClampBounds<float> bounds(is_clamp(e.activation) ? e.activation : int64_t{kNone});
  V middle[M][t];
  for (int j = 0; j < t; ++j) {
    V d[t], line[M];
    for (int i = 0; i < t; ++i) d[i] = load(planes + (i * t + j) * plane);
    collect<Output<M>>(d, line);
    for (int i = 0; i < M; ++i) middle[i][j] = line[i];
  }
  for (int i = 0; i < M; ++i) {
    if (i >= tile.rows) return;
    V line[M];
    collect<Output<M>>(middle[i], line);
    put_line<M, Whole>(line, tile.offset + i * tile.row_step, count, e, tile, bounds, y,
                       past_caches);
  }
}

template <int M>
void output_channels(const float* planes, int64_t plane, int64_t channels,
                     const Epilogue<float>& epilogue, const OutputTile& tile, float* y,
                     bool past_caches) {
  for (int64_t c = 0; c < channels && c < 2 * kWidth; c += kWidth) {
    const Epilogue<float> e = epilogue.from_channel(c);
    const int64_t count = channels - c;
    if (count >= kWidth)
      output_vector<M, true>(planes + c, plane, kWidth, e, tile, y + c, past_caches);
    else
      output_vector<M, false>(planes + c, plane, count, e, tile, y + c, false);
  }
}

// Half a vector of floats as doubles, and two of these as a vector of floats.
typedef float HalfVector __attribute__((vector_size(kVectorBytes / 2), aligned(4), may_alias));
NNARCH_INLINE Vec<double> to_double(const float* p) {
  return __builtin_convertvector(*reinterpret_cast<const HalfVector*>(p), Vec<double>);
}
template <int... I>
NNARCH_INLINE V join(Indices<I...>, HalfVector low, HalfVector high) {
  return __builtin_shufflevector(low, high, I...);
}

// Half of a vector of weights, [4 taps] to [M + 1][M + 1], in double: these values are rounded once
// and used in every product.
template <int M>
NNARCH_INLINE void weight_half(const float* packed, int64_t tap, HalfVector out[M + 1][M + 1]) {
  constexpr int t = M + 1;
  Vec<double> middle[t][2];
  for (int s = 0; s < 2; ++s) {
    const Vec<double> w[2] = {to_double(packed + s * tap), to_double(packed + (2 + s) * tap)};
    Vec<double> line[t];
    spread<Weight<M>>(w, line);
    for (int i = 0; i < t; ++i) middle[i][s] = line[i];
  }
  for (int i = 0; i < t; ++i) {
    Vec<double> line[t];
    spread<Weight<M>>(middle[i], line);
    for (int j = 0; j < t; ++j) out[i][j] = __builtin_convertvector(line[j], HalfVector);
  }
}

template <int M>
void weight_panel(const float* packed, int64_t channels, float* planes, int64_t plane) {
  constexpr int t = M + 1;
  const int64_t tap = channels * 2 * kWidth;
  for (int64_t at = 0; at < tap; at += kWidth) {
    HalfVector low[t][t], high[t][t];
    weight_half<M>(packed + at, tap, low);
    weight_half<M>(packed + at + kWidth / 2, tap, high);
    for (int i = 0; i < t; ++i)
      for (int j = 0; j < t; ++j)
        store(planes + (i * t + j) * plane + at,
              join(MakeIndices<kWidth>{}, low[i][j], high[i][j]));
  }
}

template <int M>
constexpr WinogradTransforms transforms = {input_channels<M>, weight_panel<M>, output_channels<M>,
                                           nullptr, nullptr};

}  // namespace

const TwoTapTable& two_tap_table() {
  static constexpr TwoTapTable table = {transforms<3>, transforms<4>};
  return table;
}

}  // namespace nnarch::NNARCH_ISA
