// The forward of one layer: its weights as a call has them, its vectors, and who runs the steps.
#pragma once

#include <algorithm>
#include <optional>

#include "cpu/streaming.h"
#include "recurrent/cpu_step.h"

namespace nnarch {

template <class T>
struct LayerWeights {
  GateWeight<T> ih, hh, hr;
  PairWeight pairs = {};

  LayerWeights(const Tensor& weight_ih, const Tensor& weight_hh, const OptTensor& weight_hr,
               int64_t kind)
      : ih(view(weight_ih, gate_count(kind))), hh(view(weight_hh, gate_count(kind))) {
    if (weight_hr) hr = view(*weight_hr, 1);
  }

  int64_t hr_size() const { return hr.raw ? hr.packed_size() : 0; }
  // In elements of T; bfloat16 values are two an element.
  int64_t hh_size(bool bfloat16) const {
    return bfloat16 ? ceil_div(hh.packed_size(), 2) : hh.packed_size();
  }
  int64_t size(bool bfloat16) const {
    return checked_sum(checked_sum(ih.packed_size(), hr_size()), hh_size(bfloat16));
  }
  // Of the form for pairs, behind all others; 0 where none serves.
  int64_t pairs_size() const {
    if constexpr (sizeof(T) != sizeof(float)) return 0;
    const ColumnOrder& order = hh.order;
    if (!pairs_serve(order.gates, order.hidden, ih.depth, hh.depth)) return 0;
    return nnarch::pairs_size(order.gates, order.hidden, ih.depth, hh.depth);
  }
  // Takes all weights from where they are packed: those of the input, of the projection, the state.
  void read(const T* packed, bool bfloat16) {
    ih.packed = packed;
    if (hr.raw) hr.packed = packed + ih.packed_size();
    const T* state = packed + ih.packed_size() + hr_size();
    if (bfloat16)
      hh.bfloat16 = reinterpret_cast<const uint16_t*>(state);
    else
      hh.packed = state;
  }

 private:
  static GateWeight<T> view(const Tensor& w, int64_t gates) {
    return {column_order<T>(gates, w.size(0) / gates), w.size(1), data<T>(w), w.stride(0)};
  }
};

inline Tensor with_dense_rows_of(const Tensor& w) {
  const Tensor t = to_compute_type(w);
  return t.stride(1) == 1 ? t : as_contiguous(t);
}
inline OptTensor with_dense_rows_of(const OptTensor& w) {
  return w ? OptTensor(with_dense_rows_of(*w)) : std::nullopt;
}

template <class T>
void pack_all(const LayerWeights<T>& w, bool bfloat16, T* to) {
  pack_gates(w.ih, to);
  if (w.hr.raw) pack_gates(w.hr, to + w.ih.packed_size());
  T* state = to + w.ih.packed_size() + w.hr_size();
  if (!bfloat16) return pack_gates(w.hh, state);
  if constexpr (sizeof(T) == 4) {
    const int64_t n = w.hh.packed_size();
    Scratch<T> wide(n);
    pack_gates(w.hh, wide.get());
    if (n % 2) state[n / 2] = 0;
    recurrent<T>().to_bfloat16(wide.get(), reinterpret_cast<uint16_t*>(state), n);
  }
}

// The weights of a call: as packed before, packed now into scratch memory, or as they are, where
// there are too few rows to pay for packing.
template <class T>
class WeightsOfCall {
 public:
  WeightsOfCall(LayerWeights<T>& w, const OptTensor& packed, const Steps& steps) {
    if (packed && packed->numel() > 0) {
      take(w, *packed, steps);
      return;
    }
    if (few_rows(steps)) return;
    own_.emplace(w.size(false));
    pack_all(w, false, own_->get());
    w.read(own_->get(), false);
  }

 private:
  static bool few_rows(const Steps& steps) {
    constexpr int64_t most_steps = 16, most_cells = 64;
    const bool reads_in_place = steps.batch() <= recurrent<T>().most_few_rows;
    return reads_in_place ? steps.count() < most_steps
                          : steps.count() == 1 && steps.batch() <= most_cells;
  }

