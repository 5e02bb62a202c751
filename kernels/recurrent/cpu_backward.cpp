// The backward of recurrent layers on the CPU.
#include "recurrent/cpu_backward.h"

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
      w_hh_(steps.count() > 1 || out.dh0 ? s_.gates * s_.hidden : 0, s_.out, uses(out.dh0) == 1),
      w_ih_(out.dx ? s_.gates * s_.hidden : 0, s_.in, steps.total() <= kInputRows),
      w_hr_(in.weight_hr ? s_.out : 0, s_.hidden, uses(true) == 1),
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
  const auto pack = [&](DeepPanels<T>& panels, const T* weight, int64_t from) {
    const int64_t n = panels.depth();
    std::vector<const T*> rows(static_cast<size_t>(n));
    for (int64_t k = 0; k < n; ++k) rows[k] = weight + (from + k) % n * panels.columns();
    panels.set(rows);
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
      state_product(grad_at(rows.at) + columns_.state, count, i % 2 == 1,
                    dh_.get() + begin * h_step_);
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

// dh = grad · W_hh, in tasks of columns where that is worth a start of threads. Few rows wait for
// the weights: every other step reads them from the last column to the first, so that what the step
// before has left in L2 comes first.
template <class T>
void RecurrentBackward<T>::state_product(const T* grad, int64_t rows, bool turned, T* dh) const {
  constexpr int64_t few = 4, worth = int64_t{1} << 20;  // products
  const bool cut = w_hh_.depth() * s_.out * (rows + 4) >= worth;
  const int64_t wide = rows <= few ? gemm<T>().nr : 128;
  const int64_t each = cut ? wide : std::max<int64_t>(1, s_.out), tasks = ceil_div(s_.out, each);
  parallel_tasks(tasks, [&](int64_t task) {
    const int64_t first = (turned ? tasks - 1 - task : task) * each;
    w_hh_.multiply(grad, columns_.step, rows, first, std::min(each, s_.out - first), dh, h_step_);
  });
}

// dx = grad · W_ih.
template <class T>
void RecurrentBackward<T>::input_product(const TimeChunk& c) const {
  constexpr int64_t most_columns = 128;  // four panels
  const int64_t blocks = ceil_div(c.rows, kInputRows);
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

template class RecurrentBackward<float>;
template class RecurrentBackward<double>;

}  // namespace nnarch
