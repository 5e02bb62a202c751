// Which keys a tile of queries sees, and what is added to its scores. For *_isa.cpp files.
#pragma once

#include "attention/softmax_isa.h"
#include "attention/storage_isa.h"
#include "cpu/transpose_isa.h"

namespace nnarch::NNARCH_ISA {

template <class T>
inline constexpr int kTile = 2 * kLanes<T>;  // queries side by side

enum class Seen { nothing, some, all };

template <class T>
NNARCH_INLINE T bias_of(const MaskOperand& mask, const char* p) {
  if (mask.boolean) return *p ? T(0) : -kInfinity<T>;
  return load_as<T>(mask.values.storage, p, mask.values.column, 1)[0] * T(kLog2E);
}

// -infinity where a byte is 0, else 0, for as many bytes as a vector has lanes.
template <class T>
NNARCH_INLINE Vec<T> hidden_where_zero(const char* p) {
  typedef typename Bits<T>::V B;
  const B hidden = (B)broadcast(-kInfinity<T>);
#if defined(NNARCH_ISA_avx512)
  if constexpr (sizeof(T) == 4) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Vec<T>)_mm512_maskz_mov_epi32(_mm_testn_epi8_mask(bytes, bytes), (__m512i)hidden);
  } else {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const auto zero = static_cast<__mmask8>(_mm_testn_epi8_mask(bytes, bytes));
    return (Vec<T>)_mm512_maskz_mov_epi64(zero, (__m512i)hidden);
  }
#elif defined(NNARCH_ISA_avx2)
  const __m256i none = _mm256_setzero_si256();
  if constexpr (sizeof(T) == 4) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return (Vec<T>)((B)_mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(bytes), none) & hidden);
  } else {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    const __m256i lanes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    return (Vec<T>)((B)_mm256_cmpeq_epi64(lanes, none) & hidden);
  }
#else
  B bits;
  for (int i = 0; i < kLanes<T>; ++i) bits[i] = p[i] ? 0 : hidden[i];
  return (Vec<T>)bits;
#endif
}

// One row of a mask for keys [0, n), in units of ln 2: 0 or -infinity where it is boolean. `to`
// holds n rounded up to whole vectors.
template <class T>
NNARCH_INLINE void bias_row(const MaskOperand& mask, const char* p, int64_t n, T* to) {
  constexpr int w = kLanes<T>;
  const int64_t step = mask.values.column;
  for (int64_t j = 0; j < n; j += w, p += w * step, to += w) {
    if (!mask.boolean) {
      store(to, load_as<T>(mask.values.storage, p, step, n - j) * T(kLog2E));
      continue;
    }
    if (step == 1 && n - j >= w) {
      store(to, hidden_where_zero<T>(p));
    } else {
      char byte[w] = {};
      for (int64_t i = 0; i < w && i < n - j; ++i) byte[i] = p[i * step];
      store(to, hidden_where_zero<T>(byte));
    }
  }
}

// Whether n bytes are all 0, all not, or mixed.
NNARCH_INLINE Seen seen_of(const char* p, int64_t step, int64_t n) {
  bool any = false, all = true;
  int64_t j = 0;
  if (step == 1) {
    uint64_t either = 0, both = 0x0101010101010101u;
    for (; j + 8 <= n; j += 8) {
      uint64_t word;
      __builtin_memcpy(&word, p + j, 8);
      either |= word, both &= word;
    }
    any = either != 0;
    all = both == 0x0101010101010101u;  // anything else counts as mixed, which is always right
  }
  for (; j < n; ++j) {
    any |= p[j * step] != 0;
    all &= p[j * step] != 0;
  }
  return all ? Seen::all : any ? Seen::some : Seen::nothing;
}

// The mask of a tile's queries for keys [first, first + n): what it leaves visible. If that is
// some: to[j][query], query < kTile. `row[i]` is where query i's row of the mask begins; `scratch`
// holds kTile rows of n rounded up to whole vectors.
template <class T>
NNARCH_NOINLINE Seen mask_tile(const MaskOperand& mask, const char* const* row, int64_t rows,
                               int64_t first, int64_t n, T* scratch, T* to) {
  constexpr int w = kLanes<T>;
  const int64_t column = mask.values.column, step = (n + w - 1) / w * w;
  if (mask.boolean) {
    bool any = false, all = true;
    for (int64_t i = 0; i < rows; ++i) {
      const Seen seen = seen_of(row[i] + first * column, column, n);
      any |= seen != Seen::nothing;
      all &= seen == Seen::all;
    }
    if (!any) return Seen::nothing;
    if (all) return Seen::all;
  }
  for (int64_t i = 0; i < rows; ++i)
    bias_row<T>(mask, row[i] + first * column, n, scratch + i * step);
  for (int64_t half = 0; half < kTile<T> && half < rows; half += w)
    for (int64_t j = 0; j < n; j += w) {
      Vec<T> lanes[w];
      for (int i = 0; i < w; ++i) {
        const int64_t from = half + i < rows ? half + i : rows - 1;
        lanes[i] = load(scratch + from * step + j);
      }
      transpose_rows<w / 2, T>(lanes);
      for (int i = 0; i < w && j + i < n; ++i) store(to + (j + i) * kTile<T> + half, lanes[i]);
    }
  if (rows <= w)
    for (int64_t j = 0; j < n; ++j) store(to + j * kTile<T> + w, Vec<T>{});
  return Seen::some;
}

}  // namespace nnarch::NNARCH_ISA
