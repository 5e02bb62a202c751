// A tensor as rows of `columns` numbers, however its leading dimensions are strided.
#pragma once

#include <algorithm>

#include "cpu/arena.h"
#include "cpu/dense.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"
#include "layer_norm/cpu_kernels.h"

namespace nnarch {

// Calls f with a value of the type that tensors of `type` are stored in.
template <class F>
auto with_stored_type(ScalarType type, const char* op, const F& f) {
  if (type == ScalarType::Float) return f(float{});
  if (type == ScalarType::BFloat16) return f(BFloat16{});
  if (type == ScalarType::Half) return f(Float16{});
  if (type == ScalarType::Double) return f(double{});
  throw std::runtime_error(std::string(op) + ": dtype must be floating point");
}

// How many rows a tensor has; none where a row has no columns.
inline int64_t rows_of(const Tensor& x, int64_t columns) {
  require(columns >= 0, "columns must not be negative");
  if (columns == 0) {
    require(x.numel() == 0, "rows must have the columns that are normalized");
    return 0;
  }
  const auto sizes = x.sizes();
  int64_t product = 1;
  for (auto d = static_cast<int64_t>(sizes.size()); product < columns && d-- > 0;)
    product = checked_product(product, sizes[d]);
  require(product == columns || x.numel() == 0, "rows must have the columns that are normalized");
  return x.numel() / columns;
}

// Where the rows of `t` begin, or nothing: its rows are not dense, or take more than two strides.
inline std::optional<RowOffsets> offsets_of(const Tensor& t, int64_t rows, int64_t columns) {
  if (t.is_contiguous()) return RowOffsets{rows, 0, columns};
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t d = t.dim(), dense = 1;
  while (dense < columns) {
    --d;
    if (sizes[d] != 1 && strides[d] != dense) return std::nullopt;
    dense *= sizes[d];
  }
  RowOffsets offsets{1, 0, 0};
  int64_t outer = 1;
  while (d-- > 0) {
    if (sizes[d] == 1) continue;
    if (outer == 1 && (offsets.inner == 1 || strides[d] == offsets.inner * offsets.inner_stride)) {
      if (offsets.inner == 1) offsets.inner_stride = strides[d];
      offsets.inner *= sizes[d];
    } else if (outer == 1 || strides[d] == outer * offsets.outer_stride) {
      if (outer == 1) offsets.outer_stride = strides[d];
      outer *= sizes[d];
    } else {
      return std::nullopt;
    }
  }
  return offsets;
}

// Whether a tensor is one number in memory, expanded.
inline bool is_one_number(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && strides[d] != 0) return false;
  return true;
}

// The rows of an argument, which are kept alive: a copy where they have to be dense first.
template <class S>
class RowsOf {
 public:
  RowsOf(const OptTensor& t, const Tensor& like, int64_t rows, int64_t columns) {
    if (!t) return;
    if (t->get() != like.get()) {
      require(t->scalar_type() == like.scalar_type(), "dtypes differ");
      require(same_sizes(*t, like), "shapes differ");
    }
    auto offsets = offsets_of(*t, rows, columns);
    if (!offsets && rows > 0 && is_one_number(*t)) {
      // The gradient of a sum: one row of it stays in the first cache.
      const S value = *data<S>(*t);
      tensor_ = new_contiguous({columns}, t->scalar_type());
      std::fill_n(mutable_data<S>(*tensor_), columns, value);
      rows_ = {data<S>(*tensor_), RowOffsets{rows, 0, 0}};
      return;
    }
    tensor_ = offsets ? *t : as_contiguous(*t);
    if (rows == 0) return;
    rows_ = {data<S>(*tensor_), offsets ? *offsets : RowOffsets{rows, 0, columns}};
  }
  const Rows<S>& get() const { return rows_; }

 private:
  OptTensor tensor_;
  Rows<S> rows_;
};

// A vector beside x, [columns], dense and in the type that kernels compute in; `fallback` where
// there is none.
template <class T>
class RowVector {
 public:
  RowVector(const OptTensor& t, ScalarType type, int64_t columns, T fallback)
      : copy_(t ? 0 : columns) {
    if (t) {
      require(t->dim() == 1 && t->size(0) == columns, "parameters must have size [columns]");
      require(t->scalar_type() == type || (is_half(type) && t->scalar_type() == ScalarType::Float),
              "parameters must have the dtype of the input, or float32 beside a half type");
      tensor_ = as_contiguous(to_compute_type(*t));
      values_ = data<T>(*tensor_);
    } else {
      std::fill(copy_.get(), copy_.get() + columns, fallback);
      values_ = copy_.get();
    }
  }
  const T* get() const { return values_; }

 private:
  OptTensor tensor_;
  Scratch<T> copy_;
  const T* values_;
};

// Calls f(first, count) for runs of rows.
template <class F>
void for_each_run(int64_t rows, int64_t columns, const F& f) {
  const int64_t run = std::max<int64_t>(1, 16384 / columns);
  parallel_tasks(ceil_div(rows, run),
                 [&](int64_t task) { f(task * run, std::min(run, rows - task * run)); });
}

// Sums over all rows, `terms` for every column: rows are cut into parts by the shape alone, a part
// adds at most kShortSum rows in T before it goes on in double, and parts are added in order.
inline constexpr int64_t kShortSum = 64;
inline constexpr int kMostTerms = 2;

// Calls f(first, count, sums): it adds its rows to sums, [terms] of [columns]. `totals` likewise.
template <class T, class F>
void sum_rows(int64_t rows, int64_t columns, int terms, T* const* totals, const F& f) {
  const int64_t width = terms * columns;
  const int64_t least = std::max(kGradRows, 32768 / std::max<int64_t>(1, columns));
  const int64_t part = round_up(std::max(least, ceil_div(rows, 64)), kGradRows);
  const int64_t parts = ceil_div(rows, part);
  if (parts <= 1 && rows <= kShortSum) {  // what the way below comes to
    for (int term = 0; term < terms; ++term) std::fill(totals[term], totals[term] + columns, T{0});
    parallel_tasks(parts, [&](int64_t) { f(int64_t{0}, rows, totals); });
    return;
  }
  const Scratch<double> partial(checked_product(parts, width));
  parallel_tasks(parts, [&](int64_t task) {
    double* sums = partial.get() + task * width;
    const Scratch<T> brief(width);
    const int64_t end = std::min(rows, (task + 1) * part);
    for (int64_t r = task * part; r < end; r += kShortSum) {
      std::fill(brief.get(), brief.get() + width, T{0});
      T* term_sums[kMostTerms];
      for (int term = 0; term < terms; ++term) term_sums[term] = brief.get() + term * columns;
      f(r, std::min(kShortSum, end - r), term_sums);
      if (r == task * part)
        for (int64_t i = 0; i < width; ++i) sums[i] = brief[i];
      else
        for (int64_t i = 0; i < width; ++i) sums[i] += brief[i];
    }
  });
  constexpr int64_t block = 2048;
  const int64_t blocks = ceil_div(columns, block);
  parallel_tasks(terms * blocks, [&](int64_t task) {
    const int64_t term = task / blocks, first = task % blocks * block;
    const int64_t count = std::min(block, columns - first);
    double total[block] = {};
    for (int64_t p = 0; p < parts; ++p) {
      const double* from = partial.get() + p * width + term * columns + first;
      for (int64_t i = 0; i < count; ++i) total[i] += from[i];
    }
    for (int64_t i = 0; i < count; ++i) totals[term][first + i] = static_cast<T>(total[i]);
  });
}

}  // namespace nnarch
