// The transforms of Winograd's algorithm with a stride of 2; winograd_strided.h says of what.
#include "conv2d/winograd_strided.h"

#include "conv2d/winograd_transforms_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class Matrix>
struct Transposed {
  static constexpr int rows = Matrix::columns, columns = Matrix::rows, points = Matrix::points;
  static constexpr int point(int i) { return Matrix::point(i); }
  static constexpr double at(int i, int j) { return Matrix::at(j, i); }
};

// The phase that begins with tap (Y, X), and where its values are among all.
template <int M, int R, int Y, int X>
struct Phase {
  static constexpr int phase_y = Y, phase_x = X;
  static constexpr int taps_y = (R + 1 - Y) / 2, taps_x = (R + 1 - X) / 2;
  static constexpr int rows = M + taps_y - 1, columns = M + taps_x - 1;
  static constexpr int even = M + (R + 1) / 2 - 1, all = even + M + R / 2 - 1;
  static constexpr int first = Y * even * all + X * rows * even;
  static constexpr int value(int i, int j) { return first + i * columns + j; }
  static constexpr int tap(int i, int j) { return (2 * i + Y) * R + 2 * j + X; }
};

template <int M, int R, class F>
NNARCH_INLINE void for_phases(const F& f) {
  f(Phase<M, R, 0, 0>{}), f(Phase<M, R, 0, 1>{}), f(Phase<M, R, 1, 0>{}), f(Phase<M, R, 1, 1>{});
}

template <int M, int R>
void phases_input(const float* const* pixels, int64_t channels, int64_t padded, float* values,
                  const int64_t* at, const int64_t* next) {
  for (int64_t c = 0; c < padded; c += kWidth) {
    const int64_t left = channels - c, count = left < 0 ? 0 : left < kWidth ? left : kWidth;
    for_phases<M, R>([&](auto phase) NNARCH_INLINE_LAMBDA {
      using P = decltype(phase);
      const auto put = [&](int i, int j, V v) NNARCH_INLINE_LAMBDA {
        __builtin_prefetch(values + next[P::value(i, j)] + c, 1, 2);
        store(values + at[P::value(i, j)] + c, v);
      };
      using Rows = InputMatrix<M, P::taps_y>;
      using Columns = InputMatrix<M, P::taps_x>;
      if (count == kWidth)
        transform_tile<Rows, Columns, V>(
            [&](int i, int j) NNARCH_INLINE_LAMBDA { return load(pixels[P::value(i, j)] + c); },
            put);
      else
        transform_tile<Rows, Columns, V>(
            [&](int i, int j)
                NNARCH_INLINE_LAMBDA { return load_n(pixels[P::value(i, j)] + c, count); },
            put);
    });
  }
}

template <int M, int R>
void phases_input_grad(const float* values, const int64_t* at, const int64_t* next,
                       int64_t channels, float* const* pixels) {
  for (int64_t c = 0; c < channels; c += kWidth)
    for_phases<M, R>([&](auto phase) NNARCH_INLINE_LAMBDA {
      using P = decltype(phase);
      transform_tile<Transposed<InputMatrix<M, P::taps_y>>, Transposed<InputMatrix<M, P::taps_x>>,
                     V>(
          [&](int i, int j) NNARCH_INLINE_LAMBDA {
            __builtin_prefetch(values + next[P::value(i, j)] + c, 0, 2);
            return load(values + at[P::value(i, j)] + c);
          },
          [&](int i, int j, V v) NNARCH_INLINE_LAMBDA {
            float* to = pixels[P::value(i, j)] + c;
            if (channels - c >= kWidth)
              store(to, load(to) + v);
            else
              store_n(to, load_n(to, channels - c) + v, channels - c);
          });
    });
}

// Values of a weight are rounded once, and used in every product.
template <int M, int R>
void phases_weight(const TapWeights& from, float* values, const int64_t* at, const Lines& ahead) {
  const int64_t count = from.channels * 2 * kWidth;
  for (int64_t w = 0; w < count; w += kWidth) {
    for (int64_t i = ahead.count * w / count; i < ahead.count * (w + kWidth) / count; ++i)
      __builtin_prefetch(ahead.data + ahead.offsets[i], 0, 2);
    const float* const weights = weights_at(from, w);
    for_phases<M, R>([&](auto phase) NNARCH_INLINE_LAMBDA {
      using P = decltype(phase);
      transform_halves<WeightMatrix<M, P::taps_y>, WeightMatrix<M, P::taps_x>>(
          [&](int i, int j) NNARCH_INLINE_LAMBDA { return weights + from.taps[P::tap(i, j)]; },
          [&](int i, int j, V v) NNARCH_INLINE_LAMBDA {
            float* const to = values + at[P::value(i, j)] + w;
            __builtin_prefetch(to + 8 * kWidth, 1, 2);
            store(to, v);
          });
    });
  }
}

