// A task of a depthwise convolution: its output rows, cut into strips, from a tile of the input.
#include "depthwise/cpu_code.h"
#include "depthwise/cpu_kernels.h"
#include "depthwise/cpu_tile.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
const StripCode<T>& strip_code(const StripSet<T>& set, int64_t s, int64_t n) {
  const int64_t pixels = strip_pixels(s, n);
  const StripCode<T>* code = set.lengths;
  while (code->pixels != pixels) ++code;
  return *code;
}

template <class T>
NNARCH_NOINLINE void activate_values(T* y, int64_t pixels, int64_t pixel, int64_t n,
                                     const Epilogue<T>& e) {
  for (int64_t p = 0; p < pixels; ++p, y += pixel)
    for (int64_t k = 0; k < n; k += kLanes<T>) {
      const Vec<T> v = load_n(y + k, n - k);
      store_n(y + k, activate<T>(v, e.activation, e.alpha), n - k);
    }
}

template <class T>
class Runner {
 public:
  Runner(const DepthwiseConv<T>& c, const DepthwisePlan& plan, const DepthwiseTask& task,
         const DepthwiseWork<T>& work)
      : c_(c),
        plan_(plan),
        task_(task),
        work_(work),
        epilogue_(c.epilogue.from_channel(task.channel)),
        phases_(column_phases(c.dilation_w, c.stride_w)),
        stride_(c.stride_w * phases_ / c.dilation_w) {}

  void run() {
    int64_t ow = 0;
    for (int64_t i = 0; i < c_.pass_count; ++i)
      if (c_.passes[i].ow > ow) ow = c_.passes[i].ow;
    for (int64_t x = 0; x < ow; x += plan_.columns) run_columns(x);
  }

 private:
  void run_columns(int64_t x_first) {
    Tile<T> tile(c_, plan_, task_, work_.tile, x_first);
    int64_t oy = task_.first;
    const BlockCode<T>* code = find_block(x_first);
    if (code != nullptr && task_.last - task_.first >= code->rows) {
      const int64_t n = smaller(plan_.columns, c_.passes->ow - x_first);
      // The last block is moved up to end with the rows, and computes some of them twice.
      for (; oy < task_.last; oy += code->rows)
        run_block_rows(tile, *code, smaller(oy, task_.last - code->rows), x_first, n);
    }
    for (; oy < task_.last; ++oy) {
      tile.load(oy);
      for (int64_t i = 0; i < c_.pass_count; ++i) {
        const DepthwisePass<T>& pass = c_.passes[i];
        const int64_t n = smaller(plan_.columns, pass.ow - x_first);
        if (oy < pass.oh && n > 0) run_row(tile, pass, oy, x_first, n);
      }
    }
  }

  // The code for the columns from x_first on; null where blocks do not serve them.
  const BlockCode<T>* find_block(int64_t x_first) const {
    const DepthwisePass<T>& pass = *c_.passes;
    if (!plan_.blocks) return nullptr;
    const int64_t n = smaller(plan_.columns, pass.ow - x_first);
    const BlockCode<T>* code = block_code<T>(pass.s, c_.stride_w, n);
    if (code == nullptr || code->rows > kBlockRowsMost || n < code->pixels) return nullptr;
    return code;
  }