  void take(LayerWeights<T>& w, const Tensor& packed, const Steps& steps) {
    constexpr bool is_float = sizeof(T) == 4;
    const int64_t size = w.size(false), pairs = w.pairs_size(), given = packed.numel();
    const bool bfloat16 = is_float && given == w.size(true) && w.size(true) != size;
    const bool in_pairs = pairs > 0 && given == checked_sum(size, pairs);
    const ScalarType type = is_float ? ScalarType::Float : ScalarType::Double;
    require((bfloat16 || in_pairs || given == size) && packed.is_contiguous() &&
                packed.scalar_type() == type,
            "recurrent_scan: packed does not belong to these weights");
    w.read(data<T>(packed), bfloat16);
    if constexpr (is_float)
      if (in_pairs && precision() != Precision::highest)
        w.pairs = pair_weight(data<T>(packed) + size, w.ih.depth + w.hh.depth);
    if (!bfloat16 || steps.batch() <= recurrent<T>().most_few_rows) return;
    if constexpr (is_float) {  // many rows: arithmetic is the floor, not the bytes
      own_.emplace(w.hh.packed_size());
      recurrent<T>().from_bfloat16(w.hh.bfloat16, own_->get(), w.hh.packed_size());
      w.hh.packed = own_->get(), w.hh.bfloat16 = nullptr;
    }
  }

  std::optional<Scratch<T>> own_;
};

// The vectors of a call in the order of columns.
template <class T>
class OrderedVectors {
 public:
  OrderedVectors(const ColumnOrder& order, int64_t count)
      : order_(order), size_(row_pitch<T>(order.columns())), memory_(size_ * count) {
    std::fill_n(memory_.get(), size_ * count, T{0});
  }
  T* at(int64_t i) const { return memory_.get() + i * size_; }
  void add(int64_t i, const T* values) const { add(i, values, order_.gates); }
  void add(int64_t i, const T* values, int64_t gates) const {
    if (values) add_in_order(order_, gates, values, at(i));
  }

