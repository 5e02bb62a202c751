// The backward of recurrent layers on the CPU.
#include "recurrent/cpu_backward.h"

#include <tuple>

#include "cpu/registry.h"

namespace nnarch {

template <class T>
RecurrentBackward<T>::RecurrentBackward(const Steps& steps, const BackwardInputs<T>& in,
                                        const OutputGrad<T>& dy, const BackwardOutputs<T>& out)
    : steps_(steps),
      in_(in),
      s_(in.sizes),
      dy_(dy),
      out_(out),
      columns_(s_, in.norm != nullptr),
      chunks_(time_chunks(steps, columns_.step * int64_t{sizeof(T)})),
      most_rows_(longest(chunks_)),
      h_step_(round_up(s_.out, gemm<T>().nr)),
      norm_sums_(in.norm && (out.d_norm || out.db_ih || out.db_hh)),
      peephole_sums_(in.peephole && out.d_peephole),
      w_hh_(steps.count() > 1 || out.dh0 ? s_.gates * s_.hidden : 0, s_.out),
      w_ih_(out.dx ? s_.gates * s_.hidden : 0, s_.in),
      w_hr_(in.weight_hr ? s_.out : 0, s_.hidden),
      x_rows_(out.dw_ih ? most_rows_ : 0, s_.in),
      h_rows_(out.dw_hh ? most_rows_ : 0, s_.out),
      hidden_rows_(out.dw_hr ? most_rows_ : 0, s_.hidden),
      zeros_(std::max(s_.hidden, s_.out)),
      dh_(steps.batch() * h_step_),
      carry_(steps.batch() * s_.hidden),
      grad_(most_rows_ * columns_.step),
      projected_(in.weight_hr ? most_rows_ * h_step_ : 0),
      hidden_(out.dw_hr ? most_rows_ * s_.hidden : 0),
      sums_((groups() + 1) * kSumRows * s_.hidden),
      x_at_(static_cast<size_t>(most_rows_)),
      h_before_(x_at_),
      c_before_(in.sizes.kind == kLstm ? x_at_.size() : 0) {}

template <class T>
void RecurrentBackward<T>::run(const T* dh, const T* dc) {
  std::fill_n(zeros_.get(), std::max(s_.hidden, s_.out), T{0});
  std::fill_n(sums_of(0), kSumRows * s_.hidden, T{0});
  start_states(dh, dc);
  pack_weights();
  for (size_t i = chunks_.size(); i-- > 0;) {
    const TimeChunk& c = chunks_[i];
    list_rows(c);
    parallel_tasks(groups(), [&](int64_t group) { scan(c, group); });
    add_group_sums();
    if (out_.dx) input_product(c);
    sum_weights_of(c, i + 1 < chunks_.size());
  }
  finish();
}

template <class T>
void RecurrentBackward<T>::start_states(const T* dh, const T* dc) {
  const int64_t batch = steps_.batch();
  std::fill_n(dh_.get(), batch * h_step_, T{0});
  std::fill_n(carry_.get(), batch * s_.hidden, T{0});
  if (dh)
    for (int64_t b = 0; b < batch; ++b)
      std::copy_n(dh + b * s_.out, s_.out, dh_.get() + b * h_step_);
  if (dc) std::copy_n(dc, batch * s_.hidden, carry_.get());
}

template <class T>
void RecurrentBackward<T>::pack_weights() {
  const int64_t depth = s_.gates * s_.hidden;
  std::vector<const T*> rows(static_cast<size_t>(std::max(depth, s_.out)));
  const auto pack = [&](DeepPanels<T>& panels, const T* weight, int64_t from) {
    const int64_t n = panels.depth();
    for (int64_t k = 0; k < n; ++k) rows[k] = weight + (from + k) % n * panels.columns();
    panels.pack(rows.data());
  };
  pack(w_hh_, in_.weight_hh, 0);
  pack(w_ih_, in_.weight_ih, s_.kind == kGru ? 2 * s_.hidden : 0);  // n comes first
  pack(w_hr_, in_.weight_hr, 0);
}

// Where the chunk's rows of x lie, and what h and c were before their step.
template <class T>
void RecurrentBackward<T>::list_rows(const TimeChunk& c) {
  for (int64_t i = c.begin; i < c.end; ++i) {
    const int64_t t = steps_.at(i), last = steps_.reverse() ? t + 1 : t - 1;
    const int64_t known = i > 0 ? std::min(steps_.rows(last), steps_.rows(t)) : 0;
    for (int64_t b = 0; b < steps_.rows(t); ++b) {
      const int64_t at = steps_.first(t) + b - c.first_row;
      const int64_t row = b < known ? steps_.first(last) + b : 0;
      const auto state = [&](const T* start, int64_t n) {
        return start ? start + b * n : zeros_.get();
      };
      x_at_[at] = in_.x.at(steps_, t, b);
      h_before_[at] = b < known ? in_.y + row * s_.out : state(in_.h0, s_.out);
      if (s_.kind == kLstm)
        c_before_[at] = b < known ? in_.reserve.at(row, 4) : state(in_.c0, s_.hidden);
    }
  }
}

// All steps of a chunk for a group of sequences, which no other group has to wait for.
template <class T>
void RecurrentBackward<T>::scan(const TimeChunk& c, int64_t group) {
  const int64_t begin = group_start(group), end = group_start(group + 1);
  std::fill_n(sums_of(group + 1), kSumRows * s_.hidden, T{0});
  Scratch<T> dy_room(dy_.data && dy_.element != 1 ? (end - begin) * s_.out : 0);
  Scratch<T> hidden_room(projects() ? (end - begin) * s_.hidden : 0);
  for (int64_t i = c.end; i-- > c.begin;) {
    const int64_t t = steps_.at(i), row = steps_.first(t) + begin;
    const int64_t count = std::min(end, steps_.rows(t)) - begin;
    if (count <= 0) continue;
    const StepRows rows{t, begin, count, row, row - c.first_row};
    cell(rows, group, dy_room.get(), hidden_room.get());
    if (i > 0 || out_.dh0)
      state_product(grad_at(rows.at) + columns_.state, count, dh_.get() + begin * h_step_);
  }
}

template <class T>
void RecurrentBackward<T>::cell(const StepRows& r, int64_t group, T* dy_room, T* hidden_room) {
  const T *dy = dy_.data ? dy_.at(steps_, r.t, r.first) : nullptr,
          *dh = dh_.get() + r.first * h_step_;
  int64_t dy_step = dy_.row, dh_step = h_step_;
  if (dy && dy_.element != 1) {
    for (int64_t b = 0; b < r.count; ++b)
      for (int64_t j = 0; j < s_.out; ++j)
        dy_room[b * s_.out + j] = dy[b * dy_step + j * dy_.element];
    dy = dy_room, dy_step = s_.out;
  }
  if (projects()) {
    T* sum = projected_.get() + r.at * h_step_;
    recurrent_grad<T>().add_rows(dy, dy_step, dh, dh_step, r.count, s_.out, sum, h_step_);
    w_hr_.multiply(sum, h_step_, r.count, 0, s_.hidden, hidden_room, s_.hidden);
    dy = nullptr, dh = hidden_room, dh_step = s_.hidden;
  }
  const bool rnn = s_.kind == kRnnTanh || s_.kind == kRnnRelu;
  T* sums = sums_of(group + 1);
  recurrent_grad<T>().cell(
      {.kind = s_.kind,
       .rows = r.count,
       .hidden = s_.hidden,
       .dy = dy,
       .dy_step = dy_step,
       .dh = dh,
       .dh_step = dh_step,
       .carry = carry_.get() + r.first * s_.hidden,
       .carry_step = s_.hidden,
       .kept = rnn ? in_.y + r.row * s_.out : in_.reserve.at(r.row, 0),
       .kept_step = rnn ? s_.out : in_.reserve.row_step(),
       .before = (s_.kind == kLstm ? c_before_ : h_before_).data() + r.at,
       .grad = grad_at(r.at),
       .grad_step = columns_.step,
       .peephole = in_.peephole,
       .norm = in_.norm,
       .eps = in_.eps,
       .peephole_sums = peephole_sums_ ? sums + kNormRows * s_.hidden : nullptr,
       .norm_sums = norm_sums_ ? sums : nullptr,
       .hidden_out = out_.dw_hr ? hidden_.get() + r.at * s_.hidden : nullptr,
       .hidden_out_step = s_.hidden});
}

// dh = grad · W_hh, in tasks of columns where that is worth a start of threads.
template <class T>
void RecurrentBackward<T>::state_product(const T* grad, int64_t rows, T* dh) const {
  constexpr int64_t columns = 128, worth = int64_t{1} << 20;  // products
  const bool cut = w_hh_.depth() * s_.out * (rows + 4) >= worth;
  const int64_t each = cut ? columns : std::max<int64_t>(1, s_.out);
  parallel_tasks(ceil_div(s_.out, each), [&](int64_t task) {
    const int64_t first = task * each;
    w_hh_.multiply(grad, columns_.step, rows, first, std::min(each, s_.out - first), dh, h_step_);
  });
}

// dx = grad · W_ih.
template <class T>
void RecurrentBackward<T>::input_product(const TimeChunk& c) const {
  constexpr int64_t most_rows = 112, most_columns = 128;  // eight register tiles; four panels
  const int64_t blocks = ceil_div(c.rows, most_rows);
  const int64_t each = blocks > 1 ? std::max<int64_t>(1, s_.in) : most_columns;
  const int64_t parts = ceil_div(s_.in, each);
  parallel_tasks(blocks * parts, [&](int64_t task) {
    const int64_t block = task / parts, column = task % parts * each;
    const int64_t first = c.rows * block / blocks, rows = c.rows * (block + 1) / blocks - first;
    w_ih_.multiply(grad_at(first), columns_.step, rows, column, std::min(each, s_.in - column),
                   out_.dx + (c.first_row + first) * s_.in, s_.in);
  });
}

template <class T>
void RecurrentBackward<T>::sum_weights_of(const TimeChunk& c, bool add) const {
  auto& self = const_cast<RecurrentBackward&>(*this);
  if (out_.dw_ih) self.x_rows_.pack(x_at_.data(), c.rows);
  if (out_.dw_hh) self.h_rows_.pack(h_before_.data(), c.rows);
  const int64_t hidden = s_.hidden, gates = s_.gates * hidden;
  // The part of the input's and of the state's product that starts with row `row` of the weight.
  const auto of_input = [&](int64_t row) {
    return WeightSum<T>{out_.dw_ih ? &x_rows_ : nullptr,
                        out_.dw_ih ? out_.dw_ih + row * s_.in : nullptr,
                        out_.db_ih && !in_.norm ? out_.db_ih + row : nullptr};
  };
  const auto of_state = [&](int64_t row) {
    return WeightSum<T>{out_.dw_hh ? &h_rows_ : nullptr,
                        out_.dw_hh ? out_.dw_hh + row * s_.out : nullptr,
                        out_.db_hh && !in_.norm ? out_.db_hh + row : nullptr};
  };
  std::vector<WeightColumns<T>> columns;
  if (in_.norm)
    columns = {{0, gates, {of_input(0), {}}}, {gates, gates, {of_state(0), {}}}};
  else if (s_.kind == kGru)
    columns = {{0, hidden, {of_input(2 * hidden), {}}},
               {hidden, 2 * hidden, {of_input(0), of_state(0)}},
               {3 * hidden, hidden, {of_state(2 * hidden), {}}}};
  else
    columns = {{0, gates, {of_input(0), of_state(0)}}};
  sum_weights(grad_.get(), columns_.step, c.rows, add, columns);
  if (!out_.dw_hr) return;
  std::vector<const T*> rows(static_cast<size_t>(c.rows));
  for (int64_t r = 0; r < c.rows; ++r) rows[r] = hidden_.get() + r * hidden;
  self.hidden_rows_.pack(rows.data(), c.rows);
  sum_weights<T>(projected_.get(), h_step_, c.rows, add,
                 {{0, s_.out, {{&hidden_rows_, out_.dw_hr, nullptr}, {}}}});
}

template <class T>
void RecurrentBackward<T>::add_group_sums() {
  if (!norm_sums_ && !peephole_sums_) return;
  for (int64_t g = 1; g <= groups(); ++g)
    for (int64_t j = 0; j < kSumRows * s_.hidden; ++j) sums_of(0)[j] += sums_of(g)[j];
}

// The sums that were collected by the cells, and the states before the first step.
template <class T>
void RecurrentBackward<T>::finish() {
  const int64_t hidden = s_.hidden, gates = 4 * hidden;
  T* sums = sums_of(0);
  if (norm_sums_) {
    std::copy_n(sums + gates, gates, sums + 3 * gates);  // one bias is added to the other
    if (out_.db_ih) std::copy_n(sums + gates, gates, out_.db_ih);
    if (out_.db_hh) std::copy_n(sums + gates, gates, out_.db_hh);
    if (out_.d_norm) std::copy_n(sums, kNormRows * hidden, out_.d_norm);
  }
  if (peephole_sums_) std::copy_n(sums + kNormRows * hidden, 3 * hidden, out_.d_peephole);
  if (out_.dc0) std::copy_n(carry_.get(), steps_.batch() * hidden, out_.dc0);
  for (int64_t b = 0; out_.dh0 && b < steps_.batch(); ++b)
    for (int64_t j = 0; j < s_.out; ++j)
      out_.dh0[b * s_.out + j] =
          dh_[b * h_step_ + j] + (s_.kind == kGru ? carry_[b * hidden + j] : T{0});
}

namespace {

using Ten =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct LastGrads {
  const OptTensor &y, &h, &c;
};

void check_grads(const LastGrads& grads, const RecurrentArgs& a, const RecurrentSizes& s,
                 const Steps& steps, const Tensor& y, const Tensor& reserve) {
  IntList size = sizes_of(a.x);
  size.back() = s.out;
  const auto fits = [&](const Tensor& t, const IntList& sizes) {
    require(sizes_of(t) == sizes && t.scalar_type() == a.x.scalar_type(),
            "recurrent_scan_backward: a tensor does not fit");
  };
  fits(y, size);
  const int64_t width = checked_product(reserve_width(s.kind, a.norm.has_value()), s.hidden);
  fits(reserve, {steps.total(), width});
  if (grads.y) fits(*grads.y, size);
  if (grads.h) fits(*grads.h, {steps.batch(), s.out});
  if (grads.c) fits(*grads.c, {steps.batch(), s.kind == kLstm ? s.hidden : 0});
}

// The gradients, each in the shape of its argument, in the type of computation; empty where one is
// not wanted.
class Gradients {
 public:
  Gradients(const RecurrentArgs& a, ScalarType type, int64_t wanted) {
    const auto add = [&](const Tensor* t) {
      const bool wants = t && wanted >> tensors_.size() & 1;
      tensors_.push_back(new_contiguous(wants ? sizes_of(*t) : IntList{0}, type));
      wanted_.push_back(wants);
    };
    const auto given = [](const OptTensor& t) { return t ? &*t : nullptr; };
    add(&a.x), add(given(a.h0)), add(given(a.c0)), add(&a.weight_ih), add(&a.weight_hh);
    add(given(a.bias_ih)), add(given(a.bias_hh)), add(given(a.weight_hr)), add(given(a.peephole));
    add(given(a.norm));
  }