  // `n` pixels of each of code.rows output rows.
  void run_block_rows(Tile<T>& tile, const BlockCode<T>& code, int64_t oy, int64_t x_first,
                      int64_t n) {
    const DepthwisePass<T>& pass = *c_.passes;
    const int64_t iy = oy * c_.stride_h + pass.row;
    const int64_t reach = (code.rows - 1) * c_.stride_h + pass.r;
    if (oy == task_.first) tile.touch(iy, iy + reach);
    for (int64_t r = 0; r < reach; ++r)
      work_.rows[r] = iy + r < 0 || iy + r >= c_.h ? nullptr : tile.row(iy + r, r);
    Strip<T> a{};
    a.rows = work_.rows;
    a.pixel = tile.pixel();
    a.weight_block = pass.r * pass.s * kDepthwiseBlock;
    a.weight = pass.weight + task_.channel / kDepthwiseBlock * a.weight_block;
    a.channels = task_.channels;
    a.epilogue = &epilogue_;
    const int64_t offset = pass.y_offset + oy * c_.y_row + x_first * c_.y_pixel;
    T* y = c_.y + offset + task_.channel / c_.group * c_.y_channel;
    T* out = work_.stage ? work_.stage : y;
    a.y_pixel = work_.stage ? pitch() : c_.y_pixel;
    a.y_row = work_.stage ? plan_.columns * pitch() : c_.y_row;
    a.residual_pixel = c_.y_channel == 1 ? c_.y_pixel : pitch();
    a.residual_row = c_.y_channel == 1 ? c_.y_row : plan_.columns * pitch();
    const T* residual = epilogue_.residual ? residual_rows(offset, n, code.rows) : nullptr;
    a.stream = plan_.stream, a.lines = work_.lines;
    // Past the last row of an image lies the next one's first, if anything: fetching cannot fail.
    if (plan_.far) a.ahead = tile.row(iy + reach, 0), a.ahead_row = c_.x_row;
    bool all = true;
    for (int64_t x = 0; x < n; x += a.strips * code.pixels)
      all &=
          run_block_strips(tile, a, code, x_first, smaller(x, n - code.pixels), n, out, residual);
    for (int64_t r = 0; r < code.rows; ++r) {
      if (!is_clamp(epilogue_.activation))
        activate_values(out + r * a.y_row, n, a.y_pixel, task_.channels, epilogue_);
      if (work_.stage) unstage(out + r * a.y_row, n, y + r * c_.y_row);
    }
    for (int64_t x = 0; x < n && !all; x += code.pixels)
      run_odd_edge(tile, code, oy, x_first + smaller(x, n - code.pixels));
  }

  // How many columns of a strip of a block lie outside the image.
  int64_t block_left(const Tile<T>& tile, int64_t x) const {
    return tile.missing_left(x * c_.stride_w + c_.passes->column);
  }
  int64_t block_right(const Tile<T>& tile, const BlockCode<T>& code, int64_t x) const {
    const int64_t last = x + code.pixels - 1;
    return tile.missing_right(last * c_.stride_w + c_.passes->column + c_.passes->s - 1);
  }
  static StripFn<T> edge_code(const BlockCode<T>& code, int64_t s, int64_t left, int64_t right) {
    return left == s / 2 && right == s / 2 ? code.both : code_at(code, s / 2, left, right);
  }

  // Where the strip at x reaches beyond the image in a way that blocks have no code for, row by
  // row.
  void run_odd_edge(Tile<T>& tile, const BlockCode<T>& code, int64_t oy, int64_t x) {
    const DepthwisePass<T>& pass = *c_.passes;
    if (edge_code(code, pass.s, block_left(tile, x), block_right(tile, code, x))) return;
    for (int64_t r = 0; r < code.rows; ++r) run_row(tile, pass, oy + r, x, code.pixels);
  }

  // The strip at x, and as many after it as lie within the image like it. False: there is no code
  // for it.
  bool run_block_strips(const Tile<T>& tile, Strip<T>& a, const BlockCode<T>& code, int64_t x_first,
                        int64_t x, int64_t n, T* y, const T* residual) const {
    const DepthwisePass<T>& pass = *c_.passes;
    const int64_t left = block_left(tile, x_first + x),
                  right = block_right(tile, code, x_first + x);
    a.strips = 1;
    const StripFn<T> run = edge_code(code, pass.s, left, right);
    if (run == nullptr) return false;
    a.x = tile.offset((x_first + x) * c_.stride_w + pass.column + left);
    a.y = y + x * a.y_pixel;
    a.residual = residual ? residual + x * a.residual_pixel : nullptr;
    if (left == 0 && right == 0)
      while (x + (a.strips + 1) * code.pixels <= n &&
             block_right(tile, code, x_first + x + a.strips * code.pixels) == 0)
        ++a.strips;
    run(a);
    return true;
  }

