// Which keys a tile of queries sees, and what is added to its scores. For *_isa.cpp files.
#pragma once

#include "attention/softmax_isa.h"
#include "attention/storage_isa.h"
#include "cpu/transpose_isa.h"

namespace nnarch::NNARCH_ISA {

template <class T>
inline constexpr int kTile = 2 * kLanes<T>;  // queries side by side

enum class Seen { nothing, some, all };

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

// One row of a mask for keys [0, n): 0 or -infinity where it is boolean. `to` holds n rounded up to
// whole vectors.
template <class T>
NNARCH_INLINE void bias_row(const MaskOperand& mask, const char* p, int64_t n, T* to) {
  constexpr int w = kLanes<T>;
  const int64_t step = mask.values.column;
  for (int64_t j = 0; j < n; j += w, p += w * step, to += w) {
    if (!mask.boolean) {
      store(to, load_as<T>(mask.values.storage, p, step, n - j));
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

// Scores that stay where a byte is not 0.
template <class T>
NNARCH_INLINE Vec<T> hide_where_zero(Vec<T> scores, const char* p) {
#if defined(NNARCH_ISA_avx512)
  const Vec<T> hidden = broadcast(-kInfinity<T>);
  if constexpr (sizeof(T) == 4) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Vec<T>)_mm512_mask_mov_ps((__m512)scores, _mm_testn_epi8_mask(bytes, bytes),
                                      (__m512)hidden);
  } else {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const auto zero = static_cast<__mmask8>(_mm_testn_epi8_mask(bytes, bytes));
    return (Vec<T>)_mm512_mask_mov_pd((__m512d)scores, zero, (__m512d)hidden);
  }
#else
  const Vec<T> hidden = hidden_where_zero<T>(p);
  return hidden == T(0) ? scores : hidden;
#endif
}

// to[j][i] = row[i][j] for 16 rows and 16 bytes of them: four perfect shuffles of the rows.
#if defined(NNARCH_ISA_avx2) || defined(NNARCH_ISA_avx512)
template <int... I>
NNARCH_INLINE void shuffle_rows(Indices<I...>, __m128i (&row)[16]) {
  __m128i from[16];
  for (int i = 0; i < 16; ++i) from[i] = row[i];
  ((row[2 * I] = _mm_unpacklo_epi8(from[I], from[I + 8]),
    row[2 * I + 1] = _mm_unpackhi_epi8(from[I], from[I + 8])),
   ...);
}
#endif

// The mask of a tile's queries for keys [first, first + n), as it lies by keys: to[j][query] for
// query < kTile. `row[i]` is where query i's row of the mask begins; rows behind the last are like
// it.
template <class T>
NNARCH_INLINE void turn_boolean(const char* const* row, int64_t rows, int64_t first, int64_t n,
                                int64_t column, char* to) {
  constexpr int width = kTile<T>;
  int64_t j = 0;
#if defined(NNARCH_ISA_avx2) || defined(NNARCH_ISA_avx512)
  if constexpr (width >= 16) {
    // The last 16 keys again where fewer are left.
    for (int64_t at = 0; column == 1 && n >= 16 && at < n; at += 16) {
      j = at + 16 <= n ? at : n - 16;
      for (int64_t i = 0; i < width && i < rows; i += 16) {
        __m128i lines[16];
        for (int64_t r = 0; r < 16; ++r)
          lines[r] = _mm_loadu_si128(
              reinterpret_cast<const __m128i*>(row[i + r < rows ? i + r : rows - 1] + first + j));
        for (int stage = 0; stage < 4; ++stage) shuffle_rows(MakeIndices<8>{}, lines);
        for (int64_t k = 0; k < 16; ++k)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (j + k) * width + i), lines[k]);
      }
      j += 16;
    }
  }
#endif
  for (; j < n; ++j)
    for (int64_t i = 0; i < width; ++i)
      to[j * width + i] = row[i < rows ? i : rows - 1][(first + j) * column];
}

template <class T>
NNARCH_INLINE void turn_added(const MaskOperand& mask, const char* const* row, int64_t rows,
                              int64_t first, int64_t n, T* to) {
  constexpr int w = kLanes<T>;
  const int64_t column = mask.values.column;
  for (int64_t half = 0; half < kTile<T> && half < rows; half += w)
    for (int64_t j = 0; j < n; j += w) {
      Vec<T> lanes[w];
      for (int i = 0; i < w; ++i) {
        const char* from = row[half + i < rows ? half + i : rows - 1] + (first + j) * column;
        lanes[i] = load_as<T>(mask.values.storage, from, column, n - j);
        __builtin_prefetch(from + n * column);  // the next block
      }
      transpose_rows<w / 2, T>(lanes);
      for (int i = 0; i < w && j + i < n; ++i) store(to + (j + i) * kTile<T> + half, lanes[i]);
    }
  if (rows <= w)
    for (int64_t j = 0; j < n; ++j) store(to + j * kTile<T> + w, Vec<T>{});
}

// What a boolean mask leaves visible of a tile's queries and keys [first, first + n).
NNARCH_INLINE Seen seen_of_tile(const char* const* row, int64_t rows, int64_t first, int64_t n,
                                int64_t column) {
  bool any = false, all = true;
  for (int64_t i = 0; i < rows; ++i) {
    const Seen seen = seen_of(row[i] + first * column, column, n);
    any |= seen != Seen::nothing;
    all &= seen == Seen::all;
  }
  return all ? Seen::all : any ? Seen::some : Seen::nothing;
}

}  // namespace nnarch::NNARCH_ISA
