// Elementwise activation functions and their derivatives.
#include "activation/cpu_kernels.h"
#include "cpu/activation.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {
namespace {

// Calls f(i, W) for whole vectors of n elements, some at a time, and f(i, rest) for the last ones.
// The mask of a partial vector in every turn would cost the cheap functions their bandwidth.
template <class T, class F>
NNARCH_INLINE void over_vectors(int64_t n, const F& f) {
  constexpr int64_t w = kLanes<T>;
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    f(i, w);
    f(i + w, w);
    f(i + 2 * w, w);
    f(i + 3 * w, w);
  }
  for (; i < n; i += w) f(i, n - i);
}

template <class T>
void forward(const T* x, T* y, int64_t n, int64_t code, T alpha) {
  with_activation(code, [&](auto c) {
    over_vectors<T>(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
      store_n(y + i, activate_as<T, c.code>(load_n(x + i, left), alpha), left);
    });
  });
}

template <class T>
void grad(const T* grad, const T* saved, T* out, int64_t n, int64_t code, T alpha) {
  with_activation(code, [&](auto c) {
    over_vectors<T>(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
      const Vec<T> slope = activate_grad_as<T, c.code>(load_n(saved + i, left), alpha);
      store_n(out + i, load_n(grad + i, left) * slope, left);
    });
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
void gate(const T* gate, const T* value, T* y, int64_t n, int64_t code, T alpha) {
  with_activation(code, [&](auto c) {
    over_vectors<T>(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
      const Vec<T> open = activate_as<T, c.code>(load_n(gate + i, left), alpha);
      store_n(y + i, open * load_n(value + i, left), left);
    });
  });
}

template <class T>
void gate_grad(const T* grad, const T* gate, const T* value, T* d_gate, T* d_value, int64_t n,
               int64_t code, T alpha) {
  with_activation(code, [&](auto c) {
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const int64_t left = n - i;
      const Vec<T> z = load_n(gate + i, left), dy = load_n(grad + i, left);
      const Vec<T> open = activate_as<T, c.code>(z, alpha);
      const Vec<T> saved = follows_from_output(c.code) ? open : z;
      const Vec<T> slope = activate_grad_as<T, c.code>(saved, alpha);
      store_n(d_gate + i, dy * load_n(value + i, left) * slope, left);
      store_n(d_value + i, dy * open, left);
    }
  });
}

template <class T>
constexpr ActivationTable<T> kTable = {forward<T>, grad<T>, grad_grad<T>, gate<T>, gate_grad<T>};

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
