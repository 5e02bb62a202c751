// Activation functions on the CPU: elementwise over dense memory.
#include <algorithm>
#include <tuple>

#include "activation/cpu_kernels.h"
#include "cpu/dense.h"
#include "cpu/epilogue.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"
#include "cpu/tensor.h"

namespace nnarch {
namespace {

void check(const Tensor& x, int64_t code) {
  require(code >= 0 && code < kActivationCount, "activation: unknown code");
  with_scalar_type(x.scalar_type(), "activation", [](auto) {});
}

void check_alike(const Tensor& a, const Tensor& b) {
  require(a.scalar_type() == b.scalar_type(), "activation: dtypes differ");
  require(same_sizes(a, b), "activation: shapes differ");
}

// Calls f(first, count) for runs that cover n elements.
template <class F>
void over_runs(int64_t n, const F& f) {
  set_algorithm("elementwise");
  constexpr int64_t run = 16384;
  parallel_tasks(ceil_div(n, run),
                 [&](int64_t task) { f(task * run, std::min(run, n - task * run)); });
}

Tensor activation(const Tensor& x, int64_t code, double alpha) {
  check(x, code);
  const Tensor input = in_order_of(x, to_compute_type(x));
  const Tensor y = new_like(x, input.scalar_type());
  with_scalar_type(input.scalar_type(), "activation", [&](auto scalar) {
    using T = decltype(scalar);
    const auto& table = NNARCH_SELECT(activation_table<T>());
    const T* from = data<T>(input);
    T* to = mutable_data<T>(y);
    over_runs(x.numel(), [&](int64_t first, int64_t n) {
      table.forward(from + first, to + first, n, code, static_cast<T>(alpha));
    });
  });
  return to_type(y, x.scalar_type());
}

Tensor activation_grad(const Tensor& grad, const Tensor& saved, int64_t code, double alpha) {
  check(saved, code);
  check_alike(saved, grad);
  const Tensor s = in_order_of(saved, to_compute_type(saved));
  const Tensor g = in_order_of(saved, to_compute_type(grad));
  const Tensor out = new_like(saved, s.scalar_type());
  with_scalar_type(s.scalar_type(), "activation_grad", [&](auto scalar) {
    using T = decltype(scalar);
    const auto& table = NNARCH_SELECT(activation_table<T>());
    over_runs(saved.numel(), [&](int64_t first, int64_t n) {
      table.grad(data<T>(g) + first, data<T>(s) + first, mutable_data<T>(out) + first, n, code,
                 static_cast<T>(alpha));
    });
  });
  return to_type(out, saved.scalar_type());
}

Tensor activation_grad_grad(const Tensor& gradgrad, const Tensor& grad, const Tensor& saved,
                            int64_t code, double alpha) {
  check(saved, code);
  check_alike(saved, grad);
  check_alike(saved, gradgrad);
  const Tensor s = in_order_of(saved, to_compute_type(saved));
  const Tensor g = in_order_of(saved, to_compute_type(grad));
  const Tensor gg = in_order_of(saved, to_compute_type(gradgrad));
  const Tensor out = new_like(saved, s.scalar_type());
  with_scalar_type(s.scalar_type(), "activation_grad_grad", [&](auto scalar) {
    using T = decltype(scalar);
    const auto& table = NNARCH_SELECT(activation_table<T>());
    over_runs(saved.numel(), [&](int64_t first, int64_t n) {
      table.grad_grad(data<T>(gg) + first, data<T>(g) + first, data<T>(s) + first,
                      mutable_data<T>(out) + first, n, code, static_cast<T>(alpha));
    });
  });
  return to_type(out, saved.scalar_type());
}

Tensor gate(const Tensor& gate, const Tensor& value, int64_t code, double alpha) {
  check(gate, code);
  check_alike(gate, value);
  const Tensor g = in_order_of(gate, to_compute_type(gate));
  const Tensor v = in_order_of(gate, to_compute_type(value));
  const Tensor y = new_like(gate, g.scalar_type());
  with_scalar_type(g.scalar_type(), "gate", [&](auto scalar) {
    using T = decltype(scalar);
    const auto& table = NNARCH_SELECT(activation_table<T>());
    const T *from = data<T>(g), *by = data<T>(v);
    T* to = mutable_data<T>(y);
    over_runs(gate.numel(), [&](int64_t first, int64_t n) {
      table.gate(from + first, by + first, to + first, n, code, static_cast<T>(alpha));
    });
  });
  return to_type(y, gate.scalar_type());
}

std::tuple<Tensor, Tensor> gate_grad(const Tensor& grad, const Tensor& gate, const Tensor& value,
                                     int64_t code, double alpha) {
  check(gate, code);
  check_alike(gate, value);
  check_alike(gate, grad);
  const Tensor dy = in_order_of(gate, to_compute_type(grad));
  const Tensor g = in_order_of(gate, to_compute_type(gate));
  const Tensor v = in_order_of(gate, to_compute_type(value));
  const Tensor d_gate = new_like(gate, g.scalar_type()), d_value = new_like(gate, g.scalar_type());
  with_scalar_type(g.scalar_type(), "gate_grad", [&](auto scalar) {
    using T = decltype(scalar);
    const auto& table = NNARCH_SELECT(activation_table<T>());
    over_runs(gate.numel(), [&](int64_t i, int64_t n) {
      table.gate_grad(data<T>(dy) + i, data<T>(g) + i, data<T>(v) + i, mutable_data<T>(d_gate) + i,
                      mutable_data<T>(d_value) + i, n, code, static_cast<T>(alpha));
    });
  });
  return {to_type(d_gate, gate.scalar_type()), to_type(d_value, gate.scalar_type())};
}

}  // namespace

NNARCH_OPS(activation, ops) {
  ops.impl("activation", TORCH_BOX(&activation));
  ops.impl("activation_grad", TORCH_BOX(&activation_grad));
  ops.impl("activation_grad_grad", TORCH_BOX(&activation_grad_grad));
  ops.impl("gate", TORCH_BOX(&gate));
  ops.impl("gate_grad", TORCH_BOX(&gate_grad));
}

}  // namespace nnarch
