// Half types converted run by run, and dot products with rows of half-type weights.
#include "cpu/few_rows_isa.h"
#include "cpu/half_kernels.h"
#include "cpu/simd.h"
#include "cpu/stored_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

constexpr int64_t kFloats = kLanes<float>;

template <class S>
void widen_run(const uint16_t* bits, float* to, int64_t n) {
  const S* from = reinterpret_cast<const S*>(bits);
  int64_t i = 0;
  for (; i + 4 * kFloats <= n; i += 4 * kFloats) {
    const Vec<float> a = load_as(from + i), b = load_as(from + i + kFloats),
                     c = load_as(from + i + 2 * kFloats), d = load_as(from + i + 3 * kFloats);
    store(to + i, a), store(to + i + kFloats, b);
    store(to + i + 2 * kFloats, c), store(to + i + 3 * kFloats, d);
  }
  for (; i < n; i += kFloats) {
    const int64_t left = n - i < kFloats ? n - i : kFloats;
    store_n(to + i, load_as(from + i, left), left);
  }
}

template <class S>
void narrow_run(const float* from, uint16_t* bits, int64_t n) {
  S* to = reinterpret_cast<S*>(bits);
  int64_t i = 0;
  for (; i + 4 * kFloats <= n; i += 4 * kFloats) {
    const Vec<float> a = load(from + i), b = load(from + i + kFloats),
                     c = load(from + i + 2 * kFloats), d = load(from + i + 3 * kFloats);
    store_as(to + i, a), store_as(to + i + kFloats, b);
    store_as(to + i + 2 * kFloats, c), store_as(to + i + 3 * kFloats, d);
  }
  for (; i < n; i += kFloats) {
    const int64_t left = n - i < kFloats ? n - i : kFloats;
    store_as(to + i, load_n(from + i, left), left);
  }
}

template <class S>
void few_rows(const float* x, int64_t x_stride, int64_t m, const uint16_t* bits, int64_t w_stride,
              int64_t depth, int64_t n, float* y, int64_t y_stride,
              const Epilogue<float>& epilogue) {
  few_rows_of(x, x_stride, m, reinterpret_cast<const S*>(bits), w_stride, depth, n, y, y_stride,
              epilogue);
}

void finish(const Epilogue<float>& epilogue, int64_t offset, int64_t n, float* y) {
  finish_row<float>(epilogue, offset, n, y);
}

template <class S>
constexpr HalfTable kTable = {widen_run<S>, narrow_run<S>, few_rows<S>, finish};

}  // namespace

const HalfTable& half_table(bool bfloat16) { return bfloat16 ? kTable<BFloat16> : kTable<Float16>; }

}  // namespace nnarch::NNARCH_ISA
