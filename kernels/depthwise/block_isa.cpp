// The blocks that are compiled (see cpu_code.h).
#include "depthwise/cpu_block.h"
#include "depthwise/cpu_code.h"

namespace nnarch::NNARCH_ISA {
namespace {

// Blocks that reach beyond both edges are as wide as the image. Those of 7 pixels serve the 7×7
// images that many networks end with; the others have no code for that.
template <class T, int S, int STRIDE, int P>
constexpr StripFn<T> both_edges() {
  if constexpr (P == 7) return block_fixed<T, S, STRIDE, P, S / 2, S / 2>;
  return nullptr;
}

template <class T, int S, int STRIDE, int P>
inline constexpr BlockCode<T> kBlock = {kBlockRows<S>,
                                        P,
                                        block_fixed<T, S, STRIDE, P, 0, 0>,
                                        block_fixed<T, S, STRIDE, P, S / 2, 0>,
                                        block_fixed<T, S, STRIDE, P, 0, S / 2>,
                                        both_edges<T, S, STRIDE, P>()};

// For rows of n pixels: the last block is moved back to end with the row, so the width that
// computes fewer pixels twice serves. One of 8 would reach past both edges of a row of 8.
template <class T, int S, int STRIDE>
const BlockCode<T>* for_rows(int64_t n) {
  const auto covers = [n](int64_t p) { return ceil_div(n, p) * p; };
  if constexpr (kBlockRows<S> == 1) {
    if constexpr (S == 7)
      if (n <= 8 || covers(7) < covers(8)) return &kBlock<T, S, STRIDE, 7>;
    return &kBlock<T, S, STRIDE, 8>;
  }
  if constexpr (kVectorBytes == 64 && S < 7)
    if (covers(7) <= covers(4)) return &kBlock<T, S, STRIDE, 7>;
  return &kBlock<T, S, STRIDE, 4>;
}

template <class T>
const BlockCode<T>* find(int64_t s, int64_t stride, int64_t n) {
  if (stride == 1) {
    if (s == 3) return for_rows<T, 3, 1>(n);
    if (s == 5) return for_rows<T, 5, 1>(n);
    if (s == 7) return for_rows<T, 7, 1>(n);
  }
  if (stride == 2) {
    if (s == 3) return for_rows<T, 3, 2>(n);
    if (s == 5) return for_rows<T, 5, 2>(n);
    if (s == 7) return for_rows<T, 7, 2>(n);
  }
  return nullptr;
}

}  // namespace

template <>
const BlockCode<float>* block_code<float>(int64_t s, int64_t stride, int64_t n) {
  return find<float>(s, stride, n);
}
template <>
const BlockCode<double>* block_code<double>(int64_t s, int64_t stride, int64_t n) {
  return find<double>(s, stride, n);
}

}  // namespace nnarch::NNARCH_ISA
