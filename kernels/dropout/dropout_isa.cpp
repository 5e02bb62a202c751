// x times 0 or the scale of what is kept.
#include "cpu/philox_isa.h"
#include "cpu/simd.h"
#include "dropout/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {
namespace {

constexpr int64_t kQuadsAtOnce = 256;  // their factors stay in the first-level cache

template <class T>
NNARCH_INLINE void multiply(const T* x, const T* factor, T* y, int64_t n) {
  constexpr int64_t w = kLanes<T>;
  int64_t i = 0;
  for (; i + w <= n; i += w) store(y + i, load(x + i) * load(factor + i));
  if (i < n) store_n(y + i, load_n(x + i, n - i) * load(factor + i), n - i);
}

template <class T>
void dropout(const DropoutRule& rule, const T* x, T* y, int64_t columns, int64_t first,
             int64_t last) {
  alignas(kVectorBytes) T factors[4 * kQuadsAtOnce + kLanes<T>];
  const int64_t quads = (columns + 3) / 4;
  for (int64_t at = first; at < last; at += kQuadsAtOnce) {
    const int64_t count = last - at < kQuadsAtOnce ? last - at : kQuadsAtOnce;
    quad_factors<T>(rule, 0, quads, at, count, factors);
    if (columns % 4 == 0) {
      multiply(x + 4 * at, factors, y + 4 * at, 4 * count);
      continue;
    }
    for (int64_t done = 0; done < count;) {  // the last quad of a row is not whole
      const int64_t row = (at + done) / quads, quad = (at + done) % quads;
      const int64_t here = count - done < quads - quad ? count - done : quads - quad;
      const int64_t offset = row * columns + 4 * quad, left = columns - 4 * quad;
      multiply(x + offset, factors + 4 * done, y + offset, 4 * here < left ? 4 * here : left);
      done += here;
    }
  }
}

}  // namespace

template <>
DropoutFn<float> dropout_fn<float>() {
  return dropout<float>;
}
template <>
DropoutFn<double> dropout_fn<double>() {
  return dropout<double>;
}

}  // namespace nnarch::NNARCH_ISA