  // `n` pixels of an output row.
  void run_row(Tile<T>& tile, const DepthwisePass<T>& pass, int64_t oy, int64_t x_first,
               int64_t n) {
    Strip<T> a{};
    find_rows(tile, pass, oy, &a);
    a.rows = work_.rows;
    a.pixel = tile.pixel() * c_.dilation_w;
    a.s = pass.s, a.stride = stride_;
    a.channels = task_.channels;
    a.epilogue = &epilogue_;
    const int64_t offset = pass.y_offset + oy * c_.y_row + x_first * c_.y_pixel;
    T* y = c_.y + offset + task_.channel / c_.group * c_.y_channel;
    const T* residual = epilogue_.residual ? residual_rows(offset, n, 1) : nullptr;
    T* out = work_.stage ? work_.stage : y;
    const int64_t y_pixel = work_.stage ? pitch() : c_.y_pixel;
    const int64_t residual_pixel = c_.y_channel == 1 ? c_.y_pixel : pitch();
    a.y_pixel = y_pixel * phases_, a.residual_pixel = residual_pixel * phases_;
    for (int64_t j = 0; j < smaller(phases_, n); ++j)
      run_strips(tile, a, pass, x_first + j, ceil_div(n - j, phases_), out + j * y_pixel,
                 residual ? residual + j * residual_pixel : nullptr);
    if (!is_clamp(epilogue_.activation))
      activate_values(out, n, y_pixel, task_.channels, epilogue_);
    if (work_.stage) unstage(work_.stage, n, y);
  }

  // The kernel rows of an output row that lie in the image.
  void find_rows(Tile<T>& tile, const DepthwisePass<T>& pass, int64_t oy, Strip<T>* a) const {
    const int64_t iy = oy * c_.stride_h + pass.row, dilation = c_.dilation_h;
    int64_t first, last;
    kernel_rows(c_, pass, oy, &first, &last);
    for (int64_t r = first; r < last; ++r) work_.rows[r - first] = tile.row(iy + r * dilation, r);
    a->row_count = last - first;
    a->weight_block = pass.r * pass.s * kDepthwiseBlock;
    a->weight = pass.weight + first * pass.s * kDepthwiseBlock +
                task_.channel / kDepthwiseBlock * a->weight_block;
  }

  void choose_code(int64_t s, int64_t n) {
    set_ = &strip_set<T>(s, stride_);
    code_ = &strip_code(*set_, s, n);
    chosen_s_ = s, chosen_n_ = n;
  }

  // The n outputs x_first, x_first + phases_, … of a row.
  void run_strips(const Tile<T>& tile, Strip<T>& a, const DepthwisePass<T>& pass, int64_t x_first,
                  int64_t n, T* y, const T* residual) {
    if (pass.s != chosen_s_ || n != chosen_n_) choose_code(pass.s, n);
    const StripCode<T>& code = *code_;
    const bool whole = !plan_.direct || task_.channels % kLanes<T> == 0;
    const int64_t span = (code.pixels - 1) * stride_ + pass.s;  // in pixels of a.pixel
    const int64_t to_last = (span - 1) * c_.dilation_w;
    for (int64_t x = 0; x < n; x += code.pixels) {
      const int64_t at = smaller(x, n - code.pixels);
      const int64_t column = (x_first + at * phases_) * c_.stride_w + pass.column;
      a.y = y + at * a.y_pixel;
      a.residual = residual ? residual + at * a.residual_pixel : nullptr;
      const int64_t left = tile.missing_left(column), right = tile.missing_right(column + to_last);
      a.x = tile.offset(column + left * c_.dilation_w);
      const StripFn<T> run = whole ? code_at(code, set_->reach, left, right) : nullptr;
      if (run != nullptr)
        run(a);
      else
        run_window(a, code, span, left, right);
    }
  }

