// Dropout on the CPU: which elements are kept depends on their place and the seed alone.
#include <algorithm>

#include "cpu/dense.h"
#include "cpu/dropout_rule.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"
#include "cpu/tensor.h"
#include "dropout/cpu_kernels.h"

namespace nnarch {
namespace {

// x is [rows, columns]: its last dimension, and all others. They are counted as x is indexed,
// whatever its memory format.
Tensor dropout(const Tensor& x_in, const Tensor& seed, double p) {
  set_algorithm("philox");
  const DropoutRule rule = dropout_rule(seed, p, "dropout: seed must be one int64, p from 0 to 1");
  const Tensor x = as_contiguous(to_compute_type(x_in));
  const Tensor y = new_contiguous(sizes_of(x), x.scalar_type());
  const int64_t columns = x.dim() > 0 ? x.size(x.dim() - 1) : 1;
  if (x.numel() > 0)
    with_scalar_type(x.scalar_type(), "dropout", [&](auto scalar) {
      using T = decltype(scalar);
      const auto run = NNARCH_SELECT(dropout_fn<T>());
      const int64_t rows = x.numel() / columns, quads = rows * ceil_div(columns, 4);
      require(rows <= int64_t{1} << 32, "dropout: x must have at most 2^32 rows");
      constexpr int64_t at_once = 4096;
      parallel_tasks(ceil_div(quads, at_once), [&](int64_t task) {
        run(rule, data<T>(x), mutable_data<T>(y), columns, task * at_once,
            std::min(quads, (task + 1) * at_once));
      });
    });
  return in_order_of(x_in, to_type(y, x_in.scalar_type()));
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(dropout, ops) { ops.impl("dropout", TORCH_BOX(&nnarch::dropout)); }
