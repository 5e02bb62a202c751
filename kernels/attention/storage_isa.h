// Numbers of every storage type to vectors of the type that kernels compute in, and back.
#pragma once

#include "attention/cpu_problem.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {

typedef uint16_t HalfBits __attribute__((vector_size(2 * kLanes<float>)));
typedef uint32_t WordBits __attribute__((vector_size(kVectorBytes)));

NNARCH_INLINE HalfBits load_halves(const char* p, int64_t step, int64_t n) {
  HalfBits bits{};
  if (n >= kLanes<float> && step == 2) {
    __builtin_memcpy(&bits, p, sizeof bits);
    return bits;
  }
  uint16_t lane[kLanes<float>] = {};
  for (int64_t i = 0; i < n && i < kLanes<float>; ++i) __builtin_memcpy(lane + i, p + i * step, 2);
  __builtin_memcpy(&bits, lane, sizeof bits);
  return bits;
}

NNARCH_INLINE Vec<float> from_half(HalfBits bits) {
#if defined(NNARCH_ISA_avx512)
  return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#elif defined(NNARCH_ISA_avx2)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
#else
  // The exponent's bias grows by 112: as a product, which makes subnormal numbers right as well.
  const WordBits wide = __builtin_convertvector(bits, WordBits);
  const WordBits sign = (wide & 0x8000u) << 16, magnitude = (wide & 0x7FFFu) << 13;
  const WordBits special = (WordBits)(magnitude >= (0x7C00u << 13));
  Vec<float> x = (Vec<float>)magnitude;
  // Subnormal: the integer times 2^-24 (a product of denormals would be flushed).
  const Vec<float> small = __builtin_convertvector(magnitude >> 13, Vec<float>) * 0x1p-24f;
  x = (Vec<float>)(magnitude < (0x0400u << 13) ? (WordBits)small : magnitude + (112u << 23));
  return (Vec<float>)(((WordBits)x + (special & (112u << 23))) | sign);
#endif
}

NNARCH_INLINE Vec<float> from_bfloat16(HalfBits bits) {
  return (Vec<float>)(__builtin_convertvector(bits, WordBits) << 16);
}

NNARCH_INLINE HalfBits to_half(Vec<float> x) {
#if defined(NNARCH_ISA_avx512)
  return (HalfBits)_mm512_cvtps_ph((__m512)x, 0);
#elif defined(NNARCH_ISA_avx2)
  return (HalfBits)_mm256_cvtps_ph((__m256)x, 0);
#else
  uint16_t lane[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) {
    uint32_t b;
    const float value = x[i];
    __builtin_memcpy(&b, &value, 4);
    const uint32_t sign = b >> 16 & 0x8000u, m = b & 0x7FFFFFFFu;
    uint32_t h;
    if (m > 0x7F800000u) {
      h = 0x7E00u;
    } else if (m >= 0x477FF000u) {  // rounds to 65536
      h = 0x7C00u;
    } else if (m < 0x38800000u) {  // subnormal: a multiple of 2^-24, rounded by an addition
      float shifted;
      __builtin_memcpy(&shifted, &m, 4);
      shifted += 0.5f;
      __builtin_memcpy(&h, &shifted, 4);
      h -= 0x3F000000u;
    } else {
      h = (m - (112u << 23) + 0x0FFFu + (m >> 13 & 1u)) >> 13;
    }
    lane[i] = static_cast<uint16_t>(sign | h);
  }
  HalfBits bits;
  __builtin_memcpy(&bits, lane, sizeof bits);
  return bits;
#endif
}

NNARCH_INLINE HalfBits to_bfloat16(Vec<float> x) {
  const WordBits b = (WordBits)x;
  const WordBits rounded = (b + 0x7FFFu + ((b >> 16) & 1u)) >> 16;
  const WordBits nan = (WordBits)(x != x);
  return __builtin_convertvector((nan & 0x7FC0u) | (~nan & rounded), HalfBits);
}

// Up to a vector of numbers, `step` bytes apart; lanes from n on are zero.
template <class T>
NNARCH_INLINE Vec<T> load_as(Storage storage, const char* p, int64_t step, int64_t n) {
  if constexpr (sizeof(T) == 4) {
    if (storage == Storage::half) return from_half(load_halves(p, step, n));
    if (storage == Storage::bfloat16) return from_bfloat16(load_halves(p, step, n));
  }
  if (step == static_cast<int64_t>(sizeof(T))) return load_n(reinterpret_cast<const T*>(p), n);
  T lane[kLanes<T>] = {};
  for (int64_t i = 0; i < n && i < kLanes<T>; ++i)
    __builtin_memcpy(lane + i, p + i * step, sizeof(T));
  return load(lane);
}

// The first n lanes to consecutive places.
template <class T>
NNARCH_INLINE void store_as(Storage storage, char* p, Vec<T> v, int64_t n) {
  if constexpr (sizeof(T) == 4) {
    if (storage != Storage::native) {
      const HalfBits bits = storage == Storage::half ? to_half(v) : to_bfloat16(v);
      __builtin_memcpy(p, &bits, 2 * static_cast<size_t>(n < kLanes<T> ? n : kLanes<T>));
      return;
    }
  }
  store_n(reinterpret_cast<T*>(p), v, n);
}

// Rows of n numbers as the kernels compute in them, `to_step` apart, a multiple of the lanes that
// holds n: what lies between is zero.
template <class T>
NNARCH_NOINLINE void copy_rows(const Operand& from, const char* first, int64_t rows, int64_t n,
                               T* to, int64_t to_step) {
  for (int64_t r = 0; r < rows; ++r, first += from.row, to += to_step)
    for (int64_t d = 0; d < to_step; d += kLanes<T>)
      store(to + d, load_as<T>(from.storage, first + d * from.column, from.column, n - d));
}

// Where rows of an operand can be read: in place, or copied.
template <class T>
struct RowsInMemory {
  const T* data;
  int64_t step;
};
template <class T>
NNARCH_INLINE RowsInMemory<T> readable_rows(const Operand& from, const char* first, int64_t rows,
                                            int64_t n, T* copy) {
  if (from.in_place)
    return {reinterpret_cast<const T*>(first), from.row / static_cast<int64_t>(sizeof(T))};
  const int64_t step = (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  copy_rows(from, first, rows, n, copy, step);
  return {copy, step};
}

}  // namespace nnarch::NNARCH_ISA
