// The squash of vectors along any dimension, and its gradient.
#include <algorithm>

#include "capsule_routing/cpu_kernels.h"
#include "cpu/dense.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace nnarch {
namespace {

// Elements before, along and behind a dimension, as x lies in memory.
struct Extents {
  int64_t outer = 1, dim, inner = 1;
};

Extents extents(const Tensor& x, int64_t dim) {
  require(dim >= -x.dim() && dim < x.dim(), "squash: dim must be a dimension of x");
  if (dim < 0) dim += x.dim();
  Extents e;
  IntList sizes = sizes_of(x);
  if (follows_channels_last(x)) {  // memory has the order n, h, w, c
    sizes = {sizes[0], sizes[2], sizes[3], sizes[1]};
    dim = dim == 0 ? 0 : (dim == 1 ? 3 : dim - 1);
  }
  const int64_t dims = static_cast<int64_t>(sizes.size());
  e.dim = sizes[static_cast<size_t>(dim)];
  for (int64_t d = 0; d < dim; ++d) e.outer *= sizes[static_cast<size_t>(d)];
  for (int64_t d = dim + 1; d < dims; ++d) e.inner *= sizes[static_cast<size_t>(d)];
  return e;
}

// Calls f(offset, outer) for runs of whole vectors.
template <class F>
void over_vectors(const Extents& e, const F& f) {
  const int64_t slice = e.dim * e.inner, run = std::max<int64_t>(1, 16384 / slice);
  parallel_tasks(ceil_div(e.outer, run), [&](int64_t task) {
    const int64_t first = task * run;
    f(first * slice, std::min(run, e.outer - first));
  });
}

Tensor squash(const Tensor& x, int64_t dim) {
  const Extents e = extents(x, dim);
  const Tensor from = in_order_of(x, to_compute_type(x));
  const Tensor y = new_like(x, from.scalar_type());
  if (x.numel() > 0)
    with_scalar_type(from.scalar_type(), "squash", [&](auto scalar) {
      using T = decltype(scalar);
      const auto& table = NNARCH_SELECT(squash_table<T>());
      const T* from_ptr = data<T>(from);
      T* to = mutable_data<T>(y);
      over_vectors(e, [&](int64_t at, int64_t outer) {
        table.forward(from_ptr + at, outer, e.dim, e.inner, to + at);
      });
    });
  return to_type(y, x.scalar_type());
}

Tensor squash_grad(const Tensor& grad, const Tensor& x, int64_t dim) {
  const Extents e = extents(x, dim);
  require(same_sizes(grad, x) && grad.scalar_type() == x.scalar_type(),
          "squash_grad: grad must have the shape and dtype of x");
  const Tensor from = in_order_of(x, to_compute_type(x)), g = in_order_of(x, to_compute_type(grad));
  const Tensor dx = new_like(x, from.scalar_type());
  if (x.numel() > 0)
    with_scalar_type(from.scalar_type(), "squash_grad", [&](auto scalar) {
      using T = decltype(scalar);
      const auto& table = NNARCH_SELECT(squash_table<T>());
      const T *from_ptr = data<T>(from), *grad_ptr = data<T>(g);
      T* to = mutable_data<T>(dx);
      over_vectors(e, [&](int64_t at, int64_t outer) {
        table.backward(grad_ptr + at, from_ptr + at, outer, e.dim, e.inner, to + at);
      });
    });
  return to_type(dx, x.scalar_type());
}

}  // namespace

NNARCH_OPS(squash, ops) {
  ops.impl("squash", TORCH_BOX(&squash));
  ops.impl("squash_grad", TORCH_BOX(&squash_grad));
}

}  // namespace nnarch
