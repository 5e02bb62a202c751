// A task of the input gradient at stride 2: rows of quads (see cpu_quad.h).
#include "depthwise/cpu_quad.h"

#include "depthwise/cpu_tile.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
using QuadFn = void (*)(const QuadStrip<T>&);

// Quads of a strip: their sums, two or four for each, the weights of two kernel rows and a pixel
// fill the registers. Three where a row comes out even: 7 columns of grad, 1.3 times as fast.
inline constexpr int kQuads = kVectorBytes == 64 ? 4 : 2;
inline constexpr int kFewerQuads = kVectorBytes == 64 ? 3 : 2;

template <class T, int S>
class QuadRunner {
 public:
  QuadRunner(const DepthwiseQuads<T>& a) : a_(a) {
    strip_.pixel = strip_.y_pixel = a.channels;
    strip_.channels = a.channels;
    strip_.weight = a.weight, strip_.weight_block = S * S * kDepthwiseBlock;
    strip_.rows = rows_;
    strip_.stream = a.stream;
    // The quads of a row; those in [inside_, outside_) have all columns of grad and of dx.
    begin_ = a.left / 2, end_ = (a.left + a.w - 1) / 2 + 1;
    inside_ = larger(kQuadReach<S> - 1, ceil_div(a.left, 2));
    outside_ = smaller(a.gw, (a.left + a.w) / 2);
    const int64_t n = outside_ - inside_;
    pixels_ = ceil_div(n, kFewerQuads) * (kFewerQuads + 1) < ceil_div(n, kQuads) * (kQuads + 1)
                  ? kFewerQuads
                  : kQuads;
    code_ = pixels_ == kQuads ? quads<T, S, kQuads, false> : quads<T, S, kFewerQuads, false>;
  }

  void run_row(int64_t row) {
    if (a_.far) touch_row(row + 1);
    for (int64_t j = 0; j < kQuadReach<S>; ++j)
      rows_[j] = row - j >= 0 && row - j < a_.gh ? a_.g + (row - j) * a_.gw * a_.channels : nullptr;
    int64_t q = begin_;
    if (outside_ - inside_ >= pixels_) {
      for (; q < inside_; ++q) run_edge(row, q);
      for (; q < outside_; q += pixels_) run_strip(row, smaller(q, outside_ - pixels_), code_);
      q = outside_;
    }
    for (; q < end_; ++q) run_edge(row, q);
  }

 private:
  void run_strip(int64_t row, int64_t q, QuadFn<T> code) {
    strip_.x = q * a_.channels;
    for (int64_t r = 0; r < 2; ++r) {
      const int64_t iy = 2 * row + r - a_.top;
      strip_.y[r] =
          iy < 0 || iy >= a_.h ? nullptr : a_.dx + (iy * a_.w + 2 * q - a_.left) * a_.channels;
    }
    code(strip_);
  }

  void run_edge(int64_t row, int64_t q) {
    constexpr int reach = kQuadReach<S>;
    for (int64_t i = 0; i < reach; ++i) {
      const int64_t column = q + i - (reach - 1);
      strip_.has_column[i] = column >= 0 && column < a_.gw;
    }
    for (int64_t c = 0; c < 2; ++c) {
      const int64_t ix = 2 * q + c - a_.left;
      strip_.has_output[c] = ix >= 0 && ix < a_.w;
    }
    run_strip(row, q, quads<T, S, 1, true>);
  }

  // Strips meet the lines of a row in an order that the hardware does not prefetch.
  void touch_row(int64_t row) const {
    if (row >= a_.gh) return;
    constexpr auto line = 64 / static_cast<int64_t>(sizeof(T));
    const volatile T* g = a_.g + row * a_.gw * a_.channels;
    for (int64_t i = 0; i < a_.gw * a_.channels; i += line) (void)g[i];
  }

  const DepthwiseQuads<T>& a_;
  QuadStrip<T> strip_{};
  const T* rows_[kQuadReach<S>];
  int64_t begin_, end_, inside_, outside_, pixels_;
  QuadFn<T> code_;
};

template <class T, int S>
void run_rows(const DepthwiseQuads<T>& a, int64_t first, int64_t last) {
  QuadRunner<T, S> runner(a);
  for (int64_t row = first; row < last; ++row) runner.run_row(row);
  if (a.stream) finish_streaming();
}

template <class T>
void run(const DepthwiseQuads<T>& a, int64_t first, int64_t last) {
  if (a.s == 3) return run_rows<T, 3>(a, first, last);
  if (a.s == 5) return run_rows<T, 5>(a, first, last);
  run_rows<T, 7>(a, first, last);
}

}  // namespace

template <>
DepthwiseQuadsRun<float> depthwise_quads_run<float>() {
  return run<float>;
}
template <>
DepthwiseQuadsRun<double> depthwise_quads_run<double>() {
  return run<double>;
}

}  // namespace nnarch::NNARCH_ISA