template <int M, int R>
void phases_weight_grad(const float* values, const int64_t* at, const int64_t* next,
                        int64_t channels, float* dw, int64_t tap) {
  for (int64_t c = 0; c < channels; c += kWidth)
    for_phases<M, R>([&](auto phase) NNARCH_INLINE_LAMBDA {
      using P = decltype(phase);
      transform_tile<Transposed<WeightMatrix<M, P::taps_y>>, Transposed<WeightMatrix<M, P::taps_x>>,
                     V>(
          [&](int i, int j) NNARCH_INLINE_LAMBDA {
            __builtin_prefetch(values + next[P::value(i, j)] + c, 0, 2);
            return load(values + at[P::value(i, j)] + c);
          },
          [&](int i, int j, V v)
              NNARCH_INLINE_LAMBDA { store_n(dw + P::tap(i, j) * tap + c, v, channels - c); });
    });
}

// Where value (i, j) of a phase lies among planes and slots, with M, R as above.
template <int M, int R, class P>
struct Place {
  static constexpr WinogradTile tile{M, R, R, 2};
  static constexpr int64_t x(int j) { return tile.point(R, P::phase_x, j); }
  static constexpr int64_t plane(int i, int j) {
    return tile.point(R, P::phase_y, i) * tile.point_columns() + x(j);
  }
  static constexpr int64_t slot(int j) { return P::phase_y * tile.phases_at(R, x(j)) + P::phase_x; }
};

// The transforms below are those of winograd.h; channels are whole vectors.
template <int M, int R>
void strided_input(const float* const* pixels, int64_t channels, float* planes, int64_t plane,
                   int64_t slot) {
  constexpr WinogradTile tile{M, R, R, 2};
  for (int64_t c = 0; c < channels; c += kWidth)
    for_phases<M, R>([&](auto phase) NNARCH_INLINE_LAMBDA {
      using P = decltype(phase);
      using At = Place<M, R, P>;
      transform_tile<InputMatrix<M, P::taps_y>, InputMatrix<M, P::taps_x>, V>(
          [&](int i, int j) NNARCH_INLINE_LAMBDA {
            const int64_t row = 2 * i + P::phase_y, column = 2 * j + P::phase_x;
            return load(pixels[row * tile.window_columns() + column] + c);
          },
          [&](int i, int j, V v) NNARCH_INLINE_LAMBDA {
            store(planes + At::plane(i, j) * plane + At::slot(j) * slot + c, v);
          });
    });
}

// Where the planes of transformed weights begin.
void locate_planes(const WinogradTile& tile, int64_t slot, int64_t gap, int64_t* begin) {
  int64_t before = 0;
  for (int64_t xi = 0; xi < tile.planes(); ++xi) {
    begin[xi] = before * slot + xi * gap;
    before += tile.slots(xi);
  }
}

template <int M, int R>
void strided_weight(const TapWeights& from, float* values, int64_t slot, int64_t gap) {
  constexpr WinogradTile tile{M, R, R, 2};
  int64_t begin[tile.planes()], at[tile.values()];
  locate_planes(tile, slot, gap, begin);
  for_phases<M, R>([&](auto phase) {
    using P = decltype(phase);
    using At = Place<M, R, P>;
    for (int i = 0; i < P::rows; ++i)
      for (int j = 0; j < P::columns; ++j)
        at[P::value(i, j)] = begin[At::plane(i, j)] + At::slot(j) * slot;
  });
  phases_weight<M, R>(from, values, at, {});
}

NNARCH_INLINE void put_line(float* to, V v, bool stream_out) {
  stream_out ? stream(to, v) : store(to, v);
}

template <int M, int R>
void strided_weight_grad(const float* planes, int64_t plane, int64_t slot, int64_t channels,
                         float* dw, int64_t tap, bool stream_out) {
  for (int64_t c = 0; c < channels; c += kWidth)
    for_phases<M, R>([&](auto phase) NNARCH_INLINE_LAMBDA {
      using P = decltype(phase);
      using At = Place<M, R, P>;
      transform_tile<Transposed<WeightMatrix<M, P::taps_y>>, Transposed<WeightMatrix<M, P::taps_x>>,
                     V>(
          [&](int i, int j) NNARCH_INLINE_LAMBDA {
            return load(planes + At::plane(i, j) * plane + At::slot(j) * slot + c);
          },
          [&](int i, int j, V v)
              NNARCH_INLINE_LAMBDA { put_line(dw + P::tap(i, j) * tap + c, v, stream_out); });
    });
  if (stream_out) finish_streaming();
}

// The same for R taps in a line, a row or a column alike: its two phases, in a tile of M outputs.
template <int M, int R, int X>
struct LinePhase {
  static constexpr WinogradTile tile{M, 1, R, 2};
  static constexpr int taps = (R + 1 - X) / 2;
  static constexpr int64_t plane(int j) { return tile.point(R, X, j); }
  static constexpr int64_t slot(int j) { return tile.phases_at(R, plane(j)) == 2 ? X : 0; }
  static constexpr int tap(int j) { return 2 * j + X; }
};

