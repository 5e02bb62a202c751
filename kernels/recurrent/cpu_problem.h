// A recurrent layer over sequences, as the drivers see it: sizes, steps, and where rows lie.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/tensor.h"

namespace nnarch {

// The codes of kernels/recurrent/kinds.py.
enum CellKind : int64_t { kRnnTanh = 0, kRnnRelu = 1, kLstm = 2, kGru = 3 };
// Rows of H in `norm` (kinds.NORM_ROWS).
inline constexpr int64_t kNormRows = 18;

inline int64_t gate_count(int64_t kind) { return kind == kLstm ? 4 : kind == kGru ? 3 : 1; }

// Values of H that a forward keeps, a row (kinds.reserve_width).
inline int64_t reserve_width(int64_t kind, bool normalized) {
  if (kind == kLstm) return normalized ? 13 : 5;
  return kind == kGru ? 4 : 0;
}

// The rows of every step. Rows of x, y and the reserve are numbered alike: those of step t are
// [first(t), first(t) + rows(t)), of the sequences 0, 1, …, in time order also when reversed.
class Steps {
 public:
  // x as [T, B, I] or [B, I] (one step); or its rows [N, I], and how many sequences last to each
  // step, which must not grow.
  Steps(const Tensor& x, const OptTensor& batch_sizes, bool reverse) : reverse_(reverse) {
    if (!batch_sizes) {
      require(x.dim() == 2 || x.dim() == 3, "recurrent_scan: x must be 2-D or 3-D");
      count_ = x.dim() == 3 ? x.size(0) : 1;
      batch_ = x.size(x.dim() - 2);
      total_ = checked_product(count_, batch_);
      return;
    }
    require(x.dim() == 2, "recurrent_scan: x must be 2-D with batch_sizes");
    require(batch_sizes->dim() == 1 && batch_sizes->scalar_type() == ScalarType::Long,
            "recurrent_scan: batch_sizes must be [T] of int64");
    count_ = batch_sizes->size(0);
    const int64_t* sizes = data<int64_t>(*batch_sizes);
    first_.resize(static_cast<size_t>(count_) + 1, 0);
    for (int64_t t = 0, before = INT64_MAX; t < count_; ++t) {
      const int64_t size = sizes[t * batch_sizes->stride(0)];
      require(size >= 1 && size <= before, "recurrent_scan: batch_sizes must not grow");
      first_[t + 1] = checked_sum(first_[t], size);
      before = size;
    }
    batch_ = count_ > 0 ? first_[1] : 0;
    total_ = first_.back();
    require(total_ == x.size(0), "recurrent_scan: batch_sizes must add up to the rows of x");
  }

  int64_t count() const { return count_; }
  int64_t batch() const { return batch_; }  // sequences
  int64_t total() const { return total_; }  // rows of all steps
  int64_t first(int64_t t) const { return first_.empty() ? t * batch_ : first_[t]; }
  int64_t rows(int64_t t) const { return first_.empty() ? batch_ : first_[t + 1] - first_[t]; }
  bool uniform() const { return first_.empty(); }
  bool reverse() const { return reverse_; }
  // The step that comes i-th: from the last to the first where reversed.
  int64_t at(int64_t i) const { return reverse_ ? count_ - 1 - i : i; }

 private:
  std::vector<int64_t> first_;  // of a packed sequence, T + 1
  int64_t count_ = 0, batch_ = 0, total_ = 0;
  bool reverse_;
};

// x with dense rows: that of sequence b at step t starts at data + t·step + b·row, uniform; of a
// packed sequence, at data + (first(t) + b)·row.
template <class T>
struct InputRows {
  const T* data;
  int64_t step, row;
  bool uniform;

  InputRows(const Tensor& x, const Steps& steps)
      : data(nnarch::data<T>(x)),
        step(x.dim() == 3 ? x.stride(0) : 0),
        row(x.stride(x.dim() - 2)),
        uniform(steps.uniform()) {
    if (uniform && x.dim() == 3 && x.size(1) == 1) row = step;  // a size of 1 has any stride
  }

