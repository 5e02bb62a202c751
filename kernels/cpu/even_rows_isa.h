// Addresses of rows that lie evenly, with few registers. For *_isa.cpp files.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {
namespace {

// Rows that lie `step` apart. Three pointers and two multiples of the step reach 14 rows with
// the scales 1, 2, 4 and 8 of an address; one pointer a row would not fit the registers.
template <class T>
struct EvenRows {
  const char *p0, *p5, *p10;
  int64_t step, step3;

  NNARCH_INLINE EvenRows(const T* a, int64_t elements)
      : p0(reinterpret_cast<const char*>(a)), step(elements * int64_t{sizeof(T)}), step3(3 * step) {
    p5 = p0 + 5 * step;
    p10 = p5 + 5 * step;
  }
  template <int I>
  NNARCH_INLINE T* row() const {
    const char* at = p0;
    if constexpr (I == 1 || I == 2 || I == 4 || I == 8) at = p0 + I * step;
    if constexpr (I == 3 || I == 6 || I == 12) at = p0 + I / 3 * step3;
    if constexpr (I == 5) at = p5;
    if constexpr (I == 7 || I == 9 || I == 13) at = p5 + (I - 5) * step;
    if constexpr (I == 11) at = p5 + 2 * step3;
    if constexpr (I == 10) at = p10;
    return reinterpret_cast<T*>(const_cast<char*>(at));
  }
  template <int I>
  NNARCH_INLINE T value(int64_t) const {
    return *row<I>();
  }
  // To the next column, or so many on.
  NNARCH_INLINE void next(int64_t elements = 1) {
    const int64_t way = elements * int64_t{sizeof(T)};
    p0 += way, p5 += way, p10 += way;
    pin();
  }
  // The compiler may not make a running pointer of its own for every row.
  NNARCH_INLINE void pin() { asm("" : "+r"(p0), "+r"(p5), "+r"(p10)); }
};

}  // namespace
}  // namespace nnarch::NNARCH_ISA
