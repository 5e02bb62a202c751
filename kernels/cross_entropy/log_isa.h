// The logarithm on vectors of doubles, and of a block's sums. For softmax_isa.cpp.
#pragma once

#include "cpu/math.h"
#include "cpu/wide.h"

namespace nnarch::NNARCH_ISA {
namespace {

// log(x) within one unit in the last place for x >= 0 that is not denormal; infinity and NaN give
// themselves. x = 2^e·(1 + f) with 1 + f from √½ to √2; then log(1 + f) = f - f²/2 + s·(f²/2 + R)
// with s = f / (2 + f), R a minimax polynomial of s² (as in fdlibm).
NNARCH_INLINE Vec<double> log(Vec<double> x) {
  typedef Bits<double>::V B;
  static constexpr double r[] = {6.666666666666735130e-01, 3.999999999940941908e-01,
                                 2.857142874366239149e-01, 2.222219843214978396e-01,
                                 1.818357216161805012e-01, 1.531383769920937332e-01,
                                 1.479819860511658591e-01};
  constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  constexpr double two52 = 0x1p52;
  constexpr uint64_t sqrt_half = 0x3fe6a09e667f3bcd, one = 0x3ff0000000000000;
  const B bits = (B)x, above = bits + (one - sqrt_half);
  const B biased = above >> 52;  // of 2^e, and 1023: never negative
  const Vec<double> e = (Vec<double>)(biased | (B)broadcast<double>(two52)) - (two52 + 1023.0);
  const Vec<double> f = (Vec<double>)(bits - ((biased << 52) - one)) - 1.0;
  const Vec<double> s = f / (f + 2.0), half_square = f * f * 0.5, square = s * s;
  const Vec<double> tail = s * (half_square + square * polynomial<double>(square, r));
  const Vec<double> finite = e * ln2_high - ((half_square - (tail + e * ln2_low)) - f);
  const Vec<double> infinity = broadcast<double>(__builtin_huge_val());
  const Vec<double> any = x < infinity ? finite : x;
  return x == Vec<double>{} ? -infinity : any;
}

// logs[n] = log(sum[n])
template <class T>
void log_sums(const T* sum, int64_t columns, double* logs) {
  constexpr int64_t lanes = kLanes<double>;
  for (int64_t n = 0; n < columns; n += kLanes<T>) {
    const int64_t some = columns - n < kLanes<T> ? columns - n : kLanes<T>;
    Wide<T> total;
    total.add(load_n(sum + n, some));
    for (int64_t i = 0, left = some; i < Wide<T>::parts && left > 0; ++i, left -= lanes)
      store_n(logs + n + i * lanes, log(total.part[i]), left < lanes ? left : lanes);
  }
}

}  // namespace
}  // namespace nnarch::NNARCH_ISA
