// Quads: the input gradient at stride 2, two rows by two columns of it at a time.
//
// In padded coordinates, row 2A of dx meets the even kernel rows 2j and row 2A + 1 the odd ones
// 2j + 1, both in grad row A - j; likewise for columns. So the J = (S + 1) / 2 rows and P + J - 1
// columns of grad under P neighbouring quads serve all S·S products of each: a loaded pixel of grad
// is used up to S times, and dx is written once, in rows. Four passes over strips, one for every
// remainder by the stride, took 116 µs for 64@112 at N 1 and 3640 at N 8; quads 73 and 1180.
#pragma once

#include "depthwise/cpu_block.h"

namespace nnarch::NNARCH_ISA {

template <int S>
inline constexpr int kQuadReach = (S + 1) / 2;

// P quads of one row of them.
template <class T>
struct QuadStrip {
  const T* const* rows;  // grad rows A - j; null outside the image
  int64_t x;             // where in them the column of the first quad is
  int64_t pixel;         // of grad
  const T* weight;       // in forward order
  int64_t weight_block;
  T* y[2];  // both rows of dx at the first quad; null outside the image
  int64_t y_pixel;
  int64_t channels;
  bool stream;
  bool has_column[4], has_output[2];  // of a quad at an edge: of grad in order, and of dx
};

// The products of a pixel of grad with the taps of row R and columns 2·D, 2·D + 1, for one quad.
template <class T, int S, int R, int D>
NNARCH_INLINE void use_in_quad(Vec<T> value, const Vec<T>* weight, Vec<T>* acc) {
  if constexpr (R < S && D >= 0 && 2 * D < S) {
    acc[0] += value * weight[2 * D];
    if constexpr (2 * D + 1 < S) acc[1] += value * weight[2 * D + 1];
  }
}

// Column I - (J - 1) of grad, counted from the first quad, for quads Q.
template <class T, int S, int ROW, int P, int I, int... Q>
NNARCH_INLINE void use_in_quads(Vec<T> value, const Vec<T>* weight, Vec<T>* acc, Indices<Q...>) {
  constexpr int column = I - (kQuadReach<S> - 1);
  (use_in_quad<T, S, 2 * ROW, Q - column>(value, weight, acc + 2 * Q), ...);
  (use_in_quad<T, S, 2 * ROW + 1, Q - column>(value, weight + S, acc + 2 * P + 2 * Q), ...);
}

template <class T, int S, int ROW>
NNARCH_INLINE void load_quad_weights(const T* w, Vec<T>* weight) {
  constexpr int taps = 2 * ROW + 1 < S ? 2 * S : S;
  for (int i = 0; i < taps; ++i) weight[i] = load(w + (2 * ROW * S + i) * kDepthwiseBlock);
}

template <class T, int S, int P, bool EDGE, int ROW, int I, bool WHOLE>
NNARCH_INLINE void quad_column(const QuadStrip<T>& a, const T*& x, const Steps& pixel,
                               const BlockLanes<T, WHOLE>& lanes, const Vec<T>* weight,
                               Vec<T>* acc) {
  if (EDGE && !a.has_column[I]) return;
  Vec<T> value = load_in_row<WHOLE>(step<I>(x, pixel), lanes.mask);
  keep_in_register(value);
  use_in_quads<T, S, ROW, P, I>(value, weight, acc, MakeIndices<P>{});
}

template <class T, int S, int P, bool EDGE, int ROW, bool WHOLE, int... I>
NNARCH_INLINE void quad_row(const QuadStrip<T>& a, const Steps& pixel,
                            const BlockLanes<T, WHOLE>& lanes, int64_t k, Vec<T>* acc,
                            Indices<I...>) {
  if (a.rows[ROW] == nullptr) return;
  Vec<T> weight[2 * S];
  load_quad_weights<T, S, ROW>(weight_of(a, k), weight);
  const T* x = a.rows[ROW] + a.x + k - (kQuadReach<S> - 1) * pixel.one;
  (quad_column<T, S, P, EDGE, ROW, I>(a, x, pixel, lanes, weight, acc), ...);
}

template <class T, int S, int P, bool EDGE, bool WHOLE, int... ROW>
NNARCH_INLINE void quad_rows(const QuadStrip<T>& a, const Steps& pixel,
                             const BlockLanes<T, WHOLE>& lanes, int64_t k, Vec<T>* acc,
                             Indices<ROW...>) {
  (quad_row<T, S, P, EDGE, ROW>(a, pixel, lanes, k, acc, MakeIndices<P + kQuadReach<S> - 1>{}),
   ...);
}

// Some neighbouring pixels of a row of dx.
template <class T, int... I>
NNARCH_INLINE void write_quads(const QuadStrip<T>& a, T* y, const Steps& y_pixel, int64_t n,
                               const Vec<T>* acc, Indices<I...> pixels) {
  if (a.stream)
    write_past_caches(y, y_pixel, acc, pixels);
  else
    write(y, y_pixel, n, acc, pixels);
}

// One vector of channels. A quad at an EDGE is alone: what lies outside the image is neither read
// nor written.
template <class T, int S, int P, bool EDGE, bool WHOLE>
NNARCH_INLINE void quad_vector(const QuadStrip<T>& a, const Steps& pixel, const Steps& y_pixel,
                               const BlockLanes<T, WHOLE>& lanes, int64_t k) {
  static_assert(P == 1 || !EDGE);
  Vec<T> acc[4 * P];
  for (int i = 0; i < 4 * P; ++i) acc[i] = Vec<T>{};
  quad_rows<T, S, P, EDGE>(a, pixel, lanes, k, acc, MakeIndices<kQuadReach<S>>{});
  const int64_t n = WHOLE ? kLanes<T> : a.channels - k;
  for (int r = 0; r < 2; ++r) {
    if (a.y[r] == nullptr) continue;
    if constexpr (!EDGE) {
      write_quads(a, a.y[r] + k, y_pixel, n, acc + r * 2 * P, MakeIndices<2 * P>{});
    } else {
      for (int c = 0; c < 2; ++c)
        if (a.has_output[c])
          write_quads(a, a.y[r] + c * y_pixel.one + k, y_pixel, n, acc + 2 * r + c,
                      MakeIndices<1>{});
    }
  }
}

template <class T, int S, int P, bool EDGE>
void quads(const QuadStrip<T>& a) {
  const Steps pixel(a.pixel), y_pixel(a.y_pixel);
  int64_t k = 0;
  for (; k + kLanes<T> <= a.channels; k += kLanes<T>)
    quad_vector<T, S, P, EDGE>(a, pixel, y_pixel, BlockLanes<T, true>{}, k);
  if (k < a.channels)
    quad_vector<T, S, P, EDGE>(a, pixel, y_pixel,
                               BlockLanes<T, false>{lanes_in_row<T>(k, a.channels)}, k);
}

}  // namespace nnarch::NNARCH_ISA