  template <class T>
  BackwardOutputs<T> pointers() const {
    const auto at = [&](size_t i) { return wanted_[i] ? mutable_data<T>(tensors_[i]) : nullptr; };
    return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9)};
  }

  // Where there are no rows: only the states have a gradient, that of the last ones.
  template <class T>
  void fill_without_rows() const {
    for (const Tensor& t : tensors_) std::fill_n(mutable_data<T>(t), t.numel(), T{0});
  }

  Ten take(ScalarType type) const {
    const auto t = [&](size_t i) { return to_type(tensors_[i], type); };
    return {t(0), t(1), t(2), t(3), t(4), t(5), t(6), t(7), t(8), t(9)};
  }

 private:
  std::vector<Tensor> tensors_;
  std::vector<bool> wanted_;
};

Ten recurrent_scan_backward(const OptTensor& grad_y, const OptTensor& grad_h,
                            const OptTensor& grad_c, const Tensor& x, const OptTensor& h0,
                            const OptTensor& c0, const Tensor& weight_ih, const Tensor& weight_hh,
                            const OptTensor& bias_ih, const OptTensor& bias_hh,
                            const OptTensor& weight_hr, const OptTensor& peephole,
                            const OptTensor& norm, const OptTensor& batch_sizes, const Tensor& y,
                            const Tensor& reserve, int64_t kind, bool reverse, double eps,
                            int64_t wanted) {
  const RecurrentArgs args{x,       h0,        c0,       weight_ih, weight_hh,   bias_ih,
                           bias_hh, weight_hr, peephole, norm,      batch_sizes, kind};
  const Steps steps(x, batch_sizes, reverse);
  const RecurrentSizes sizes(args, steps);
  check_grads({grad_y, grad_h, grad_c}, args, sizes, steps, y, reserve);
  set_algorithm("recurrent_backward");
  const Tensor rows = with_dense_rows(x), out = *as_dense(y), kept = *as_dense(reserve);
  const Tensor w_ih = *as_dense(weight_ih), w_hh = *as_dense(weight_hh);
  const OptTensor w_hr = as_dense(weight_hr), p = as_dense(peephole), n = as_dense(norm);
  const OptTensor h = as_dense(h0), c = as_dense(c0), dy = to_compute_type(grad_y);
  const OptTensor dh = as_dense(grad_h), dc = as_dense(grad_c);
  const Gradients gradients(args, rows.scalar_type(), wanted);
  with_scalar_type(rows.scalar_type(), "recurrent_scan_backward", [&](auto scalar) {
    using T = decltype(scalar);
    const BackwardInputs<T> in{
        sizes,
        InputRows<T>(rows, steps),
        data_or_null<T>(h),
        data_or_null<T>(c),
        data<T>(w_ih),
        data<T>(w_hh),
        data_or_null<T>(w_hr),
        data_or_null<T>(p),
        data_or_null<T>(n),
        data<T>(out),
        {mutable_data<T>(kept), sizes.hidden, reserve_width(kind, norm.has_value())},
        static_cast<T>(eps)};
    if (steps.total() == 0) gradients.fill_without_rows<T>();
    const BackwardOutputs<T> pointers = gradients.pointers<T>();
    RecurrentBackward<T>(steps, in, OutputGrad<T>(dy, steps), pointers)
        .run(data_or_null<T>(dh), kind == kLstm ? data_or_null<T>(dc) : nullptr);
  });
  return gradients.take(x.scalar_type());
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(recurrent_backward, ops) {
  ops.impl("recurrent_scan_backward", TORCH_BOX(&nnarch::recurrent_scan_backward));
}