  const T* at(const Steps& steps, int64_t t, int64_t b) const {
    return uniform ? data + t * step + b * row : data + (steps.first(t) + b) * row;
  }
  // Whether all rows lie evenly, `row` apart, from the first step to the last.
  bool even(const Steps& steps) const {
    return !uniform || steps.count() <= 1 || step == steps.batch() * row;
  }
};

// x in the type of computation, its rows dense: itself where it is so already.
inline Tensor with_dense_rows(const Tensor& x) {
  const Tensor compute = to_compute_type(x);
  return compute.stride(compute.dim() - 1) == 1 ? compute : as_contiguous(compute);
}

inline OptTensor as_dense(const OptTensor& t) {
  return t ? OptTensor(as_contiguous(to_compute_type(*t))) : std::nullopt;
}

template <class T>
const T* data_or_null(const OptTensor& t) {
  return t ? data<T>(*t) : nullptr;
}

// The arguments that forward and backward share, as given.
struct RecurrentArgs {
  const Tensor& x;
  const OptTensor &h0, &c0;
  const Tensor &weight_ih, &weight_hh;
  const OptTensor &bias_ih, &bias_hh, &weight_hr, &peephole, &norm, &batch_sizes;
  int64_t kind;
};

struct RecurrentSizes {
  int64_t kind, gates;
  int64_t in, hidden, out;  // `out` is the size of h: the projection's, or `hidden`

  // Throws where arguments do not fit together; Python's check says it precisely.
  RecurrentSizes(const RecurrentArgs& a, const Steps& steps) : kind(a.kind) {
    require(kind >= 0 && kind <= kGru, "recurrent_scan: unknown kind");
    require(a.weight_ih.dim() == 2 && a.weight_hh.dim() == 2,
            "recurrent_scan: weights must be 2-D");
    gates = gate_count(kind);
    require(a.weight_ih.size(0) % gates == 0, "recurrent_scan: weight_ih has no whole gates");
    in = a.weight_ih.size(1), hidden = a.weight_ih.size(0) / gates, out = a.weight_hh.size(1);
    require(a.x.size(a.x.dim() - 1) == in, "recurrent_scan: x and weight_ih do not fit");
    require(a.weight_hh.size(0) == gates * hidden, "recurrent_scan: weight_hh does not fit");
    require(a.weight_hr || out == hidden, "recurrent_scan: weight_hh does not fit");
    require(a.weight_hh.scalar_type() == type(a) && a.weight_ih.scalar_type() == type(a),
            "recurrent_scan: dtypes differ");
    require(kind == kLstm || !(a.c0 || a.weight_hr || a.peephole || a.norm),
            "recurrent_scan: only the LSTM has c0, weight_hr, peephole and norm");
    check(a, a.h0, {steps.batch(), out});
    check(a, a.c0, {steps.batch(), hidden});
    check(a, a.bias_ih, {gates * hidden});
    check(a, a.bias_hh, {gates * hidden});
    check(a, a.weight_hr, {out, hidden});
    check(a, a.peephole, {3, hidden});
    check(a, a.norm, {kNormRows, hidden});
  }

 private:
  static ScalarType type(const RecurrentArgs& a) { return a.x.scalar_type(); }
  static void check(const RecurrentArgs& a, const OptTensor& t, const IntList& sizes) {
    if (t)
      require(sizes_of(*t) == sizes && t->scalar_type() == type(a),
              "recurrent_scan: a tensor does not fit");
  }
};

// What the forward keeps: row r has `width` vectors of H, in the order of kinds.reserve_width.
template <class T>
struct ReserveRows {
  T* data = nullptr;
  int64_t hidden = 0, width = 0;

  int64_t row_step() const { return width * hidden; }
  T* at(int64_t row, int64_t vector) const { return data + (row * width + vector) * hidden; }
};

}  // namespace nnarch
