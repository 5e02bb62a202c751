// Loads and stores of vectors in the type that a tensor is stored in: float and double as they are,
// half types converted on the way, so that no converted copy of a tensor is made. For *_isa.cpp.
//
// Rounding is to nearest, ties to even; half types keep their denormals, whatever the thread's
// flush-to-zero says.
#pragma once

#include "cpu/math.h"
#include "cpu/simd.h"
#include "cpu/stored.h"

namespace nnarch::NNARCH_ISA {

template <class S>
NNARCH_INLINE Vec<S> load_as(const S* p) {
  return load(p);
}
template <class S>
NNARCH_INLINE Vec<S> load_as(const S* p, int64_t n) {
  return load_n(p, n);
}
template <class S>
NNARCH_INLINE void store_as(S* p, Vec<S> v) {
  store(p, v);
}
template <class S>
NNARCH_INLINE void store_as(S* p, Vec<S> v, int64_t n) {
  store_n(p, v, n);
}

// ------------------------------------------------------------------------------ the half types

#if defined(NNARCH_ISA_avx512)

typedef __m256i HalfBits;  // as many as a vector of float has lanes

NNARCH_INLINE HalfBits load_bits(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
NNARCH_INLINE void store_bits(void* p, HalfBits v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), v);
}
NNARCH_INLINE HalfBits load_bits(const void* p, int64_t n) {
  return n >= 16 ? load_bits(p)
                 : _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p);
}
NNARCH_INLINE void store_bits(void* p, HalfBits v, int64_t n) {
  if (n >= 16) return store_bits(p, v);
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), v);
}
NNARCH_INLINE Vec<float> widen(BFloat16, HalfBits b) {
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
}
NNARCH_INLINE Vec<float> widen(Float16, HalfBits b) { return (Vec<float>)_mm512_cvtph_ps(b); }
NNARCH_INLINE HalfBits narrow(Float16, Vec<float> v) {
  return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
NNARCH_INLINE HalfBits low_halves(Bits<float>::V v) { return _mm512_cvtepi32_epi16((__m512i)v); }

#elif defined(NNARCH_ISA_avx2)

typedef __m128i HalfBits;

NNARCH_INLINE HalfBits load_bits(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
NNARCH_INLINE void store_bits(void* p, HalfBits v) {
  _mm_storeu_si128(static_cast<__m128i*>(p), v);
}
NNARCH_INLINE Vec<float> widen(BFloat16, HalfBits b) {
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16);
}
NNARCH_INLINE Vec<float> widen(Float16, HalfBits b) { return (Vec<float>)_mm256_cvtph_ps(b); }
NNARCH_INLINE HalfBits narrow(Float16, Vec<float> v) {
  return _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
NNARCH_INLINE HalfBits low_halves(Bits<float>::V v) {
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);  // within 128-bit lanes
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

#else

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));

NNARCH_INLINE HalfBits load_bits(const void* p) {
  HalfBits v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
NNARCH_INLINE void store_bits(void* p, HalfBits v) { __builtin_memcpy(p, &v, sizeof v); }
NNARCH_INLINE Vec<float> widen(BFloat16, HalfBits b) {
  return (Vec<float>)(__builtin_convertvector(b, Bits<float>::V) << 16);
}
NNARCH_INLINE Vec<float> widen(Float16, HalfBits b) {
  typedef Bits<float>::V B;
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  const B h = __builtin_convertvector(b, B), magnitude = h & 0x7fff;
  const B normal = (magnitude << 13) + ((127 - 15) << 23);
  const B infinite = (magnitude << 13) | 0x7f800000;  // and NaN
  const B small = (B)(__builtin_convertvector((I)magnitude, Vec<float>) * 0x1p-24f);
  const B bits = magnitude >= 0x7c00 ? infinite : magnitude < 0x0400 ? small : normal;
  return (Vec<float>)(bits | ((h & 0x8000) << 16));
}
NNARCH_INLINE HalfBits low_halves(Bits<float>::V v) { return __builtin_convertvector(v, HalfBits); }
NNARCH_INLINE HalfBits narrow(Float16, Vec<float> v) {
  typedef Bits<float>::V B;
  const B bits = (B)v, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const B odd = (magnitude >> 13) & 1;
  const B normal = (magnitude - ((127 - 15) << 23) + 0xfff + odd) >> 13;
  // 0.5 has its last bit where a denormal half has: the addition rounds.
  const B small = (B)((Vec<float>)magnitude + 0.5f) - 0x3f000000;
  const B special = magnitude > 0x7f800000 ? (B{} + 0x7e00) : (B{} + 0x7c00);
  const B half = magnitude >= 0x47800000 ? special : magnitude < 0x38800000 ? small : normal;
  return low_halves(half | sign);
}

#endif

#if !defined(NNARCH_ISA_avx512)  // which has masked loads and stores
NNARCH_INLINE HalfBits load_bits(const void* p, int64_t n) {
  if (n >= kLanes<float>) return load_bits(p);
  uint16_t lanes[kLanes<float>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = static_cast<const uint16_t*>(p)[i];
  return load_bits(lanes);
}
NNARCH_INLINE void store_bits(void* p, HalfBits v, int64_t n) {
  if (n >= kLanes<float>) return store_bits(p, v);
  uint16_t lanes[kLanes<float>];
  store_bits(lanes, v);
  for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(p)[i] = lanes[i];
}
#endif

NNARCH_INLINE HalfBits narrow(BFloat16, Vec<float> v) {
  typedef Bits<float>::V B;
  const B bits = (B)v;
  const B rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return low_halves(v == v ? rounded : B{} + 0x7fc0);
}

// v as it reads after it has been stored.
template <class S>
NNARCH_INLINE Vec<Compute<S>> rounded_as(Vec<Compute<S>> v) {
  if constexpr (sizeof(S) == sizeof(Compute<S>))
    return v;
  else
    return widen(S{}, narrow(S{}, v));
}

#define NNARCH_HALF_STORAGE(S)                                                                    \
  NNARCH_INLINE Vec<float> load_as(const S* p) { return widen(S{}, load_bits(p)); }               \
  NNARCH_INLINE Vec<float> load_as(const S* p, int64_t n) { return widen(S{}, load_bits(p, n)); } \
  NNARCH_INLINE void store_as(S* p, Vec<float> v) { store_bits(p, narrow(S{}, v)); }              \
  NNARCH_INLINE void store_as(S* p, Vec<float> v, int64_t n) { store_bits(p, narrow(S{}, v), n); }
NNARCH_HALF_STORAGE(BFloat16)
NNARCH_HALF_STORAGE(Float16)
#undef NNARCH_HALF_STORAGE

}  // namespace nnarch::NNARCH_ISA
