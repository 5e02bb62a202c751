// The kernels of local response normalization of one instruction set.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

// Pixels of a plane that a call of the kernels of planes takes at most.
inline constexpr int64_t kPlaneBlock = 1024;

// How s^-beta is computed: by roots, by exp and log, or by the C library, number after number.
enum class Power { three_quarters, half, any, library };

// y[c] = r[c] * s[c]^-beta, s[c] = k + scale * (r[c-before]² + … + r[c+after]²), r = max(x, floor).
template <class T>
struct Response {
  int64_t channels, before, after;
  T scale, k;
  double beta;
  Power power;
  T floor;  // -inf without relu
  T dead;   // inputs up to here have no gradient; NaN without relu
};

template <class T>
struct ResponseTable {
  // Some pixels of one image: channels lie `plane` elements apart, pixels side by side.
  void (*forward_planes)(const T* x, int64_t plane, int64_t pixels, const Response<T>& a, T* y);
  // scratch: 2 * channels * pixels.
  void (*grad_planes)(const T* grad, const T* x, int64_t plane, int64_t pixels,
                      const Response<T>& a, T* scratch, T* dx);
  // Some pixels, channels side by side. scratch: scratch_of_rows(a).
  void (*forward_rows)(const T* x, int64_t pixels, const Response<T>& a, T* scratch, T* y,
                       bool past_caches);
  void (*grad_rows)(const T* grad, const T* x, int64_t pixels, const Response<T>& a, T* scratch,
                    T* dx, bool past_caches);
};

// Two rows of channels with zeros for the channels that are not there, and a vector of slack each.
template <class T>
int64_t scratch_of_rows(const Response<T>& a) {
  return 2 * (a.channels + a.before + a.after + 3 * 64);
}

NNARCH_PER_ISA(template <class T> const ResponseTable<T>& response_table();)

}  // namespace nnarch