template <int M, int R, class F>
NNARCH_INLINE void for_line_phases(const F& f) {
  f(LinePhase<M, R, 0>{}), f(LinePhase<M, R, 1>{});
}

template <int M, int R>
void line_input(const float* const* pixels, int64_t channels, float* planes, int64_t plane,
                int64_t slot) {
  for (int64_t c = 0; c < channels; c += kWidth)
    for_line_phases<M, R>([&](auto phase) NNARCH_INLINE_LAMBDA {
      using P = decltype(phase);
      transform_tile<NoMatrix, InputMatrix<M, P::taps>, V>(
          [&](int, int j) NNARCH_INLINE_LAMBDA { return load(pixels[P::tap(j)] + c); },
          [&](int, int j, V v) NNARCH_INLINE_LAMBDA {
            store(planes + P::plane(j) * plane + P::slot(j) * slot + c, v);
          });
    });
}

template <int M, int R>
void line_weight(const TapWeights& from, float* values, int64_t slot, int64_t gap) {
  constexpr WinogradTile tile{M, 1, R, 2};
  int64_t begin[tile.planes()];
  locate_planes(tile, slot, gap, begin);
  for (int64_t w = 0; w < from.channels * 2 * kWidth; w += kWidth) {
    const float* const weights = weights_at(from, w);
    for_line_phases<M, R>([&](auto phase) NNARCH_INLINE_LAMBDA {
      using P = decltype(phase);
      transform_halves<NoMatrix, WeightMatrix<M, P::taps>>(
          [&](int, int j) NNARCH_INLINE_LAMBDA { return weights + from.taps[P::tap(j)]; },
          [&](int, int j, V v) NNARCH_INLINE_LAMBDA {
            store(values + begin[P::plane(j)] + P::slot(j) * slot + w, v);
          });
    });
  }
}

template <int M, int R>
void line_weight_grad(const float* planes, int64_t plane, int64_t slot, int64_t channels, float* dw,
                      int64_t tap, bool stream_out) {
  for (int64_t c = 0; c < channels; c += kWidth)
    for_line_phases<M, R>([&](auto phase) NNARCH_INLINE_LAMBDA {
      using P = decltype(phase);
      transform_tile<NoMatrix, Transposed<WeightMatrix<M, P::taps>>, V>(
          [&](int, int j) NNARCH_INLINE_LAMBDA {
            return load(planes + P::plane(j) * plane + P::slot(j) * slot + c);
          },
          [&](int, int j, V v)
              NNARCH_INLINE_LAMBDA { put_line(dw + P::tap(j) * tap + c, v, stream_out); });
    });
  if (stream_out) finish_streaming();
}

// The gradient of the outputs goes the way of the outputs, back.
template <int M, int R>
using GradOf = Transposed<OutputMatrix<M, (R + 1) / 2>>;

template <int M, int R>
constexpr StridedTransforms kStrided = {
    R,
    M,
    phases_input<M, R>,
    phases_input_grad<M, R>,
    spread_channels<GradOf<M, R>, GradOf<M, R>>,
    output_channels<OutputMatrix<M, (R + 1) / 2>, OutputMatrix<M, (R + 1) / 2>>,
    phases_weight<M, R>,
    phases_weight_grad<M, R>};

template <int M>
constexpr WinogradTransforms kThreeTaps = {strided_input<M, 3>, strided_weight<M, 3>,
                                           output_channels<OutputMatrix<M, 2>, OutputMatrix<M, 2>>,
                                           spread_channels<GradOf<M, 3>, GradOf<M, 3>>,
                                           strided_weight_grad<M, 3>};
template <int M>
constexpr WinogradTransforms kThreeInRow = {
    line_input<M, 3>, line_weight<M, 3>, output_channels<NoMatrix, OutputMatrix<M, 2>>,
    spread_channels<NoMatrix, GradOf<M, 3>>, line_weight_grad<M, 3>};
template <int M>
constexpr WinogradTransforms kThreeInColumn = {
    line_input<M, 3>, line_weight<M, 3>, output_channels<OutputMatrix<M, 2>, NoMatrix>,
    spread_channels<GradOf<M, 3>, NoMatrix>, line_weight_grad<M, 3>};

template <int M>
const WinogradTransforms& three_taps(const WinogradTile& tile) {
  return tile.rows == 1 ? kThreeInRow<M> : tile.columns == 1 ? kThreeInColumn<M> : kThreeTaps<M>;
}

}  // namespace

const StridedTransforms& strided_nine_taps() { return kStrided<3, 9>; }

const WinogradTransforms& strided_three_taps(const WinogradTile& tile) {
  return tile.m == 2   ? three_taps<2>(tile)
         : tile.m == 3 ? three_taps<3>(tile)
                       : three_taps<4>(tile);
}

}  // namespace nnarch::NNARCH_ISA
