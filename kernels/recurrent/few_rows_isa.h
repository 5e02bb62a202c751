// What few_rows_isa.cpp has for the table of kernels.
#pragma once

#include "cpu/simd.h"
#include "recurrent/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {

#if defined(NNARCH_ISA_avx512)
inline constexpr int kFewSums = 24;  // of 32 registers
#else
inline constexpr int kFewSums = 12;  // of 16
#endif
inline constexpr int64_t kMostFewRows = 4;

// bfloat16 values are the upper halves of floats.
NNARCH_INLINE Vec<float> load_bfloat16(const uint16_t* p) {
#if defined(NNARCH_ISA_avx512)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(NNARCH_ISA_avx2)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  const Bits bits = {p[0], p[1], p[2], p[3]};
  return (Vec<float>)(bits << 16);
#endif
}

template <class T, class W>
void few_rows(const FewRows<T, W>& p);
void to_bfloat16(const float* from, uint16_t* to, int64_t n);
void from_bfloat16(const uint16_t* from, float* to, int64_t n);

}  // namespace nnarch::NNARCH_ISA
