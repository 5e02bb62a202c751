// C = A·B with a matrix B that is multiplied where it lies, one part of the sum after the other:
// for rows so few that packing B would take a good part of the product's time.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

template <class T>
struct UnpackedBlock {
  const T* a = nullptr;  // A[i][k] at a + i * a_step + k
  int64_t a_step = 0;
  const T* b = nullptr;  // B[k][j] at b + k * b_step + j
  int64_t b_step = 0;
  T* c = nullptr;  // C[i][j] at c + i * c_step + j
  int64_t c_step = 0;
  int64_t m = 0, n = 0, depth = 0;  // depth: at most kUnpackedDepth
  bool accumulate = false;          // add to what C holds
  // Rows of B that will be read next, as wide as this block, fetched ahead; or null.
  const T* after = nullptr;
  int64_t after_rows = 0;
};

// The longest part of a sum that a block adds at once. A panel's part is copied into the
// first-level cache on the way, 16 KB, and parts some hundred columns wide stay in the second-level
// cache. Half as much and twice as much were slower.
inline constexpr int64_t kUnpackedDepth = 128;

template <class T>
using UnpackedProduct = void (*)(const UnpackedBlock<T>& block);

NNARCH_PER_ISA(template <class T> UnpackedProduct<T> unpacked_product();)

}  // namespace nnarch
