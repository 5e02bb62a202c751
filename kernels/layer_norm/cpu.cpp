// layer_norm, layer_norm_train and row_dropout on the CPU.
#include <cmath>
#include <tuple>

#include "cpu/registry.h"
#include "cpu/streaming.h"
#include "layer_norm/cpu_rows.h"

namespace nnarch {
namespace {

// What `seed` and `p` drop, or nothing.
std::optional<RowDropout> dropout_of(const OptTensor& seed, double p) {
  require(p >= 0 && p <= 1, "dropout_p must be between 0 and 1");
  if (!seed) {
    require(p == 0, "dropout needs a seed");
    return std::nullopt;
  }
  require(seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
          "seed must be an int64 tensor of one element");
  return RowDropout{static_cast<uint64_t>(*data<int64_t>(*seed)),
                    static_cast<uint64_t>(std::nearbyint(p * 0x1p32)), p < 1 ? 1 / (1 - p) : 0};
}

// What both operations take; the outputs that one does not have are null.
struct Arguments {
  const Tensor& x;
  const OptTensor &weight, &bias, &residual;
  int64_t columns, rows;
  double eps;
  bool rms;
  std::optional<RowDropout> dropout = std::nullopt;
};

void run(const Arguments& a, const Tensor& y, const Tensor* sum, const Tensor* stats) {
  const ScalarType type = a.x.scalar_type();
  with_stored_type(type, "layer_norm", [&](auto stored) {
    using S = decltype(stored);
    using T = Compute<S>;
    require(!(a.rms && a.bias), "rms normalization has no bias");
    const RowsOf<S> x(a.x, a.x, a.rows, a.columns), residual(a.residual, a.x, a.rows, a.columns);
    const RowVector<T> weight(a.weight, type, a.columns, T{1});
    const RowVector<T> bias(a.bias, type, a.rms ? 0 : a.columns, T{0});
    if (a.rows == 0) return;
    NormForward<S> o;
    o.x = x.get();
    o.residual = residual.get();
    o.weight = weight.get();
    o.bias = bias.get();
    o.sum = sum ? mutable_data<S>(*sum) : nullptr;
    o.y = mutable_data<S>(y);
    if (stats) {
      o.mean = mutable_data<T>(*stats);
      o.rstd = o.mean + (a.rms ? 0 : a.rows);
    }
    o.columns = a.columns;
    o.eps = a.eps;
    o.rms = a.rms;
    o.dropout = a.dropout ? &*a.dropout : nullptr;
    o.past_caches = sizeof(S) >= 4 && outgrows_caches(o.y, a.rows, a.columns) &&
                    (!o.sum || outgrows_caches(o.sum, a.rows, a.columns));
    const auto& table = NNARCH_SELECT(layer_norm_table<S>());
    for_each_run(a.rows, a.columns, [&](int64_t first, int64_t count) {
      const Scratch<T> scratch(2 * (a.columns + 64));
      table.forward(o, first, count, scratch.get());
    });
  });
}

Tensor layer_norm(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                  const OptTensor& residual, int64_t columns, double eps, bool rms) {
  const Arguments a{x, weight, bias, residual, columns, rows_of(x, columns), eps, rms};
  const Tensor y = new_contiguous(sizes_of(x), x.scalar_type());
  run(a, y, nullptr, nullptr);
  return y;
}

// y, the sum (empty where that is x), and what backward needs: [mean; rstd], or [rstd].
std::tuple<Tensor, Tensor, Tensor> layer_norm_train(const Tensor& x, const OptTensor& weight,
                                                    const OptTensor& bias,
                                                    const OptTensor& residual,
                                                    const OptTensor& seed, int64_t columns,
                                                    double eps, double p, bool rms) {
  const Arguments a{
      x, weight, bias, residual, columns, rows_of(x, columns), eps, rms, dropout_of(seed, p)};
  const ScalarType type = x.scalar_type();
  const bool adds = residual || seed;
  const Tensor y = new_contiguous(sizes_of(x), type);
  const Tensor sum = new_contiguous(adds ? sizes_of(x) : IntList{0}, type);
  const Tensor stats = new_contiguous({rms ? 1 : 2, a.rows}, compute_type(type));
  run(a, y, adds ? &sum : nullptr, &stats);
  return {y, sum, stats};
}

Tensor row_dropout(const Tensor& x, const Tensor& seed, int64_t columns, double p) {
  const int64_t rows = rows_of(x, columns);
  const RowDropout dropout = *dropout_of(seed, p);
  const Tensor y = new_contiguous(sizes_of(x), x.scalar_type());
  with_stored_type(x.scalar_type(), "row_dropout", [&](auto stored) {
    using S = decltype(stored);
    const RowsOf<S> from(x, x, rows, columns);
    if (rows == 0) return;
    S* to = mutable_data<S>(y);
    const auto& table = NNARCH_SELECT(layer_norm_table<S>());
    for_each_run(rows, columns, [&](int64_t first, int64_t count) {
      const Scratch<Compute<S>> scratch(columns + 64);
      table.dropout(from.get(), dropout, first, count, columns, scratch.get(), to);
    });
  });
  return y;
}

}  // namespace

NNARCH_OPS(layer_norm, ops) {
  ops.impl("layer_norm", TORCH_BOX(&layer_norm));
  ops.impl("layer_norm_train", TORCH_BOX(&layer_norm_train));
  ops.impl("row_dropout", TORCH_BOX(&row_dropout));
}

}  // namespace nnarch
