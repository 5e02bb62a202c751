// The pairs that are compiled (see cpu_grad_pair.h), and a task of the weight gradient in them.
#include "depthwise/cpu_grad_pair.h"
#include "depthwise/cpu_tile.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
class PairRunner {
 public:
  PairRunner(const DepthwiseWeightGrad<T>& problem, const DepthwisePlan& plan,
             const DepthwiseTask& task)
      : problem_(problem), c_(problem.conv), pass_(c_.passes[0]), plan_(plan), task_(task) {}

  void run() {
    for (int64_t oy = task_.first; oy < task_.last; oy += 2)
      run_rows(oy, smaller(2, task_.last - oy));
  }

 private:
  void run_rows(int64_t oy, int64_t rows) {
    if (plan_.far) touch_next(oy);
    const T* x_rows[5];
    const int64_t iy = oy * c_.stride_h + pass_.row;
    for (int64_t i = 0; i < (rows - 1) * c_.stride_h + 3; ++i)
      x_rows[i] =
          iy + i < 0 || iy + i >= c_.h ? nullptr : c_.x + (iy + i) * c_.x_row + task_.channel;
    GradPair<T> a;
    a.rows = x_rows;
    a.x_pixel = c_.x_pixel;
    a.g_pixel = c_.y_pixel, a.g_row = c_.y_row;
    a.channels = task_.channels;
    a.weight_block = 9 * kDepthwiseBlock;
    a.partial = problem_.partial + task_.channel * 9;
    a.bias = problem_.bias ? problem_.bias + task_.channel : nullptr;
    const GradPairCode<T>& code = grad_pair_code<T>(c_.stride_w, rows, plan_.pair_pixels);
    const T* g = problem_.g + oy * c_.y_row + task_.channel;
    const int64_t blocks = pass_.ow / plan_.pair_pixels, right = reaches_right() ? 1 : 0;
    for (int64_t b = 0; b < blocks; b += a.blocks) {
      const bool first = b == 0 && pass_.column < 0, last = right && b == blocks - 1;
      a.blocks = first || last ? 1 : blocks - right - b;
      a.g = g + b * plan_.pair_pixels * a.g_pixel;
      const int64_t column = b * plan_.pair_pixels * c_.stride_w + pass_.column;
      a.x = (first ? 0 : column) * a.x_pixel;
      code.edges[first][last](a);
    }
  }

  bool reaches_right() const { return (pass_.ow - 1) * c_.stride_w + pass_.column + 3 > c_.w; }

  // Reads the rows that the next pair needs from end to end: pairs meet their lines in an order
  // that the hardware does not prefetch.
  void touch_next(int64_t oy) const {
    const int64_t iy = (oy + 2) * c_.stride_h + pass_.row;
    for (int64_t i = larger(0, iy + 3 - c_.stride_h); i < smaller(c_.h, iy + 3 + c_.stride_h); ++i)
      touch(c_.x + i * c_.x_row, c_.x_row);
    for (int64_t i = oy + 2; i < smaller(pass_.oh, oy + 4); ++i)
      touch(problem_.g + i * c_.y_row, c_.y_row);
  }
  static void touch(const volatile T* row, int64_t n) {
    constexpr auto line = 64 / static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < n; i += line) (void)row[i];
  }

  const DepthwiseWeightGrad<T>& problem_;
  const DepthwiseConv<T>& c_;
  const DepthwisePass<T>& pass_;
  const DepthwisePlan& plan_;
  const DepthwiseTask& task_;
};

template <class T>
void run(const DepthwiseWeightGrad<T>& problem, const DepthwisePlan& plan,
         const DepthwiseTask& task, const DepthwiseWork<T>&) {
  if constexpr (kGradPairs<T>) PairRunner<T>(problem, plan, task).run();
}

// Blocks of seven where they fill the row: the sizes of most networks are multiples of it.
template <class T>
int64_t pixels(int64_t s, int64_t ow) {
  if (!kGradPairs<T> || s != 3 || ow == 0) return 0;
  return ow % 7 == 0 ? 7 : ow % 4 == 0 ? 4 : 0;
}

}  // namespace

template <>
int64_t depthwise_pair_pixels<float>(int64_t s, int64_t ow) {
  return pixels<float>(s, ow);
}
template <>
int64_t depthwise_pair_pixels<double>(int64_t s, int64_t ow) {
  return pixels<double>(s, ow);
}
template <>
DepthwiseWeightGradRun<float> depthwise_pair_run<float>() {
  return run<float>;
}
template <>
DepthwiseWeightGradRun<double> depthwise_pair_run<double>() {
  return run<double>;
}

}  // namespace nnarch::NNARCH_ISA
