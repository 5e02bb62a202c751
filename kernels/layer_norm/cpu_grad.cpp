// The gradients of layer and RMS normalization on the CPU, and theirs.
#include <tuple>

#include "cpu/registry.h"
#include "cpu/streaming.h"
#include "layer_norm/cpu_rows.h"

namespace nnarch {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

// The statistics that the forward operation left: [mean; rstd], or [rstd] for rms.
template <class T>
struct Statistics {
  const T *mean, *rstd;
  Statistics(const Tensor& stats, int64_t rows, ScalarType type) {
    require(stats.dim() == 2 && stats.size(1) == rows && stats.is_contiguous() &&
                stats.scalar_type() == type && (stats.size(0) == 1 || stats.size(0) == 2),
            "stats must be what the forward operation returned");
    const bool rms = stats.size(0) == 1;
    const T* values = data<T>(stats);
    mean = rms ? nullptr : values;
    rstd = rms ? values : values + rows;
  }
};

// ds, dweight and dbias; those that `wanted` (bits 1, 2 and 4) leaves out are empty.
Three layer_norm_backward(const Tensor& grad, const OptTensor& grad_sum, const Tensor& s,
                          const OptTensor& weight, const Tensor& stats, int64_t columns,
                          int64_t wanted) {
  const int64_t rows = rows_of(s, columns);
  const ScalarType type = s.scalar_type(), wide = compute_type(type);
  const bool want_s = wanted & 1, parameters = wanted & 6;
  const Tensor ds = new_contiguous(want_s ? sizes_of(s) : IntList{0}, type);
  const Tensor dweight = new_contiguous({parameters ? columns : 0}, wide);
  const Tensor dbias = new_contiguous({parameters ? columns : 0}, wide);
  with_stored_type(type, "layer_norm_backward", [&](auto stored) {
    using S = decltype(stored);
    using T = Compute<S>;
    const RowsOf<S> g(grad, s, rows, columns), gs(grad_sum, s, rows, columns),
        x(s, s, rows, columns);
    const RowVector<T> w(weight, type, columns, T{1});
    const Statistics<T> statistics(stats, rows, wide);
    NormBackward<S> o;
    o.grad = g.get();
    o.grad_sum = gs.get();
    o.s = x.get();
    o.weight = w.get();
    o.mean = statistics.mean;
    o.rstd = statistics.rstd;
    o.ds = want_s && rows ? mutable_data<S>(ds) : nullptr;
    o.columns = columns;
    o.past_caches = sizeof(S) >= 4 && o.ds && outgrows_caches(o.ds, rows, columns);
    const auto& table = NNARCH_SELECT(layer_norm_table<S>());
    if (parameters) {
      T* const totals[2] = {mutable_data<T>(dweight), mutable_data<T>(dbias)};
      sum_rows<T>(rows, columns, 2, totals, [&](int64_t first, int64_t count, T* const* sums) {
        table.backward(o, first, count, sums[0], sums[1]);
      });
    } else if (rows > 0) {
      for_each_run(rows, columns, [&](int64_t first, int64_t count) {
        table.backward(o, first, count, nullptr, nullptr);
      });
    }
  });
  return {ds, dweight, dbias};
}

Three layer_norm_backward_backward(const Tensor& gg_ds, const OptTensor& gg_weight,
                                   const OptTensor& gg_bias, const Tensor& grad, const Tensor& s,
                                   const OptTensor& weight, const Tensor& stats, int64_t columns) {
  const int64_t rows = rows_of(s, columns);
  const ScalarType type = s.scalar_type(), wide = compute_type(type);
  const Tensor d_grad = new_contiguous(sizes_of(s), type), d_s = new_contiguous(sizes_of(s), type);
  const Tensor dweight = new_contiguous({columns}, wide);
  with_stored_type(type, "layer_norm_backward_backward", [&](auto stored) {
    using S = decltype(stored);
    using T = Compute<S>;
    const RowsOf<S> a(gg_ds, s, rows, columns), g(grad, s, rows, columns), x(s, s, rows, columns);
    const RowVector<T> w(weight, type, columns, T{1}), ggw(gg_weight, type, columns, T{0}),
        ggb(gg_bias, type, columns, T{0});
    const Statistics<T> statistics(stats, rows, wide);
    NormBackwardBackward<S> o;
    o.gg_ds = a.get();
    o.grad = g.get();
    o.s = x.get();
    o.gg_weight = ggw.get();
    o.gg_bias = ggb.get();
    o.weight = w.get();
    o.mean = statistics.mean;
    o.rstd = statistics.rstd;
    o.d_grad = mutable_data<S>(d_grad);
    o.d_s = mutable_data<S>(d_s);
    o.columns = columns;
    const auto& table = NNARCH_SELECT(layer_norm_table<S>());
    T* const totals[1] = {mutable_data<T>(dweight)};
    sum_rows<T>(rows, columns, 1, totals, [&](int64_t first, int64_t count, T* const* sums) {
      table.backward_backward(o, first, count, sums[0]);
    });
  });
  return {d_grad, d_s, dweight};
}

}  // namespace

NNARCH_OPS(layer_norm_gradients, ops) {
  ops.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  ops.impl("layer_norm_backward_backward", TORCH_BOX(&layer_norm_backward_backward));
}

}  // namespace nnarch
