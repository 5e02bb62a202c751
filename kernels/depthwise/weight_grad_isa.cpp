// The part of the weight gradient that a task sums up.
#include "cpu/wide.h"
#include "depthwise/cpu_grad_block.h"
#include "depthwise/cpu_kernels.h"
#include "depthwise/cpu_tile.h"

namespace nnarch::NNARCH_ISA {
namespace {

// Any kernel: tap by tap, in four sums, whose latencies overlap. `step` leads from the x of one
// pixel to that of the next, `tap` from one tap to the next.
template <class T>
void add_general(const GradRow<T>& a, int64_t count, int64_t taps, int64_t step, int64_t tap_step) {
  for (int64_t k = 0; k < a.channels; k += kLanes<T>)
    for (int64_t tap = 0; tap < count * taps; ++tap) {
      const T* x = a.rows[tap / taps] + a.x + tap % taps * tap_step + k;
      const T* g = a.g + k;
      Vec<T> s0{}, s1{}, s2{}, s3{};
      int64_t p = 0;
      for (; p + 4 <= a.n; p += 4, x += 4 * step, g += 4 * a.g_pixel) {
        s0 += load(x) * load(g);
        s1 += load(x + step) * load(g + a.g_pixel);
        s2 += load(x + 2 * step) * load(g + 2 * a.g_pixel);
        s3 += load(x + 3 * step) * load(g + 3 * a.g_pixel);
      }
      for (; p < a.n; ++p, x += step, g += a.g_pixel) s0 += load(x) * load(g);
      T* partial = partial_of(a, k) + tap * kDepthwiseBlock;
      store(partial, load(partial) + ((s0 + s1) + (s2 + s3)));
    }
}

// The sum of n pixels of grad, in bursts that are short enough to be exact in T.
template <class T>
void add_bias(const T* g, int64_t pixel, int64_t n, int64_t channels, double* bias) {
  constexpr int64_t burst = 32;
  for (int64_t k = 0; k < channels; k += kLanes<T>)
    for (int64_t p = 0; p < n; p += burst) {
      const int64_t end = smaller(n, p + burst);
      Vec<T> even{}, odd{};
      for (int64_t i = p; i + 1 < end; i += 2) {
        even += load(g + k + i * pixel);
        odd += load(g + k + (i + 1) * pixel);
      }
      if ((end - p) % 2 != 0) even += load(g + k + (end - 1) * pixel);
      add_wide<T>(bias + k, even + odd, kLanes<T>);
    }
}

// So many blocks share one load and one store of the sums.
inline constexpr int64_t kRunPixels = 4 * kGradPixels;

template <class T>
class GradRunner {
 public:
  GradRunner(const DepthwiseWeightGrad<T>& problem, const DepthwisePlan& plan,
             const DepthwiseTask& task, const DepthwiseWork<T>& work)
      : problem_(problem),
        c_(problem.conv),
        pass_(c_.passes[0]),
        plan_(plan),
        task_(task),
        work_(work),
        code_(c_.dilation_w == 1 ? grad_code<T>(pass_.s, c_.stride_w) : nullptr) {}

  void run() {
    for (int64_t x = 0; x < pass_.ow; x += plan_.columns) {
      Tile<T> tile(c_, plan_, task_, work_.tile, x);
      for (int64_t oy = task_.first; oy < task_.last; ++oy)
        run_row(tile, oy, x, smaller(plan_.columns, pass_.ow - x));
    }
  }

 private:
  void run_row(Tile<T>& tile, int64_t oy, int64_t x_first, int64_t n) {
    tile.load(oy);
    int64_t first, last;
    kernel_rows(c_, pass_, oy, &first, &last);
    const int64_t iy = oy * c_.stride_h + pass_.row;
    for (int64_t r = first; r < last; ++r)
      work_.rows[r - first] = tile.row(iy + r * c_.dilation_h, r);
    GradRow<T> a;
    a.rows = work_.rows;
    a.x_pixel = tile.pixel();
    a.channels = task_.channels;
    a.block = pass_.r * pass_.s * kDepthwiseBlock;
    a.partial = problem_.partial + task_.channel / kDepthwiseBlock * a.block +
                first * pass_.s * kDepthwiseBlock;
    set_grad(&a, oy, x_first, n);
    run_pixels(tile, a, last - first, x_first, n);
    if (problem_.bias) add_bias(a.g, a.g_pixel, n, task_.channels, problem_.bias + task_.channel);
  }

  // grad in place where its vectors are whole; else a copy.
  void set_grad(GradRow<T>* a, int64_t oy, int64_t x_first, int64_t n) const {
    const T* g = problem_.g + oy * c_.y_row + x_first * c_.y_pixel + task_.channel * c_.y_channel;
    a->g = g, a->g_pixel = c_.y_pixel;
    if (c_.y_channel == 1 && task_.channels % kLanes<T> == 0) return;
    const int64_t pitch = round_up(task_.channels, kLanes<T>);
    load_pixels(g, c_.y_pixel, c_.y_channel, work_.stage, pitch, n, task_.channels);
    a->g = work_.stage, a->g_pixel = pitch;
  }

  void run_pixels(const Tile<T>& tile, const GradRow<T>& row, int64_t rows, int64_t x_first,
                  int64_t n) const {
    for (int64_t x = 0, done; x < n; x += done) {
      GradRow<T> a = row;
      const int64_t column = (x_first + x) * c_.stride_w + pass_.column;
      const int64_t left = tile.missing_left(column);
      a.g += x * a.g_pixel;
      a.x = tile.offset(column + left);
      if (code_ == nullptr) {
        a.n = done = n;
        add_general(a, rows, pass_.s, c_.stride_w * a.x_pixel, c_.dilation_w * a.x_pixel);
      } else if (n - x < kGradPixels) {
        a.n = done = n - x;
        code_->single(a, rows);
      } else if (left != 0 || misses_right(tile, column, 1)) {
        a.n = done = kGradPixels;
        (left != 0 ? code_->left : code_->right)(a, rows);
      } else {
        int64_t blocks = smaller(n - x, kRunPixels) / kGradPixels;
        while (misses_right(tile, column, blocks)) --blocks;
        a.n = done = blocks * kGradPixels;
        code_->inside(a, rows);
      }
    }
  }

  // Whether so many blocks from input column `column` on reach beyond the right edge of the image.
  bool misses_right(const Tile<T>& tile, int64_t column, int64_t blocks) const {
    const int64_t last = (blocks * kGradPixels - 1) * c_.stride_w + pass_.s - 1;
    return tile.missing_right(column + last) != 0;
  }

  const DepthwiseWeightGrad<T>& problem_;
  const DepthwiseConv<T>& c_;
  const DepthwisePass<T>& pass_;
  const DepthwisePlan& plan_;
  const DepthwiseTask& task_;
  const DepthwiseWork<T>& work_;
  const GradCode<T>* code_;
};

template <class T>
void run(const DepthwiseWeightGrad<T>& problem, const DepthwisePlan& plan,
         const DepthwiseTask& task, const DepthwiseWork<T>& work) {
  GradRunner<T>(problem, plan, task, work).run();
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
