// The part of the weight gradient that a task sums up.
#include "depthwise/cpu_kernels.h"
#include "depthwise/cpu_tile.h"

namespace nnarch::NNARCH_ISA {
namespace {

// One row of g against some kernel rows of x.
template <class T>
struct GradRow {
  const T* const* rows;  // of x, at the first tap of the first output
  const T* g;
  int64_t n;         // pixels of g
  int64_t channels;  // whole vectors
  int64_t g_pixel;
  int64_t x_step, x_tap;  // from one output to the next, from one tap to the next
  int64_t taps;           // of a kernel row
  T* partial;             // at the first of the kernel rows
  int64_t block;          // from one block of channels to the next
};

template <class T>
NNARCH_INLINE T* partial_of(const GradRow<T>& a, int64_t k) {
  return a.partial + k / kDepthwiseBlock * a.block + k % kDepthwiseBlock;
}

template <class T>
NNARCH_INLINE const T* next_tap(const T*& x, int64_t tap) {
  const T* here = x;
  x += tap;
  keep_pointer(x);
  return here;
}

// A pixel of g times the taps of one kernel row.
template <class T, int... J>
NNARCH_INLINE void add_taps(const T* x, int64_t tap, Vec<T> g, Vec<T>* sum, Indices<J...>) {
  ((sum[J] += load(next_tap(x, tap)) * g), ...);
}

// R kernel rows of S taps in R·S sums: a load for every multiply-add, and one for g.
template <class T, int R, int S, int... I>
NNARCH_INLINE void add_rows(const GradRow<T>& a, Indices<I...>) {
  for (int64_t k = 0; k < a.channels; k += kLanes<T>) {
    T* partial = partial_of(a, k);
    Vec<T> sum[R * S];
    for (int i = 0; i < R * S; ++i) sum[i] = load(partial + i * kDepthwiseBlock);
    const T* x[R] = {(a.rows[I] + k)...};
    const T* g = a.g + k;
    for (int64_t p = 0; p < a.n; ++p, g += a.g_pixel) {
      const Vec<T> value = load(g);
      (add_taps<T>(x[I], a.x_tap, value, sum + I * S, MakeIndices<S>{}), ...);
      ((x[I] += a.x_step), ...);
    }
    for (int i = 0; i < R * S; ++i) store(partial + i * kDepthwiseBlock, sum[i]);
  }
}

// Up to AT_ONCE kernel rows at a time, as many as the registers hold sums for.
template <class T, int S, int AT_ONCE>
void add_all_rows(GradRow<T> a, int64_t count) {
  for (int64_t r = 0; r < count;) {
    const int64_t left = count - r;
    int done = 1;
    if constexpr (AT_ONCE >= 3) {
      if (left >= 3) add_rows<T, 3, S>(a, MakeIndices<3>{}), done = 3;
    }
    if (done == 1 && left >= 2) add_rows<T, 2, S>(a, MakeIndices<2>{}), done = 2;
    if (done == 1) add_rows<T, 1, S>(a, MakeIndices<1>{});
    r += done;
    a.rows += done;
    a.partial += done * S * kDepthwiseBlock;
  }
}

// Any width: tap by tap, in four sums, whose latencies overlap.
template <class T>
void add_general(const GradRow<T>& a, int64_t count) {
  for (int64_t k = 0; k < a.channels; k += kLanes<T>)
    for (int64_t tap = 0; tap < count * a.taps; ++tap) {
      const T* x = a.rows[tap / a.taps] + tap % a.taps * a.x_tap + k;
      const T* g = a.g + k;
      Vec<T> s0{}, s1{}, s2{}, s3{};
      int64_t p = 0;
      for (; p + 4 <= a.n; p += 4, x += 4 * a.x_step, g += 4 * a.g_pixel) {
        s0 += load(x) * load(g);
        s1 += load(x + a.x_step) * load(g + a.g_pixel);
        s2 += load(x + 2 * a.x_step) * load(g + 2 * a.g_pixel);
        s3 += load(x + 3 * a.x_step) * load(g + 3 * a.g_pixel);
      }
      for (; p < a.n; ++p, x += a.x_step, g += a.g_pixel) s0 += load(x) * load(g);
      T* partial = partial_of(a, k) + tap * kDepthwiseBlock;
      store(partial, load(partial) + ((s0 + s1) + (s2 + s3)));
    }
}

template <class T>
void add_row(const GradRow<T>& a, int64_t count) {
  switch (a.taps) {
    case 3:
      return add_all_rows<T, 3, 3>(a, count);
    case 5:
      return add_all_rows<T, 5, 2>(a, count);
    case 7:
      return add_all_rows<T, 7, 2>(a, count);
    default:
      return add_general<T>(a, count);
  }
}

template <class T>
void run(const DepthwiseWeightGrad<T>& problem, const DepthwisePlan& plan,
         const DepthwiseTask& task, const DepthwiseWork<T>& work) {
  const DepthwiseConv<T>& c = problem.conv;
  const DepthwisePass<T>& pass = c.passes[0];
  for (int64_t x_first = 0; x_first < pass.ow; x_first += plan.columns) {
    Tile<T> tile(c, plan, task, work.tile, x_first);
    const int64_t n = smaller(plan.columns, pass.ow - x_first), pixel = tile.pixel();
    const int64_t column = tile.offset(x_first * c.stride_w + pass.column);
    for (int64_t oy = task.first; oy < task.last; ++oy) {
      tile.load(oy);
      int64_t first, last;
      kernel_rows(c, pass, oy, &first, &last);
      const int64_t iy = oy * c.stride_h + pass.row;
      for (int64_t r = first; r < last; ++r)
        work.rows[r - first] = tile.row(iy + r * c.dilation_h, r) + column;
      const T* g = problem.g + oy * c.y_row + x_first * c.y_pixel + task.channel * c.y_channel;
      load_pixels(g, c.y_pixel, c.y_channel, work.stage, pixel, n, task.channels);
      const int64_t block = pass.r * pass.s * kDepthwiseBlock;
      add_row<T>(
          {work.rows, work.stage, n, pixel, pixel, c.stride_w * pixel, c.dilation_w * pixel, pass.s,
           problem.partial + task.channel / kDepthwiseBlock * block +
               first * pass.s * kDepthwiseBlock,
           block},
          last - first);
    }
  }
}

}  // namespace

template <>
DepthwiseWeightGradRun<float> depthwise_weight_grad_run<float>() {
  return run<float>;
}
template <>
DepthwiseWeightGradRun<double> depthwise_weight_grad_run<double>() {
  return run<double>;
}

}  // namespace nnarch::NNARCH_ISA