 private:
  const ColumnOrder order_;
  int64_t size_;
  Scratch<T> memory_;
};

// Sequences that go through all steps as one task. A step of some length is shared between threads;
// shorter ones would wait for each other longer than they take: there, threads share the sequences.
template <class T>
bool shares_steps(const RecurrentSizes& s, int64_t batch) {
  constexpr int64_t long_step = int64_t{20} << 20;  // operations: 200 µs
  constexpr int64_t long_read = int64_t{6} << 20;   // bytes: 100 µs
  const int64_t weights = s.gates * s.hidden * s.out;
  return 2 * weights * batch >= long_step || weights * int64_t{sizeof(T)} >= long_read;
}

template <class T>
const char* algorithm_name(const RecurrentLayer<T>& l, int64_t groups) {
  if (steps_as_pairs(l, l.steps.batch() / groups))
    return l.wide ? "pairs_wide" : groups > 1 ? "pairs_groups" : "pairs";
  return l.wide ? "scan_wide" : groups > 1 ? "scan_groups" : "scan";
}

template <class T>
void run_layer(const RecurrentLayer<T>& layer) {
  constexpr int64_t least_sequences = 28;
  const int64_t batch = layer.steps.batch();
  const int64_t groups = layer.wide ? 1 : std::max<int64_t>(1, batch / least_sequences);
  set_algorithm(algorithm_name(layer, groups));
  if (groups == 1) {
    FlushDenormals guard;
    return run_group(layer, {0, batch});
  }
  parallel_tasks(
      groups, [&](int64_t i) { run_group(layer, {batch * i / groups, batch * (i + 1) / groups}); });
}

struct Outputs {
  Tensor y;
  OptTensor h;  // none where y is all that a step gives
  Tensor c, reserve;
};

// The last state of every sequence is its last output.
template <class T>
void gather_last(const RecurrentLayer<T>& l, T* h) {
  const int64_t out = l.size.out;
  for (int64_t t = l.steps.reverse() ? 0 : l.steps.count() - 1, b = 0; t >= 0; --t)
    for (; b < l.steps.rows(t); ++b)
      std::copy_n(l.y + (l.steps.first(t) + b) * out, out, h + b * out);
}

template <class T>
void forward(const RecurrentArgs& a, const Tensor& x, const OptTensor& packed, const Steps& steps,
             const RecurrentSizes& size, T eps, const Outputs& outputs) {
  const Tensor ih = with_dense_rows_of(a.weight_ih), hh = with_dense_rows_of(a.weight_hh);
  const OptTensor hr = with_dense_rows_of(a.weight_hr);
  const OptTensor bias_ih = as_dense(a.bias_ih), bias_hh = as_dense(a.bias_hh);
  const OptTensor peephole = as_dense(a.peephole), norm = as_dense(a.norm);
  const OptTensor h0 = as_dense(a.h0), c0 = as_dense(a.c0);
  const int64_t batch = steps.batch(), hidden = size.hidden, out = size.out;

  LayerWeights<T> weights(ih, hh, hr, size.kind);
  const WeightsOfCall<T> memory(weights, packed, steps);
  const ColumnOrder& order = weights.hh.order;
  RecurrentLayer<T> l{steps, size, InputRows<T>(x, steps), weights.ih, weights.hh, weights.hr, {}};
  l.pairs = weights.pairs;
  l.projects = hr.has_value();
  l.peephole = data_or_null<T>(peephole);
  l.y = mutable_data<T>(outputs.y);
  l.y_past_caches = !l.projects && !norm && outgrows_caches(l.y, steps.total(), out);
  l.kept = {outputs.reserve.numel() > 0 ? mutable_data<T>(outputs.reserve) : nullptr, hidden,
            reserve_width(size.kind, norm.has_value())};
  l.wide = shares_steps<T>(size, batch);

  // Biases, which join the input's product but for that of the GRU's gate n.
  const OrderedVectors<T> vectors(order, norm ? 4 : 1);
  const T *b_ih = data_or_null<T>(bias_ih), *b_hh = data_or_null<T>(bias_hh);
  NormRow<T> input_norm{order, eps, vectors.at(0), nullptr}, state_norm = input_norm;
  if (norm) {
    const T* n = data<T>(*norm);
    for (int64_t i = 0; i < 4; ++i) vectors.add(i, n + i * 4 * hidden);
    vectors.add(1, b_ih), vectors.add(3, b_hh);
    input_norm.bias = vectors.at(1), state_norm.gain = vectors.at(2),
    state_norm.bias = vectors.at(3);
    l.input_norm = &input_norm, l.state_norm = &state_norm, l.cell_norm = n + 16 * hidden;
  } else {
    const bool gru = size.kind == kGru;
    vectors.add(0, b_ih);
    vectors.add(0, b_hh, gru ? 2 : order.gates);
    l.start = vectors.at(0);
    if (gru && b_hh) l.bias_n = b_hh + 2 * hidden;
  }

  if (size.kind == kLstm) {
    l.c = mutable_data<T>(outputs.c);
    if (c0)
      std::copy_n(data<T>(*c0), batch * hidden, l.c);
    else
      std::fill_n(l.c, batch * hidden, T{0});
  }
  l.state_pitch = row_pitch<T>(out);
  Scratch<T> state(2 * batch * l.state_pitch);
  l.state = state.get();
  const T* first = data_or_null<T>(h0);
  for (int64_t i = 0; i < 2; ++i)
    for (int64_t b = 0; b < batch; ++b) {
      T* row = l.state + (i * batch + b) * l.state_pitch;
      if (first)
        std::copy_n(first + b * out, out, row);
      else
        std::fill_n(row, out, T{0});
    }
  if (steps.count() > 0) run_layer(l);
  if (!outputs.h) return;
  T* last = mutable_data<T>(*outputs.h);
  if (steps.count() > 0) return gather_last(l, last);
  for (int64_t b = 0; b < batch; ++b) std::copy_n(l.state + b * l.state_pitch, out, last + b * out);
}

}  // namespace nnarch
