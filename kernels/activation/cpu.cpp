// Activation functions on the CPU: elementwise over dense memory.
#include <algorithm>
#include <tuple>

#include "activation/cpu_kernels.h"
#include "cpu/dense.h"
#include "cpu/epilogue.h"
#include "cpu/half.h"
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
void over_runs(int64_t n, bool half, const F& f) {
  set_algorithm("elementwise");
  const int64_t run = half ? 4096 : 16384;  // half types pass through scratch memory, in L1
  parallel_tasks(ceil_div(n, run),
                 [&](int64_t task) { f(task * run, std::min(run, n - task * run)); });
}

Tensor activation(const Tensor& x, int64_t code, double alpha) {
  check(x, code);
  const Tensor input = in_order_of(x, x), y = new_like(x, x.scalar_type());
  with_scalar_type(x.scalar_type(), "activation", [&](auto scalar) {
    using T = decltype(scalar);
    const auto& table = NNARCH_SELECT(activation_table<T>());
    const Stored from(input), to(y);
    over_runs(x.numel(), to.half, [&](int64_t first, int64_t n) {
      const Reading<T> in(from, {first, n});
      const Writing<T> out(to, {first, n});
      table.forward(in.get(), out.get(), n, code, static_cast<T>(alpha));
    });
  });
  return y;
}

Tensor activation_grad(const Tensor& grad, const Tensor& saved, int64_t code, double alpha) {
  check(saved, code);
  check_alike(saved, grad);
  const Tensor s = in_order_of(saved, saved), g = in_order_of(saved, grad);
  const Tensor out = new_like(saved, saved.scalar_type());
  with_scalar_type(saved.scalar_type(), "activation_grad", [&](auto scalar) {
    using T = decltype(scalar);
    const auto& table = NNARCH_SELECT(activation_table<T>());
    const Stored from(s), from_grad(g), to(out);
    over_runs(saved.numel(), to.half, [&](int64_t first, int64_t n) {
      const Reading<T> dy(from_grad, {first, n}), in(from, {first, n});
      const Writing<T> dx(to, {first, n});
      table.grad(dy.get(), in.get(), dx.get(), n, code, static_cast<T>(alpha));
    });
  });
  return out;
}

Tensor activation_grad_grad(const Tensor& gradgrad, const Tensor& grad, const Tensor& saved,
                            int64_t code, double alpha) {
  check(saved, code);
  check_alike(saved, grad);
  check_alike(saved, gradgrad);
  const Tensor s = in_order_of(saved, saved), g = in_order_of(saved, grad);
  const Tensor gg = in_order_of(saved, gradgrad), out = new_like(saved, saved.scalar_type());
  with_scalar_type(saved.scalar_type(), "activation_grad_grad", [&](auto scalar) {
    using T = decltype(scalar);
    const auto& table = NNARCH_SELECT(activation_table<T>());
    const Stored from(s), from_grad(g), second(gg), to(out);
    over_runs(saved.numel(), to.half, [&](int64_t first, int64_t n) {
      const Reading<T> ddy(second, {first, n}), dy(from_grad, {first, n}), in(from, {first, n});
      const Writing<T> dx(to, {first, n});
      table.grad_grad(ddy.get(), dy.get(), in.get(), dx.get(), n, code, static_cast<T>(alpha));
    });
  });
  return out;
}

Tensor gate(const Tensor& gate, const Tensor& value, int64_t code, double alpha) {
  check(gate, code);
  check_alike(gate, value);
  const Tensor g = in_order_of(gate, gate), v = in_order_of(gate, value);
  const Tensor y = new_like(gate, gate.scalar_type());
  with_scalar_type(gate.scalar_type(), "gate", [&](auto scalar) {
    using T = decltype(scalar);
    const auto& table = NNARCH_SELECT(activation_table<T>());
    const Stored from(g), by(v), to(y);
    over_runs(gate.numel(), to.half, [&](int64_t first, int64_t n) {
      const Reading<T> in(from, {first, n}), factor(by, {first, n});
      const Writing<T> out(to, {first, n});
      table.gate(in.get(), factor.get(), out.get(), n, code, static_cast<T>(alpha));
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> gate_grad(const Tensor& grad, const Tensor& gate, const Tensor& value,
                                     int64_t code, double alpha) {
  check(gate, code);
  check_alike(gate, value);
  check_alike(gate, grad);
  const ScalarType type = gate.scalar_type();
  const Tensor dy = in_order_of(gate, grad), g = in_order_of(gate, gate),
               v = in_order_of(gate, value);
  const Tensor d_gate = new_like(gate, type), d_value = new_like(gate, type);
  with_scalar_type(type, "gate_grad", [&](auto scalar) {
    using T = decltype(scalar);
    const auto& table = NNARCH_SELECT(activation_table<T>());
    const Stored incoming(dy), from(g), by(v), to_gate(d_gate), to_value(d_value);
    over_runs(gate.numel(), from.half, [&](int64_t i, int64_t n) {
      const Reading<T> up(incoming, {i, n}), in(from, {i, n}), factor(by, {i, n});
      const Writing<T> dg(to_gate, {i, n}), dv(to_value, {i, n});
      table.gate_grad(up.get(), in.get(), factor.get(), dg.get(), dv.get(), n, code,
                      static_cast<T>(alpha));
    });
  });
  return {d_gate, d_value};
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
