// Narrow groups (grouped.h). The input rows under an output row lie in a ring, one vector a pixel
// and zeros beside the image, so that every pixel is copied once. A strip of outputs runs along
// them: a pixel is loaded and spread to the lanes of its groups once for every input channel and
// kernel row, and serves all kernel columns.
//
// Keeping the spread vectors, instead of the pixels, in the ring took a third of the time: a store
// of 64 bytes takes two cycles (Zen 4), a spread a fraction of one beside the multiply-adds.
#include "conv2d/grouped_isa.h"
#include "depthwise/cpu_strip.h"

namespace nnarch::NNARCH_ISA {
namespace {

// An input row, in the ring, and the weights of the kernel rows that meet it in the computation of
// the first and the second output row: [depth][s][lanes], or null.
template <class T>
struct SpreadRow {
  const T *x, *first, *second;
};

// P outputs of one row, or of two, and one vector of channels.
template <class T>
struct SpreadStrip {
  Strip<T> out;              // where the sums go
  const SpreadRow<T>* rows;  // ends with a row at null
  const int32_t* lane;
  int64_t x;                           // of the first column, in the rows
  int64_t depth, s, stride, dilation;  // of columns
};

// One output row for narrow vectors: they have half the registers.
inline constexpr int kStripRows = kVectorBytes == 64 ? 2 : 1;

template <class T, int S>
NNARCH_INLINE void load_taps(const T* w, Vec<T>* weight) {
  for (int s = 0; s < S; ++s) weight[s] = load(w + s * kLanes<T>);
}

// What column I of an input row adds to the first output row, the second, or both.
template <class T, int S, int STRIDE, int P, bool FIRST, bool SECOND, int I>
NNARCH_INLINE void use_spread(Vec<T> value, const Vec<T>* weight, Vec<T>* acc) {
  keep_in_register(value);
  if constexpr (FIRST) use_pixel<T, S, STRIDE, P, I>(value, weight, acc, MakeIndices<S>{});
  if constexpr (SECOND) use_pixel<T, S, STRIDE, P, I>(value, weight + S, acc + P, MakeIndices<S>{});
}

template <class T, int S, int STRIDE, int P, bool BROADCAST, bool FIRST, bool SECOND, int... I>
NNARCH_INLINE void input_row(const SpreadStrip<T>& a, const SpreadRow<T>& row, Vec<T>* acc,
                             Indices<I...>) {
  constexpr int lanes = kLanes<T>;
  const T *x = row.x + a.x * lanes, *first = row.first, *second = row.second;
  for (int64_t c = 0; c < a.depth; ++c) {
    Vec<T> weight[2 * S];
    if constexpr (FIRST) load_taps<T, S>(first + c * S * lanes, weight);
    if constexpr (SECOND) load_taps<T, S>(second + c * S * lanes, weight + S);
    const LaneIndex<T> lane = load_lanes<T>(a.lane + c * lanes);
    (use_spread<T, S, STRIDE, P, FIRST, SECOND, I>(of_group<BROADCAST>(x + I * lanes, c, lane),
                                                   weight, acc),
     ...);
  }
}

// Kernels of width S without dilation of columns.
template <class T, int S, int STRIDE, int P, int ROWS, bool BROADCAST>
void strip_of_width(const SpreadStrip<T>& a) {
  constexpr MakeIndices<(P - 1) * STRIDE + S> columns;
  Vec<T> acc[ROWS * P];
  start<T, ROWS * P>(*a.out.epilogue, 0, acc);
  for (const SpreadRow<T>* row = a.rows; row->x != nullptr; ++row) {
    if constexpr (ROWS == 2) {
      if (row->first && row->second)
        input_row<T, S, STRIDE, P, BROADCAST, true, true>(a, *row, acc, columns);
      else if (row->second)
        input_row<T, S, STRIDE, P, BROADCAST, false, true>(a, *row, acc, columns);
    }
    if (row->first && (ROWS == 1 || !row->second))
      input_row<T, S, STRIDE, P, BROADCAST, true, false>(a, *row, acc, columns);
  }
  finish(a.out, 0, 0, acc, MakeIndices<P>{});
  if constexpr (ROWS == 2) finish(a.out, 0, 1, acc + P, MakeIndices<P>{});
}

template <class T, int... I>
NNARCH_INLINE void tap_of_channel(const T* x, int64_t step, LaneIndex<T> lane, Vec<T> weight,
                                  Vec<T>* acc, Indices<I...>) {
  ((acc[I] += spread(load(x + I * step), lane) * weight), ...);
}

// Any kernel: a load for every multiply-add.
template <class T, int P>
void strip_of_any_width(const SpreadStrip<T>& a) {
  constexpr int lanes = kLanes<T>;
  Vec<T> acc[P];
  start<T, P>(*a.out.epilogue, 0, acc);
  for (const SpreadRow<T>* row = a.rows; row->x != nullptr; ++row) {
    const T* w = row->first;
    for (int64_t c = 0; c < a.depth; ++c)
      for (int64_t s = 0; s < a.s; ++s, w += lanes)
        tap_of_channel<T>(row->x + (a.x + s * a.dilation) * lanes, a.stride * lanes,
                          load_lanes<T>(a.lane + c * lanes), load(w), acc, MakeIndices<P>{});
  }
  finish(a.out, 0, 0, acc, MakeIndices<P>{});
}

template <class T>
struct StripCode {
  void (*run)(const SpreadStrip<T>&);
  int64_t rows;
};

template <class T, int S, int P, int ROWS, bool BROADCAST>
StripCode<T> code_of_width(const GroupedConv<T>& a) {
  if (a.stride_w == 1) return {strip_of_width<T, S, 1, P, ROWS, BROADCAST>, ROWS};
  if (a.stride_w == 2) return {strip_of_width<T, S, 2, P, ROWS, BROADCAST>, ROWS};
  return {strip_of_any_width<T, P>, 1};
}

template <class T, int P>
StripCode<T> code_of_length(const GroupedConv<T>& a) {
  if (a.dilation_w == 1 && a.s == 3) {
    const bool broadcast = a.outputs == kLanes<T>;
    if (a.last - a.first < kStripRows)
      return broadcast ? code_of_width<T, 3, P, 1, true>(a) : code_of_width<T, 3, P, 1, false>(a);
    return broadcast ? code_of_width<T, 3, P, kStripRows, true>(a)
                     : code_of_width<T, 3, P, kStripRows, false>(a);
  }
  if (a.dilation_w == 1 && a.s == 1) return code_of_width<T, 1, P, 1, false>(a);
  if (a.dilation_w == 1 && a.s == 5) return code_of_width<T, 5, P, 1, false>(a);
  return {strip_of_any_width<T, P>, 1};
}

template <class T>
StripCode<T> code_of(const GroupedConv<T>& a, int64_t pixels) {
  switch (pixels) {
    case 8:
      return code_of_length<T, 8>(a);
    case 7:
      return code_of_length<T, 7>(a);
    case 4:
      return code_of_length<T, 4>(a);
    default:
      return code_of_length<T, 1>(a);
  }
}

// The ring: `span` rows of `width` pixels. Where y is no rows of pixels, output rows are staged
// before they are transposed.
template <class T>
struct RingShape {
  int64_t width, pitch, span, staged;
  explicit RingShape(const GroupedConv<T>& a)
      : width((a.ow - 1) * a.stride_w + (a.s - 1) * a.dilation_w + 1),
        pitch(width * kLanes<T>),
        span((a.r - 1) * a.dilation_h + 1 + (kStripRows - 1) * a.stride_h),
        staged(a.y_channel == 1 ? 0 : kStripRows * a.ow * kLanes<T>) {}
  int64_t size() const { return pitch * span; }
  // The ring, the stage and the SpreadRows.
  int64_t bytes() const {
    return (size() + staged) * static_cast<int64_t>(sizeof(T)) +
           (span + 1) * static_cast<int64_t>(sizeof(SpreadRow<T>));
  }
};

// The activations that are no clamp, over stored sums.
template <class T>
NNARCH_NOINLINE void activate_pixels(const Strip<T>& out, int64_t row, int64_t pixels) {
  const int64_t n = smaller(out.channels, kLanes<T>);
  T* y = out.y + row * out.y_row;
  for (int64_t i = 0; i < pixels; ++i, y += out.y_pixel)
    store_n(y, activate<T>(load_n(y, n), out.epilogue->activation, out.epilogue->alpha), n);
}

// The strips of the output rows from oy on, whose input rows are in the ring.
template <class T>
void run_rows(const GroupedConv<T>& a, SpreadStrip<T>& strip, const StripCode<T>& code,
              int64_t pixels, int64_t oy, T* stage) {
  T* y = stage ? stage : a.y + oy * a.y_row;
  const T* residual = a.epilogue.residual ? a.epilogue.residual + oy * a.y_row : nullptr;
  for (int64_t x = 0; x < a.ow; x += pixels) {
    const int64_t at = smaller(x, a.ow - pixels);  // the last strip ends with the row
    strip.x = at * a.stride_w;
    strip.out.y = y + at * strip.out.y_pixel;
    if (residual) strip.out.residual = residual + at * a.y_pixel;
    code.run(strip);
    if (is_clamp(a.epilogue.activation)) continue;
    for (int64_t row = 0; row < code.rows; ++row) activate_pixels(strip.out, row, pixels);
  }
  if (!stage) return;
  for (int64_t row = 0; row < code.rows; ++row)
    transpose_kernel<T>()(stage + row * strip.out.y_row, strip.out.y_pixel,
                          a.y + (oy + row) * a.y_row, a.y_channel, a.ow,
                          smaller(a.channels, kLanes<T>));
}

template <class T>
SpreadStrip<T> strip_of(const GroupedConv<T>& a) {
  SpreadStrip<T> strip{{}, nullptr, a.lane, 0, a.depth, a.s, a.stride_w, a.dilation_w};
  const bool staged = a.y_channel != 1;
  strip.out.y_pixel = strip.out.residual_pixel = staged ? kLanes<T> : a.y_pixel;
  strip.out.y_row = strip.out.residual_row = staged ? a.ow * kLanes<T> : a.y_row;
  strip.out.channels = a.channels;
  strip.out.epilogue = &a.epilogue;
  strip.out.stream = a.stream;
  return strip;
}

// The weights of the kernel row at row `i` under an output row; null where there is none.
template <class T>
const T* weight_at(const GroupedConv<T>& a, int64_t i) {
  if (i < 0 || i >= a.r * a.dilation_h || i % a.dilation_h != 0) return nullptr;
  return a.weight + i / a.dilation_h * a.depth * a.s * kLanes<T>;
}

template <class T>
void run(const GroupedConv<T>& a) {
  const RingShape<T> ring(a);
  T* stage = a.y_channel == 1 ? nullptr : a.scratch + ring.size();
  auto* rows = reinterpret_cast<SpreadRow<T>*>(a.scratch + ring.size() + ring.staged);
  const int64_t pixels = strip_pixels(a.s, a.ow);
  const StripCode<T> code = code_of(a, pixels);
  SpreadStrip<T> strip = strip_of(a);
  strip.rows = rows;
  const int64_t span = ring.span - (kStripRows - code.rows) * a.stride_h;
  int64_t next = a.first * a.stride_h + a.row;  // the first input row that is not in the ring
  for (int64_t y = a.first; y < a.last; y += code.rows) {
    const int64_t oy = smaller(y, a.last - code.rows);  // the last rows end with the image
    const int64_t top = oy * a.stride_h + a.row;
    next = fill_ring(a, larger(next, top), top + span, ring.width, ring.span, a.scratch);
    for (int64_t i = 0; i < code.rows * a.stride_h && next + i < a.h; ++i)
      fetch_row(a.x + (next + i) * a.x_row, a.w, a.x_pixel, a.x_channel, a.inputs);
    for (int64_t i = 0; i < code.rows && !a.stream; ++i)
      fetch_row(a.y + (oy + i) * a.y_row, a.ow, a.y_pixel, a.y_channel,
                smaller(a.channels, kLanes<T>));
    int64_t count = 0;
    for (int64_t i = 0, iy = top; i < span; ++i, ++iy) {
      const T* second = code.rows == 2 ? weight_at(a, i - a.stride_h) : nullptr;
      const SpreadRow<T> row{a.scratch + (iy - a.row) % ring.span * ring.pitch, weight_at(a, i),
                             second};
      if (iy >= 0 && iy < a.h && (row.first || row.second)) rows[count++] = row;
    }
    rows[count] = {nullptr, nullptr, nullptr};
    run_rows(a, strip, code, pixels, oy, stage);
  }
  if (a.stream) finish_streaming();
}

}  // namespace

template <>
int64_t grouped_lanes<float>() {
  return kLanes<float>;
}
template <>
int64_t grouped_lanes<double>() {
  return kLanes<double>;
}
template <>
int64_t grouped_scratch_bytes<float>(const GroupedConv<float>& conv) {
  return RingShape<float>(conv).bytes();
}
template <>
int64_t grouped_scratch_bytes<double>(const GroupedConv<double>& conv) {
  return RingShape<double>(conv).bytes();
}
template <>
void grouped_run<float>(const GroupedConv<float>& conv) {
  run(conv);
}
template <>
void grouped_run<double>(const GroupedConv<double>& conv) {
  run(conv);
}

}  // namespace nnarch::NNARCH_ISA
