// Dropout of weights: kernels/dropout has the definition. For *_isa.cpp files.
#pragma once

#include "attention/cpu_problem.h"
#include "cpu/philox_isa.h"

namespace nnarch::NNARCH_ISA {

// The seed's words for keys 4·quad … 4·quad + 3 of a vector of queries, one after the other.
NNARCH_INLINE PhiloxWords quad_words(uint64_t seed, int64_t quad, Words query, Words outer) {
  return philox(seed, static_cast<uint32_t>(quad) - Words{}, query, outer);
}

// All ones where a word is kept. (A threshold of 2³² keeps none.)
NNARCH_INLINE Words kept_words(uint64_t threshold, Words word) {
  if (threshold > 0xFFFFFFFFu) return Words{};
  return (Words)(word >= static_cast<uint32_t>(threshold));
}

// 0 or the survivors' scale for each lane.
NNARCH_INLINE void store_factors(Words kept, float scale, float* to) {
  store(to, (Vec<float>)(kept & (Words)broadcast(scale)));
}
NNARCH_INLINE void store_factors(Words kept, double scale, double* to) {
  for (int i = 0; i < kLanes<float>; ++i) to[i] = kept[i] ? scale : 0.0;
}

// Factors of keys [4·quad, 4·quad + 4) for `lanes` queries: to[key][lane]. `query` and `outer` hold
// the queries' places, `lanes` a multiple of kLanes<float>.
template <class T>
NNARCH_INLINE void quad_factors(const Attention<T>& a, int64_t quad, const uint32_t* query,
                                const uint32_t* outer, int64_t lanes, T* to) {
  const T scale = static_cast<T>(a.survivor_scale);
  for (int64_t i = 0; i < lanes; i += kLanes<float>) {
    Words q, o;
    __builtin_memcpy(&q, query + i, sizeof q);
    __builtin_memcpy(&o, outer + i, sizeof o);
    const PhiloxWords words = quad_words(a.seed, quad, q, o);
    store_factors(kept_words(a.threshold, words.w0), scale, to + i);
    store_factors(kept_words(a.threshold, words.w1), scale, to + lanes + i);
    store_factors(kept_words(a.threshold, words.w2), scale, to + 2 * lanes + i);
    store_factors(kept_words(a.threshold, words.w3), scale, to + 3 * lanes + i);
  }
}

// Factors of one query for keys [first, first + n), first a multiple of 4: `to` holds n rounded up
// to 4 * kLanes<float>.
template <class T>
NNARCH_INLINE void row_factors(const Attention<T>& a, uint32_t query, uint32_t outer, int64_t first,
                               int64_t n, T* to) {
  constexpr int lanes = kLanes<float>;
  const T scale = static_cast<T>(a.survivor_scale);
  for (int64_t j = 0; j < n; j += 4 * lanes) {
    Words quad;
    for (int i = 0; i < lanes; ++i) quad[i] = static_cast<uint32_t>((first + j) / 4 + i);
    const PhiloxWords words = philox(a.seed, quad, query - Words{}, outer - Words{});
    const Words kept[4] = {kept_words(a.threshold, words.w0), kept_words(a.threshold, words.w1),
                           kept_words(a.threshold, words.w2), kept_words(a.threshold, words.w3)};
    for (int i = 0; i < lanes; ++i)
      for (int word = 0; word < 4; ++word) to[j + 4 * i + word] = kept[word][i] ? scale : T(0);
  }
}

}  // namespace nnarch::NNARCH_ISA
