// The weight gradient of narrow groups: dw[r][c][s] += Σ grad · spread_c(input), vector by vector
// of output channels. P pixels of grad stay in registers; an input pixel that is spread for a
// channel meets all kernel columns, as in the forward pass.
#include "conv2d/grouped_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

// Input channels whose S sums stay in registers along a row.
inline constexpr int kChannelsAtOnce = kVectorBytes == 64 ? 4 : 2;

// A row of grad, [pixel][lanes], and the input row that one of its kernel rows meets.
template <class T>
struct GradRow {
  const T *g, *x;
  int64_t blocks;  // of P pixels
  const int32_t* lane;
  T* dw;  // [depth][s][lanes]
};

template <bool DO, class V>
NNARCH_INLINE void add_if(V& sum, V a, V b) {
  if constexpr (DO) sum += a * b;
}

// Input column I of a block: with kernel column J it belongs to output pixel (I − J) / STRIDE.
template <class T, int STRIDE, int P, int I, int... J>
NNARCH_INLINE void add_column(Vec<T> value, const Vec<T>* g, Vec<T>* acc, Indices<J...>) {
  (add_if < I >= J && (I - J) % STRIDE == 0 &&
       (I - J) / STRIDE<P>(acc[J], value, g[I >= J && (I - J) / STRIDE < P ? (I - J) / STRIDE : 0]),
   ...);
}

template <class T, int S, int STRIDE, int P, bool BROADCAST, int I, int... C>
NNARCH_INLINE void add_pixel(const T* x, const LaneIndex<T>* lane, const Vec<T>* g, Vec<T>* acc,
                             Indices<C...>) {
  (add_column<T, STRIDE, P, I>(of_group<BROADCAST>(x + I * kLanes<T>, C, lane[C]), g, acc + C * S,
                               MakeIndices<S>{}),
   ...);
}

template <class T, int S, int STRIDE, int P, bool BROADCAST, int CHANNELS, int... I>
NNARCH_INLINE void add_block(const T* x, const T* g, const LaneIndex<T>* lane, Vec<T>* acc,
                             Indices<I...>) {
  Vec<T> pixels[P];
  for (int p = 0; p < P; ++p) pixels[p] = load(g + p * kLanes<T>);
  (add_pixel<T, S, STRIDE, P, BROADCAST, I>(x, lane, pixels, acc, MakeIndices<CHANNELS>{}), ...);
}

template <class T, int S, int STRIDE, int P, bool BROADCAST, int CHANNELS>
NNARCH_INLINE void row_of_channels(const GradRow<T>& a, int64_t c) {
  constexpr int lanes = kLanes<T>, sums = CHANNELS * S;
  LaneIndex<T> lane[CHANNELS];
  for (int i = 0; i < CHANNELS; ++i) lane[i] = load_lanes<T>(a.lane + (c + i) * lanes);
  T* dw = a.dw + c * S * lanes;
  Vec<T> acc[sums];
  for (int i = 0; i < sums; ++i) acc[i] = load(dw + i * lanes);
  const T *x = a.x + (BROADCAST ? c : 0), *g = a.g;
  for (int64_t b = 0; b < a.blocks; ++b, x += P * STRIDE * lanes, g += P * lanes)
    add_block<T, S, STRIDE, P, BROADCAST, CHANNELS>(x, g, lane, acc,
                                                    MakeIndices<(P - 1) * STRIDE + S>{});
  for (int i = 0; i < sums; ++i) store(dw + i * lanes, acc[i]);
}

template <class T, int S, int STRIDE, int P, bool BROADCAST>
void row(const GradRow<T>& a, int64_t depth) {
  int64_t c = 0;
  for (; c + kChannelsAtOnce <= depth; c += kChannelsAtOnce)
    row_of_channels<T, S, STRIDE, P, BROADCAST, kChannelsAtOnce>(a, c);
  for (; c < depth; ++c) row_of_channels<T, S, STRIDE, P, BROADCAST, 1>(a, c);
}

template <class T>
struct RowCode {
  void (*run)(const GradRow<T>&, int64_t depth);
  int64_t pixels;  // of a block
};

