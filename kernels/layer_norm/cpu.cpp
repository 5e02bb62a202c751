// layer_norm and layer_norm_train on the CPU.
#include <tuple>

#include "cpu/registry.h"
#include "cpu/streaming.h"
#include "layer_norm/cpu_rows.h"

namespace nnarch {
namespace {

// What both operations take; the outputs that one does not have are null.
struct Arguments {
  const Tensor& x;
  const OptTensor &weight, &bias, &residual;
  int64_t columns, rows;
  double eps;
  bool rms;
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
    o.past_caches = sizeof(S) >= 4 && outgrows_caches(o.y, a.rows, a.columns) &&
                    (!o.sum || outgrows_caches(o.sum, a.rows, a.columns));
    const auto& table = NNARCH_SELECT(layer_norm_table<S>());
    for_each_run(a.rows, a.columns, [&](int64_t first, int64_t count) {
      const Scratch<T> scratch(a.columns);
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

// y, the sum (empty where nothing is added), and what backward needs: [mean; rstd], or [rstd].
std::tuple<Tensor, Tensor, Tensor> layer_norm_train(const Tensor& x, const OptTensor& weight,
                                                    const OptTensor& bias,
                                                    const OptTensor& residual, int64_t columns,
                                                    double eps, bool rms) {
  const Arguments a{x, weight, bias, residual, columns, rows_of(x, columns), eps, rms};
  const ScalarType type = x.scalar_type();
  const Tensor y = new_contiguous(sizes_of(x), type);
  const Tensor sum = new_contiguous(residual ? sizes_of(x) : IntList{0}, type);
  const Tensor stats = new_contiguous({rms ? 1 : 2, a.rows}, compute_type(type));
  run(a, y, residual ? &sum : nullptr, &stats);
  return {y, sum, stats};
}

}  // namespace

NNARCH_OPS(layer_norm, ops) {
  ops.impl("layer_norm", TORCH_BOX(&layer_norm));
  ops.impl("layer_norm_train", TORCH_BOX(&layer_norm_train));
}

}  // namespace nnarch
