// embedding_sum on the CPU: token + position + segment, LayerNorm and dropout in one pass over
// rows.
#include <algorithm>
#include <tuple>

#include "cpu/arena.h"
#include "cpu/dense.h"
#include "cpu/dropout_rule.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"
#include "cpu/streaming.h"
#include "cpu/tensor.h"
#include "embedding/cpu_ids.h"
#include "embedding/cpu_kernels.h"

namespace nnarch {
namespace {

constexpr int64_t kPad = 64;  // rows in scratch are rounded up to this: vectors and dropout's words
constexpr const char* kSeed = "embedding_sum: seed must be one int64, dropout_p from 0 to 1";

// A table of the sum in the compute type, with the indices into it.
struct Table {
  OptTensor weight;
  std::optional<Ids> ids;

  Table(const OptTensor& table, const OptTensor& at, const Tensor& tokens, const Tensor& first,
        const char* message) {
    if (!table) return;
    require(table->dim() == 2 && table->size(1) == first.size(1) &&
                table->scalar_type() == first.scalar_type(),
            message);
    weight = as_contiguous(to_compute_type(*table));
    if (!at) return;
    require(same_sizes(*at, tokens), message);
    ids.emplace(*at, table->size(0), message);
  }
  template <class T>
  const T* values() const {
    return weight ? data<T>(*weight) : nullptr;
  }
  const int64_t* indices() const { return ids ? ids->get() : nullptr; }
};

// All that the sum reads, checked.
struct Problem {
  Table token, position, segment;
  double scale;
  int64_t offset, length, columns, rows;

