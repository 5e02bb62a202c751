// Elementwise activation functions and their derivatives.
#include "activation/cpu_kernels.h"
#include "cpu/activation.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
void forward(const T* x, T* y, int64_t n, int64_t code, T alpha) {
  with_activation(code, [&](auto c) {
    for (int64_t i = 0; i < n; i += kLanes<T>)
      store_n(y + i, activate_as<T, c.code>(load_n(x + i, n - i), alpha), n - i);
  });
}

template <class T>
void grad(const T* grad, const T* saved, T* out, int64_t n, int64_t code, T alpha) {
  with_activation(code, [&](auto c) {
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> slope = activate_grad_as<T, c.code>(load_n(saved + i, n - i), alpha);
      store_n(out + i, load_n(grad + i, n - i) * slope, n - i);
    }
  });
}

template <class T>
void grad_grad(const T* gradgrad, const T* grad, const T* saved, T* out, int64_t n, int64_t code,
               T alpha) {
  with_activation(code, [&](auto c) {
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> bend = activate_grad_grad_as<T, c.code>(load_n(saved + i, n - i), alpha);
      store_n(out + i, load_n(gradgrad + i, n - i) * load_n(grad + i, n - i) * bend, n - i);
    }
  });
}

template <class T>
constexpr ActivationTable<T> kTable = {forward<T>, grad<T>, grad_grad<T>};

}  // namespace

template <>
const ActivationTable<float>& activation_table<float>() {
  return kTable<float>;
}
template <>
const ActivationTable<double>& activation_table<double>() {
  return kTable<double>;
}

}  // namespace nnarch::NNARCH_ISA
