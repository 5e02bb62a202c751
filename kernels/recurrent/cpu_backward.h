// The backward of a recurrent layer, chunk of time by chunk of time from the last to the first:
// the scan of the chunk, then what its gradients of the products give for x and for the weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/arena.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"
#include "recurrent/backward.h"
#include "recurrent/cpu_deep_panels.h"
#include "recurrent/cpu_problem.h"
#include "recurrent/cpu_weight_sums.h"

namespace nnarch {

// What the backward reads, in the type of computation.
template <class T>
struct BackwardInputs {
  RecurrentSizes sizes;
  InputRows<T> x;
  const T *h0, *c0;                            // dense, or null
  const T *weight_ih, *weight_hh, *weight_hr;  // dense
  const T *peephole, *norm;                    // dense, or null
  const T* y;                                  // dense
  ReserveRows<T> reserve;
  T eps;
};

// Where gradients go; null where one is not wanted.
template <class T>
struct BackwardOutputs {
  T *dx, *dh0, *dc0, *dw_ih, *dw_hh, *db_ih, *db_hh, *dw_hr, *d_peephole, *d_norm;
};

// The gradient of the output, whose rows may have any stride.
template <class T>
struct OutputGrad {
  const T* data = nullptr;  // null: 0
  int64_t step = 0, row = 0, element = 1;
  bool uniform = true;

  OutputGrad(const OptTensor& dy, const Steps& steps) {
    if (!dy) return;
    const int64_t last = dy->dim() - 1;
    data = nnarch::data<T>(*dy);
    step = last == 2 ? dy->stride(0) : 0, row = dy->stride(last - 1);
    element = dy->size(last) > 1 ? dy->stride(last) : 1;
    uniform = steps.uniform();
  }
  const T* at(const Steps& steps, int64_t t, int64_t b) const {
    return uniform ? data + t * step + b * row : data + (steps.first(t) + b) * row;
  }
};

// Columns of the gradients of the products, a row: see CellGrad. The input's product has those from
// 0 on, the state's those from `state` on.
struct GradColumns {
  int64_t state, width, step;

  explicit GradColumns(const RecurrentSizes& s, bool normalized) {
    const int64_t gates = s.gates * s.hidden;
    state = normalized ? gates : s.kind == kGru ? s.hidden : 0;
    width = state + gates;
    step = round_up(width, 16) + 16;  // rows 4 KB apart would share one set of the cache
  }
};

// Steps [begin, end) in the order of the forward, and their rows.
struct TimeChunk {
  int64_t begin, end, first_row, rows;
};

// Chunks of about a thousand rows: enough that reading and writing the weights' gradients once a
// chunk costs little, few enough that the chunk's gradients stay in cache.
inline std::vector<TimeChunk> time_chunks(const Steps& steps, int64_t row_bytes) {
  constexpr int64_t bytes = int64_t{8} << 20, fewest = 256, most = 1024;
  const int64_t limit = std::clamp(bytes / std::max<int64_t>(1, row_bytes), fewest, most);
  std::vector<TimeChunk> chunks;
  for (int64_t i = 0; i < steps.count();) {
    TimeChunk c{i, i, 0, 0};
    do {
      c.rows += steps.rows(steps.at(i++));
    } while (i < steps.count() && c.rows + steps.rows(steps.at(i)) <= limit);
    c.end = i;
    c.first_row = steps.first(std::min(steps.at(c.begin), steps.at(i - 1)));
    chunks.push_back(c);
  }
  return chunks;
}

inline int64_t longest(const std::vector<TimeChunk>& chunks) {
  int64_t rows = 0;
  for (const TimeChunk& c : chunks) rows = std::max(rows, c.rows);
  return rows;
}

template <class T>
class RecurrentBackward {
 public:
  RecurrentBackward(const Steps& steps, const BackwardInputs<T>& in, const OutputGrad<T>& dy,
                    const BackwardOutputs<T>& out);
  // From the gradients of the last h and c, dense, or null: 0.
  void run(const T* dh, const T* dc);

 private:
  static constexpr int64_t kSumRows = kNormRows + 3;  // of norm, then of the peephole
  static constexpr int64_t kGroupRows = 28;           // sequences: two register tiles

  // Sequences [first, first + count) at step t; their rows start at `row` of all, at `at` of the
  // chunk.
  struct StepRows {
    int64_t t, first, count, row, at;
  };

  void pack_weights();
  void start_states(const T* dh, const T* dc);
  void list_rows(const TimeChunk& c);
  void scan(const TimeChunk& c, int64_t group);
  void cell(const StepRows& r, int64_t group, T* dy_room, T* hidden_room);
  void state_product(const T* grad, int64_t rows, T* dh) const;
  void input_product(const TimeChunk& c) const;
  void sum_weights_of(const TimeChunk& c, bool add) const;
  void add_group_sums();
  void finish();

  int64_t groups() const { return ceil_div(steps_.batch(), kGroupRows); }
  int64_t group_start(int64_t g) const { return steps_.batch() * g / groups(); }
  T* sums_of(int64_t g) { return sums_.get() + g * kSumRows * s_.hidden; }
  bool projects() const { return in_.weight_hr != nullptr; }
  T* grad_at(int64_t row) const { return grad_.get() + row * columns_.step; }

  const Steps& steps_;
  const BackwardInputs<T>& in_;
  const RecurrentSizes& s_;
  const OutputGrad<T>& dy_;
  const BackwardOutputs<T>& out_;
  GradColumns columns_;
  std::vector<TimeChunk> chunks_;
  int64_t most_rows_;  // of a chunk
  int64_t h_step_;     // whole panels
  bool norm_sums_, peephole_sums_;
  DeepPanels<T> w_hh_, w_ih_, w_hr_;
  PackedRows<T> x_rows_, h_rows_, hidden_rows_;
  Scratch<T> zeros_, dh_, carry_;
  // Of a chunk: the gradients of the products; and with a projection those of h and what was
  // projected.
  Scratch<T> grad_, projected_, hidden_;
  Scratch<T> sums_;  // of all groups, then of every group in a chunk
  std::vector<const T*> x_at_, h_before_, c_before_;
};

}  // namespace nnarch