  // A strip that reaches beyond the image in another way, or that would read past its last channel,
  // from a copy of its input.
  void run_window(Strip<T> a, const StripCode<T>& code, int64_t span, int64_t left,
                  int64_t right) const {
    const T** copies = work_.rows + plan_.kernel_rows;
    left = smaller(left, span), right = smaller(right, span);
    for (int64_t r = 0; r < a.row_count; ++r) {
      T* copy = work_.tile + r * span * pitch();
      copies[r] = copy;
      clear(copy, left * pitch());
      clear(copy + (span - right) * pitch(), right * pitch());
      if (left + right < span)
        copy_pixels(a.rows[r] + a.x, a.pixel, copy + left * pitch(), pitch(), span - left - right,
                    task_.channels);
    }
    a.rows = copies, a.x = 0, a.pixel = pitch();
    code.inside(a);
  }

  // Residual values of one or more rows in the layout that the strips write.
  const T* residual_rows(int64_t offset, int64_t n, int64_t rows) const {
    const T* from = c_.epilogue.residual + offset + task_.channel * c_.y_channel;
    if (c_.y_channel == 1) return from;
    for (int64_t r = 0; r < rows; ++r)
      transpose_kernel<T>()(from + r * c_.y_row, c_.y_channel,
                            work_.residual + r * plan_.columns * pitch(), pitch(), task_.channels,
                            n);
    return work_.residual;
  }

  // A staged row to where it belongs.
  void unstage(const T* stage, int64_t n, T* y) const {
    if (c_.group == 1 && c_.y_pixel == 1)
      return transpose_kernel<T>()(stage, pitch(), y, c_.y_channel, n, task_.channels);
    for (int64_t x = 0; x < n; ++x) {
      const T* from = stage + x * pitch();
      T* to = y + x * c_.y_pixel;
      for (int64_t k = 0; k < task_.channels; k += c_.group, to += c_.y_channel) {
        T sum = from[k];
        for (int64_t j = 1; j < c_.group; ++j) sum += from[k + j];
        *to = sum;
      }
    }
  }

  // Distance of neighbouring pixels in scratch memory: whole vectors.
  int64_t pitch() const { return round_up(task_.channels, kLanes<T>); }

  const DepthwiseConv<T>& c_;
  const DepthwisePlan& plan_;
  const DepthwiseTask& task_;
  const DepthwiseWork<T>& work_;
  const Epilogue<T> epilogue_;
  const int64_t phases_, stride_;  // see column_phases(); in every dilation_w-th column
  const StripSet<T>* set_ = nullptr;
  const StripCode<T>* code_ = nullptr;
  int64_t chosen_s_ = -1, chosen_n_ = -1;
};

template <class T>
void run(const DepthwiseConv<T>& c, const DepthwisePlan& plan, const DepthwiseTask& task,
         const DepthwiseWork<T>& work) {
  Runner<T>(c, plan, task, work).run();
  if (plan.stream) finish_streaming();
}

}  // namespace

template <>
bool depthwise_masked_tails<float>() {
  return kMaskedTails<float>;
}
template <>
bool depthwise_masked_tails<double>() {
  return kMaskedTails<double>;
}
template <>
int64_t depthwise_lanes<float>() {
  return kLanes<float>;
}
template <>
int64_t depthwise_lanes<double>() {
  return kLanes<double>;
}
template <>
DepthwiseRun<float> depthwise_run<float>() {
  return run<float>;
}
template <>
DepthwiseRun<double> depthwise_run<double>() {
  return run<double>;
}

}  // namespace nnarch::NNARCH_ISA