template <class T, int S, int STRIDE, bool BROADCAST>
RowCode<T> code_for_row(int64_t ow) {
  // Blocks past the end of a row meet zeros.
  constexpr int few = 4, many = kVectorBytes == 64 ? 7 : 4;
  if (ceil_div(ow, many) * many <= ceil_div(ow, few) * few)
    return {row<T, S, STRIDE, many, BROADCAST>, many};
  return {row<T, S, STRIDE, few, BROADCAST>, few};
}

template <class T, int S, int STRIDE>
RowCode<T> code_for(const GroupedConv<T>& a) {
  if (S == 3 && a.outputs == kLanes<T>) return code_for_row<T, S, STRIDE, S == 3>(a.ow);
  return code_for_row<T, S, STRIDE, false>(a.ow);
}

template <class T>
RowCode<T> code_of(const GroupedConv<T>& a) {
  if (a.dilation_w == 1 && a.s == 3 && a.stride_w == 1) return code_for<T, 3, 1>(a);
  if (a.dilation_w == 1 && a.s == 3 && a.stride_w == 2) return code_for<T, 3, 2>(a);
  if (a.dilation_w == 1 && a.s == 5 && a.stride_w == 1) return code_for<T, 5, 1>(a);
  if (a.s == 1 && a.stride_w == 1) return code_for<T, 1, 1>(a);
  return {nullptr, 0};
}

template <class T>
struct GradScratch {
  int64_t columns, width, span;  // output pixels of a row, with those past its end; of the ring
  GradScratch(const GroupedConv<T>& a, int64_t pixels)
      : columns(ceil_div(a.ow, pixels) * pixels),
        width((columns - 1) * a.stride_w + a.s),
        span((a.r - 1) * a.dilation_h + 1) {}
  int64_t size() const { return (columns + span * width) * kLanes<T>; }
};

template <class T>
void copy_grad(const GroupedConv<T>& a, int64_t oy, int64_t columns, T* dst) {
  constexpr int64_t lanes = kLanes<T>;
  load_pixels(static_cast<const T*>(a.y) + oy * a.y_row, a.y_pixel, a.y_channel, dst, lanes, a.ow,
              smaller(a.channels, lanes));
  clear(dst + a.ow * lanes, (columns - a.ow) * lanes);
}

template <class T>
void run(const GroupedConv<T>& a, T* dw) {
  const RowCode<T> code = code_of(a);
  const GradScratch<T> shape(a, code.pixels);
  T *g = a.scratch, *ring = g + shape.columns * kLanes<T>;
  const int64_t weight_row = a.depth * a.s * kLanes<T>;
  int64_t next = a.first * a.stride_h + a.row;
  for (int64_t oy = a.first; oy < a.last; ++oy) {
    const int64_t top = oy * a.stride_h + a.row;
    next = fill_ring(a, larger(next, top), top + shape.span, shape.width, shape.span, ring);
    copy_grad(a, oy, shape.columns, g);
    for (int64_t i = 0; i < a.stride_h && next + i < a.h; ++i)
      fetch_row(a.x + (next + i) * a.x_row, a.w, a.x_pixel, a.x_channel, a.inputs);
    if (oy + 1 < a.last)
      fetch_row(static_cast<const T*>(a.y) + (oy + 1) * a.y_row, a.ow, a.y_pixel, a.y_channel,
                smaller(a.channels, kLanes<T>));
    for (int64_t r = 0, iy = top; r < a.r; ++r, iy += a.dilation_h)
      if (iy >= 0 && iy < a.h)
        code.run({g, ring + (iy - a.row) % shape.span * shape.width * kLanes<T>,
                  shape.columns / code.pixels, a.lane, dw + r * weight_row},
                 a.depth);
  }
}

}  // namespace

template <>
int64_t grouped_grad_scratch<float>(const GroupedConv<float>& conv) {
  const RowCode<float> code = code_of(conv);
  return code.run ? GradScratch<float>(conv, code.pixels).size() : 0;
}
template <>
int64_t grouped_grad_scratch<double>(const GroupedConv<double>& conv) {
  const RowCode<double> code = code_of(conv);
  return code.run ? GradScratch<double>(conv, code.pixels).size() : 0;
}
template <>
void grouped_grad_run<float>(const GroupedConv<float>& conv, float* dw) {
  run(conv, dw);
}
template <>
void grouped_grad_run<double>(const GroupedConv<double>& conv, double* dw) {
  run(conv, dw);
}

}  // namespace nnarch::NNARCH_ISA
