// The transforms of Winograd's algorithm with a stride of 2; winograd_strided.h says of what.
#include "conv2d/winograd_strided.h"

#include "conv2d/winograd_transforms_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class Matrix>
struct Transposed {
  static constexpr int rows = Matrix::columns, columns = Matrix::rows;
  static constexpr double at(int i, int j) { return Matrix::at(j, i); }
};

// put(i, j, v) for every v of Rows · d · Columnsᵀ, with d[i][j] = get(i, j).
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

// The phase that begins with tap (Y, X), and where its values are among all.
template <int M, int R, int Y, int X>
struct Phase {
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

// In double, as winograd_transforms_isa.h's.
template <int M, int R>
void phases_weight(const float* packed, int64_t count, float* values, const int64_t* at,
                   const float* const* ahead, int64_t lines) {
  const int64_t tap = count * 2 * kWidth;
  for (int64_t w = 0; w < tap; w += kWidth) {
    for (int64_t i = lines * w / tap; i < lines * (w + kWidth) / tap; ++i)
      __builtin_prefetch(ahead[i], 0, 2);
    for_phases<M, R>([&](auto phase) NNARCH_INLINE_LAMBDA {
      using P = decltype(phase);
      using Rows = WeightMatrix<M, P::taps_y>;
      using Columns = WeightMatrix<M, P::taps_x>;
      Vec<double> low[P::rows][P::columns];
      transform_tile<Rows, Columns, Vec<double>>(
          [&](int i, int j)
              NNARCH_INLINE_LAMBDA { return to_double(packed + P::tap(i, j) * tap + w); },
          [&](int i, int j, Vec<double> v) NNARCH_INLINE_LAMBDA { low[i][j] = v; });
      transform_tile<Rows, Columns, Vec<double>>(
          [&](int i, int j) NNARCH_INLINE_LAMBDA {
            return to_double(packed + P::tap(i, j) * tap + w + kWidth / 2);
          },
          [&](int i, int j, Vec<double> v) NNARCH_INLINE_LAMBDA {
            float* const to = values + at[P::value(i, j)] + w;
            __builtin_prefetch(to + 8 * kWidth, 1, 2);
            store(to, rounded(low[i][j], v));
          });
    });
  }
}

template <int M, int R>
void phases_weight_grad(const float* values, const int64_t* at, const int64_t* next,
                        int64_t channels, float* dw, int64_t tap, bool past_caches) {
  const bool stream_out = past_caches && kVectorBytes == 64;
  for (int64_t c = 0; c < channels; c += kWidth)
    for_phases<M, R>([&](auto phase) NNARCH_INLINE_LAMBDA {
      using P = decltype(phase);
      transform_tile<Transposed<WeightMatrix<M, P::taps_y>>, Transposed<WeightMatrix<M, P::taps_x>>,
                     V>(
          [&](int i, int j) NNARCH_INLINE_LAMBDA {
            __builtin_prefetch(values + next[P::value(i, j)] + c, 0, 2);
            return load(values + at[P::value(i, j)] + c);
          },
          [&](int i, int j, V v) NNARCH_INLINE_LAMBDA {
            float* const to = dw + P::tap(i, j) * tap + c;
            if (stream_out)
              stream(to, v);
            else
              store_n(to, v, channels - c);
          });
    });
  if (stream_out) finish_streaming();
}

template <int M, int R>
constexpr StridedTransforms kStrided = {R,
                                        M,
                                        phases_input<M, R>,
                                        phases_input_grad<M, R>,
                                        spread_channels<Transposed<OutputMatrix<M, (R + 1) / 2>>>,
                                        output_channels<M, (R + 1) / 2>,
                                        phases_weight<M, R>,
                                        phases_weight_grad<M, R>};

}  // namespace

const StridedTransforms& strided_nine_taps() { return kStrided<3, 9>; }

}  // namespace nnarch::NNARCH_ISA