  Problem(const Tensor& tokens, const Tensor& weight, const OptTensor& position_weight,
          const OptTensor& positions, const OptTensor& segment_weight, const OptTensor& segments,
          double scale, int64_t offset)
      : token(weight, tokens, tokens, weight, "embedding_sum: tokens must index weight"),
        position(position_weight, positions, tokens, weight,
                 "embedding_sum: positions must index position_weight [P, C]"),
        segment(segment_weight, segments, tokens, weight,
                "embedding_sum: segments must index segment_weight [G, C]"),
        scale(scale),
        offset(offset),
        length(tokens.dim() > 0 ? tokens.size(tokens.dim() - 1) : 1),
        columns(weight.size(1)),
        rows(tokens.numel()) {
    require(!segment_weight || segments, "embedding_sum: segments are missing");
    if (position_weight && !positions && rows > 0)
      require(offset >= 0 && checked_sum(offset, length) <= position_weight->size(0),
              "embedding_sum: there are fewer positions than tokens");
  }
  template <class T>
  EmbeddingSum<T> sum() const {
    return {token.values<T>(),  token.indices(), static_cast<T>(scale),        position.values<T>(),
            position.indices(), offset,          std::max<int64_t>(length, 1), segment.values<T>(),
            segment.indices(),  columns};
  }
};

template <class T>
RowNorm<T> row_norm(const OptTensor& weight, const OptTensor& bias, double eps) {
  return {weight ? data<T>(*weight) : nullptr, bias ? data<T>(*bias) : nullptr,
          static_cast<T>(eps)};
}

OptTensor norm_vector(const OptTensor& v, const Tensor& like) {
  if (!v) return v;
  require(v->dim() == 1 && v->size(0) == like.size(1) && v->scalar_type() == like.scalar_type(),
          "embedding_sum: norm_weight and norm_bias must be [C], of weight's dtype");
  return as_contiguous(to_compute_type(*v));
}

int64_t rows_at_once(int64_t columns) {
  return std::clamp<int64_t>((int64_t{16} << 10) / std::max<int64_t>(columns, 1), 1, 256);
}

std::tuple<Tensor, Tensor, Tensor> embedding_sum(
    const Tensor& tokens, const Tensor& weight, const OptTensor& position_weight,
    const OptTensor& positions, const OptTensor& segment_weight, const OptTensor& segments,
    const OptTensor& norm_weight, const OptTensor& norm_bias, const OptTensor& seed, double scale,
    int64_t offset, int64_t, bool normalize, double eps, double dropout_p) {
  set_algorithm(normalize ? "sum_norm" : "sum");
  require(weight.dim() == 2, "embedding_sum: weight must be [V, C]");
  const ScalarType type = weight.scalar_type();
  const Problem p(tokens, weight, position_weight, positions, segment_weight, segments, scale,
                  offset);
  const OptTensor gamma = norm_vector(norm_weight, weight), beta = norm_vector(norm_bias, weight);
  const bool drops = seed.has_value() && dropout_p > 0;
  const DropoutRule rule = drops ? dropout_rule(*seed, dropout_p, kSeed) : DropoutRule{};
  IntList sizes = sizes_of(tokens);
  sizes.push_back(p.columns);
  const ScalarType compute = p.token.weight->scalar_type();
  const Tensor y = new_contiguous(sizes, compute);
  const int64_t kept = normalize ? p.rows : 0;
  const Tensor mean = new_contiguous({kept}, compute), invstd = new_contiguous({kept}, compute);
  if (y.numel() > 0)
    with_scalar_type(compute, "embedding_sum", [&](auto scalar) {
      using T = decltype(scalar);
      const EmbeddingSum<T> e = p.sum<T>();
      const RowNorm<T> norm = row_norm<T>(gamma, beta, eps);
      const auto& table = NNARCH_SELECT(embedding_table<T>());
      T* to = mutable_data<T>(y);
      const bool stream = outgrows_caches<T>(to, p.rows, p.columns);
      const int64_t run = rows_at_once(p.columns), row = round_up(p.columns, kPad);
      parallel_tasks(ceil_div(p.rows, run), [&](int64_t task) {
        const int64_t first = task * run, last = std::min(p.rows, first + run);
        const Scratch<T> work(2 * row);
        if (normalize)
          table.normalize(e, norm, drops ? &rule : nullptr, work.get(), to, mutable_data<T>(mean),
                          mutable_data<T>(invstd), first, last, stream);
        else
          table.sum(e, drops ? &rule : nullptr, work.get(), to, first, last, stream);
      });
    });
  return {to_type(y, type), mean, invstd};
}

// The vectors' gradients of every task, added in the order of the tasks.
template <class T>
void add_up(const T* parts, int64_t tasks, int64_t row, int64_t columns, T* d_weight, T* d_bias) {
  for (int64_t c = 0; c < columns; ++c) d_weight[c] = d_bias[c] = T{0};
  for (int64_t task = 0; task < tasks; ++task, parts += 2 * row)
    for (int64_t c = 0; c < columns; ++c) d_weight[c] += parts[c], d_bias[c] += parts[row + c];
}

std::tuple<Tensor, Tensor, Tensor> embedding_sum_backward(
    const Tensor& grad_in, const Tensor& tokens, const Tensor& weight,
    const OptTensor& position_weight, const OptTensor& positions, const OptTensor& segment_weight,
    const OptTensor& segments, const OptTensor& norm_weight, const Tensor& mean,
    const Tensor& invstd, const OptTensor& seed, double scale, int64_t offset, double dropout_p) {
  set_algorithm("norm_grad");
  require(weight.dim() == 2, "embedding_sum_backward: weight must be [V, C]");
  const ScalarType type = weight.scalar_type();
  const Problem p(tokens, weight, position_weight, positions, segment_weight, segments, scale,
                  offset);
  const ScalarType compute = p.token.weight->scalar_type();
  require(grad_in.scalar_type() == type && grad_in.dim() == tokens.dim() + 1 &&
              grad_in.numel() == checked_product(p.rows, p.columns) &&
              grad_in.size(tokens.dim()) == p.columns,
          "embedding_sum_backward: grad must be [..., C] for tokens [...]");
  for (const Tensor* t : {&mean, &invstd})
    require(t->numel() == p.rows && t->is_contiguous() && t->scalar_type() == compute,
            "embedding_sum_backward: mean and invstd must be the forward's");
  const OptTensor gamma = norm_vector(norm_weight, weight);
  const bool drops = seed.has_value() && dropout_p > 0;
  const DropoutRule rule = drops ? dropout_rule(*seed, dropout_p, kSeed) : DropoutRule{};
  const Tensor grad = as_contiguous(to_compute_type(grad_in));
  const Tensor dx = new_contiguous(sizes_of(grad), compute);
  const Tensor d_weight = new_contiguous({p.columns}, compute);
  const Tensor d_bias = new_contiguous({p.columns}, compute);
  with_scalar_type(compute, "embedding_sum_backward", [&](auto scalar) {
    using T = decltype(scalar);
    const EmbeddingSum<T> e = p.sum<T>();
    const RowNorm<T> norm = row_norm<T>(gamma, std::nullopt, 0);
    const auto& table = NNARCH_SELECT(embedding_table<T>());
    const int64_t run = 64, row = round_up(p.columns, kPad);
    const int64_t tasks = p.columns > 0 ? ceil_div(p.rows, run) : 0;
    Scratch<T> parts(checked_product(tasks, 2 * row));
    parallel_tasks(tasks, [&](int64_t task) {
      const int64_t first = task * run, last = std::min(p.rows, first + run);
      T* mine = parts.get() + task * 2 * row;
      std::fill_n(mine, 2 * row, T{0});
      const Scratch<T> work(2 * row);
      table.normalize_grad(e, norm, drops ? &rule : nullptr, work.get(), data<T>(grad),
                           data<T>(mean), data<T>(invstd), mutable_data<T>(dx), mine, mine + row,
                           first, last);
    });
    add_up<T>(parts.get(), tasks, row, p.columns, mutable_data<T>(d_weight),
              mutable_data<T>(d_bias));
  });
  return {to_type(dx, type), to_type(d_weight, type), to_type(d_bias, type)};
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(embedding_sum, ops) {
  ops.impl("embedding_sum", TORCH_BOX(&nnarch::embedding_sum));
  ops.impl("embedding_sum_backward", TORCH_BOX(&nnarch::embedding_sum_backward));
}
