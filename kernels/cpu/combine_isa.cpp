// Products that go row by row past an unpacked right side.
#include "cpu/combine.h"

#include "cpu/epilogue_isa.h"
#include "cpu/layout.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {
namespace {

constexpr int kRowsAtOnce = 4;  // so many streams, and a vector of y is loaded and stored as seldom

// y (+)= Σ_{k < Rows} a[k * a_column] · b[k * b_stride]
template <class T, int Rows>
NNARCH_NOINLINE void add_rows(const T* a, int64_t a_column, const T* b, int64_t b_stride, int64_t n,
                              T* y, bool first) {
  constexpr int64_t w = kLanes<T>;
  Vec<T> factor[Rows];
  for (int k = 0; k < Rows; ++k) factor[k] = broadcast(a[k * a_column]);
  int64_t j = 0;
  for (; j + w <= n; j += w) {
    Vec<T> sum = first ? Vec<T>{} : load(y + j);
    for (int k = 0; k < Rows; ++k) sum += factor[k] * load(b + k * b_stride + j);
    store(y + j, sum);
  }
  if (j == n) return;
  Vec<T> sum = first ? Vec<T>{} : load_n(y + j, n - j);
  for (int k = 0; k < Rows; ++k) sum += factor[k] * load_n(b + k * b_stride + j, n - j);
  store_n(y + j, sum, n - j);
}

template <class T>
void combine(const T* a, int64_t a_row, int64_t a_column, int64_t m, int64_t depth, const T* b,
             int64_t b_stride, int64_t n, T* y, int64_t y_stride) {
  static constexpr decltype(&add_rows<T, 1>) of[] = {add_rows<T, 1>, add_rows<T, 2>, add_rows<T, 3>,
                                                     add_rows<T, kRowsAtOnce>};
  for (int64_t k = 0; k < depth; k += kRowsAtOnce) {
    const int64_t rows = depth - k < kRowsAtOnce ? depth - k : kRowsAtOnce;
    for (int64_t i = 0; i < m; ++i)
      of[rows - 1](a + i * a_row + k * a_column, a_column, b + k * b_stride, b_stride, n,
                   y + i * y_stride, k == 0);
  }
}

template <class T>
void turn_back(const T* sums, int64_t step, int64_t n, int64_t m, T* y, int64_t y_step,
               const Epilogue<T>& epilogue) {
  transpose_kernel<T>()(sums, step, y, y_step, n, m);
  for (int64_t i = 0; i < m; ++i) finish_row(epilogue, i * y_step, n, y + i * y_step);
}

}  // namespace

template <>
CombineRows<float> combine_rows<float>() {
  return combine<float>;
}
template <>
CombineRows<double> combine_rows<double>() {
  return combine<double>;
}
template <>
TurnBack<float> turn_back_fn<float>() {
  return turn_back<float>;
}
template <>
TurnBack<double> turn_back_fn<double>() {
  return turn_back<double>;
}

}  // namespace nnarch::NNARCH_ISA
