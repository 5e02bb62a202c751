// embedding on the CPU, and the gradient of its table.
#include <algorithm>
#include <vector>

#include "cpu/arena.h"
#include "cpu/dense.h"
#include "cpu/lazy_zeros.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"
#include "cpu/streaming.h"
#include "cpu/tensor.h"
#include "embedding/cpu_ids.h"
#include "embedding/cpu_kernels.h"

namespace nnarch {
namespace {

// A table's gradient of this size takes fresh pages, which the operating system has cleared: its
// rows of zeros are not written again. 30522×768 with 4096 tokens, forward and backward: 14.9 ms
// with them written, 12.5 without (15.5 with pages of 4 KB, for 7000 faults of 2 µs).
constexpr int64_t kLazyBytes = int64_t{8} << 20;

int64_t bytes_of(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// Dense rows; half types stay as they are.
Tensor dense_rows(const Tensor& t) {
  return t.is_contiguous() || !is_half(t.scalar_type())
             ? as_contiguous(t)
             : to_type(as_contiguous(to_compute_type(t)), t.scalar_type());
}

Tensor embedding(const Tensor& tokens, const Tensor& weight_in, int64_t, bool, bool) {
  set_algorithm("gather");
  require(weight_in.dim() == 2, "embedding: weight must be [V, C]");
  with_scalar_type(weight_in.scalar_type(), "embedding", [](auto) {});
  const Ids ids(tokens, weight_in.size(0), "embedding: input must be integers from 0 to V - 1");
  const Tensor weight = dense_rows(weight_in);
  IntList sizes = sizes_of(tokens);
  sizes.push_back(weight.size(1));
  const Tensor y = new_contiguous(sizes, weight.scalar_type());
  const int64_t row = weight.size(1) * bytes_of(weight.scalar_type());
  if (row == 0 || ids.count() == 0) return y;
  const char* from = data<char>(weight);
  char* to = mutable_data<char>(y);
  const bool stream = outgrows_caches<char>(to, ids.count(), row);
  const auto copy = NNARCH_SELECT(copy_rows_fn());
  const int64_t run = std::max<int64_t>(1, (int64_t{64} << 10) / row);
  parallel_tasks(ceil_div(ids.count(), run), [&](int64_t task) {
    const int64_t first = task * run;
    copy(from, ids.get() + first, to + first * row, std::min(run, ids.count() - first), row,
         stream);
  });
  return y;
}

// The places of every table row's gradients, in ascending order: a counting sort.
struct SortedIds {
  std::vector<int64_t> start, order;

  SortedIds(const Ids& ids, int64_t rows)
      : start(static_cast<size_t>(rows) + 1), order(static_cast<size_t>(ids.count())) {
    const int64_t* id = ids.get();
    for (int64_t i = 0; i < ids.count(); ++i) ++start[static_cast<size_t>(id[i]) + 1];
    for (size_t v = 1; v < start.size(); ++v) start[v] += start[v - 1];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t i = 0; i < ids.count(); ++i)
      order[static_cast<size_t>(next[static_cast<size_t>(id[i])]++)] = i;
  }
};

// Every row of the table is written once, in tasks of rows or, for small tables, of columns too:
// sums have the order of the gradients, whatever the threads.
template <class T>
void scatter(const EmbeddingScatter<T>& s, T* to, int64_t rows) {
  constexpr int64_t bytes = int64_t{256} << 10, few = 16, narrow = 128;
  const int64_t row_bytes = s.columns * int64_t{sizeof(T)};
  int64_t run = std::clamp<int64_t>(bytes / row_bytes, 1, rows), width = s.columns;
  if (ceil_div(rows, run) < few) {
    width = std::min(narrow, s.columns);
    run = std::max<int64_t>(1, ceil_div(rows, few));
  }
  const int64_t across = ceil_div(s.columns, width);
  const auto& table = NNARCH_SELECT(embedding_table<T>());
  parallel_tasks(ceil_div(rows, run) * across, [&](int64_t task) {
    const int64_t first = task / across * run, column = task % across * width;
    table.scatter(s, to, first, std::min(rows, first + run), column,
                  std::min(s.columns, column + width));
  });
}

Tensor embedding_grad(const Tensor& grad_in, const Tensor& tokens, int64_t rows, int64_t skipped,
                      double scale, bool mean) {
  set_algorithm("sorted");
  const int64_t columns = grad_in.dim() > 0 ? grad_in.size(grad_in.dim() - 1) : 0;
  require(rows >= 0 && grad_in.dim() == tokens.dim() + 1 &&
              grad_in.numel() == checked_product(tokens.numel(), columns),
          "embedding_grad: grad must be [..., C] for tokens [...]");
  const Ids ids(tokens, rows, "embedding_grad: tokens must be integers from 0 to rows - 1");
  const Tensor grad = as_contiguous(to_compute_type(grad_in));
  const SortedIds sorted(ids, rows);
  const ScalarType type = grad.scalar_type();
  const bool lazy = checked_product(rows, columns) * bytes_of(type) >= kLazyBytes;
  const OptTensor zeros = lazy ? new_lazy_zeros({rows, columns}, type) : std::nullopt;
  const Tensor out = zeros ? *zeros : new_contiguous({rows, columns}, type);
  if (out.numel() > 0)
    with_scalar_type(type, "embedding_grad", [&](auto scalar) {
      using T = decltype(scalar);
      T* to = mutable_data<T>(out);
      const bool stream = !zeros && outgrows_caches<T>(to, rows, columns);
      scatter<T>({data<T>(grad), sorted.start.data(), sorted.order.data(), columns, skipped,
                  static_cast<T>(scale), mean, zeros.has_value(), stream},
                 to, rows);
    });
  return to_type(out, grad_in.scalar_type());
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(embedding, ops) {
  ops.impl("embedding", TORCH_BOX(&nnarch::embedding));
  ops.impl("embedding_grad", TORCH_BOX(&nnarch::embedding_grad));
}
