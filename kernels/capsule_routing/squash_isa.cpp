// x · |x| / (1 + |x|²) along one dimension, and its gradient.
#include "capsule_routing/cpu_kernels.h"
#include "cpu/simd.h"
#include "local_response_norm/power_isa.h"  // square_root

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
NNARCH_INLINE T root(T x) {
  return sizeof(T) == 4 ? static_cast<T>(__builtin_sqrtf(static_cast<float>(x)))
                        : static_cast<T>(__builtin_sqrt(static_cast<double>(x)));
}

// What multiplies x, with dot = ⟨grad, x⟩, where the norm is not zero. In this order no factor
// leaves the range of T as long as the energy does not.
template <class T, class V>
NNARCH_INLINE V through_of(V dot, V norm, V energy) {
  const V factor = energy + T(1);
  return dot / norm * ((T(1) - energy) / factor) / factor;
}

// One vector whose values lie side by side.
template <class T>
NNARCH_INLINE T energy_of(const T* x, int64_t dim) {
  Vec<T> sum{};
  for (int64_t d = 0; d < dim; d += kLanes<T>) {
    const Vec<T> v = load_n(x + d, dim - d);
    sum += v * v;
  }
  return horizontal_sum<T>(sum);
}

template <class T>
void forward(const T* x, int64_t outer, int64_t dim, int64_t inner, T* y) {
  if (inner == 1) {
    for (int64_t i = 0; i < outer; ++i, x += dim, y += dim) {
      const T energy = energy_of(x, dim), scale = root(energy) / (energy + T(1));
      for (int64_t d = 0; d < dim; d += kLanes<T>)
        store_n(y + d, load_n(x + d, dim - d) * scale, dim - d);
    }
    return;
  }
  for (int64_t i = 0; i < outer; ++i, x += dim * inner, y += dim * inner) {
    for (int64_t j = 0; j < inner; j += kLanes<T>) {
      const int64_t n = inner - j;
      Vec<T> energy{};
      for (int64_t d = 0; d < dim; ++d) {
        const Vec<T> v = load_n(x + d * inner + j, n);
        energy += v * v;
      }
      const Vec<T> scale = square_root<T>(energy) / (energy + T(1));
      for (int64_t d = 0; d < dim; ++d)
        store_n(y + d * inner + j, load_n(x + d * inner + j, n) * scale, n);
    }
  }
}

template <class T>
void backward(const T* grad, const T* x, int64_t outer, int64_t dim, int64_t inner, T* dx) {
  if (inner == 1) {
    for (int64_t i = 0; i < outer; ++i, grad += dim, x += dim, dx += dim) {
      const T energy = energy_of(x, dim), norm = root(energy), scale = norm / (energy + T(1));
      Vec<T> dot{};
      for (int64_t d = 0; d < dim; d += kLanes<T>)
        dot += load_n(grad + d, dim - d) * load_n(x + d, dim - d);
      const T through = norm == T(0) ? T(0) : through_of<T>(horizontal_sum<T>(dot), norm, energy);
      for (int64_t d = 0; d < dim; d += kLanes<T>)
        store_n(dx + d, load_n(grad + d, dim - d) * scale + load_n(x + d, dim - d) * through,
                dim - d);
    }
    return;
  }
  for (int64_t i = 0; i < outer; ++i, grad += dim * inner, x += dim * inner, dx += dim * inner) {
    for (int64_t j = 0; j < inner; j += kLanes<T>) {
      const int64_t n = inner - j;
      Vec<T> energy{}, dot{};
      for (int64_t d = 0; d < dim; ++d) {
        const Vec<T> v = load_n(x + d * inner + j, n);
        energy += v * v;
        dot += v * load_n(grad + d * inner + j, n);
      }
      const Vec<T> norm = square_root<T>(energy), scale = norm / (energy + T(1));
      const Vec<T> moving = through_of<T>(dot, norm, energy);
      const Vec<T> through = norm == T(0) ? Vec<T>{} : moving;
      for (int64_t d = 0; d < dim; ++d) {
        const int64_t at = d * inner + j;
        store_n(dx + at, load_n(grad + at, n) * scale + load_n(x + at, n) * through, n);
      }
    }
  }
}

template <class T>
constexpr SquashTable<T> kTable = {forward<T>, backward<T>};

}  // namespace

template <>
const SquashTable<float>& squash_table<float>() {
  return kTable<float>;
}
template <>
const SquashTable<double>& squash_table<double>() {
  return kTable<double>;
}

}  // namespace nnarch::NNARCH_ISA
