// Maxima back to where they were. Indices that lie in their own windows, as maximum pooling without
// overlap leaves them, need no scatter: every output of a window is the maximum or 0.
#include "cpu/simd.h"
#include "pooling/best_isa.h"
#include "pooling/cpu_unpool.h"

namespace nnarch::NNARCH_ISA {
namespace {

typedef int64_t Words __attribute__((vector_size(kVectorBytes)));

NNARCH_INLINE Words load_words(const int64_t* p, int64_t n) {
  return (Words)load_n<double>(reinterpret_cast<const double*>(p), n < 0 ? 0 : n);
}

// Indices as lanes beside T, the first n of them; `seen` gathers the bits of all.
NNARCH_INLINE Lanes<double> load_lanes(const int64_t* p, int64_t n, Words& seen, double) {
  const Words v = load_words(p, n);
  seen |= v;
  return (Lanes<double>)v;
}

NNARCH_INLINE Lanes<float> load_lanes(const int64_t* p, int64_t n, Words& seen, float) {
  constexpr int64_t half = kLanes<double>;
  const Words a = load_words(p, n < half ? n : half), b = load_words(p + half, n - half);
  seen |= a | b;
#if defined(NNARCH_ISA_avx512)
  return (Lanes<float>)_mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32((__m512i)a)),
                                          _mm512_cvtepi64_epi32((__m512i)b), 1);
#elif defined(NNARCH_ISA_avx2)
  const __m256 even = _mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  return (Lanes<float>)_mm256_permute4x64_epi64((__m256i)even, 0xD8);
#else
  Lanes<float> v;
  for (int i = 0; i < half; ++i) {
    v[i] = static_cast<int32_t>(a[i]);
    v[half + i] = static_cast<int32_t>(b[i]);
  }
  return v;
#endif
}

// Whether all bits belong to numbers from 0 to 2^31 - 1.
NNARCH_INLINE bool all_small(Words seen) {
  int64_t bits = 0;
  for (int i = 0; i < kLanes<double>; ++i) bits |= seen[i];
  return (static_cast<uint64_t>(bits) >> 31) == 0;
}

template <class T>
NNARCH_INLINE bool all_set(Lanes<T> found) {
  for (int i = 0; i < kLanes<T>; ++i)
    if (found[i] == 0) return false;
  return true;
}

template <class T>
bool rows(const T* x, const int64_t* index, int64_t channels, const Windows2d& w, int64_t from,
          int64_t to, T* y, bool past_caches) {
  constexpr int64_t lane = kLanes<T>;
  const int64_t width = w.width * w.wide;
  Words seen{};
  for (int64_t i = from; i < to; ++i) {
    Lanes<T> all = lanes<T>(-1);
    for (int64_t j = 0; j < w.width; ++j) {
      const int64_t at = (i * w.width + j) * channels, first = i * w.tall * width + j * w.wide;
      for (int64_t c = 0; c < channels; c += lane) {
        const int64_t k = c + lane <= channels ? c : channels - lane;  // the last may overlap
        const Vec<T> v = load(x + at + k), none{};
        const Lanes<T> where = load_lanes(index + at + k, lane, seen, T{});
        Lanes<T> found{};
        for (int64_t r = 0; r < w.tall; ++r)
          for (int64_t s = 0; s < w.wide; ++s) {
            const int64_t pixel = first + r * width + s;
            const Lanes<T> here = where == lanes<T>(pixel);
            found |= here;
            T* p = y + pixel * channels + k;
            if (past_caches)
              stream(p, here ? v : none);
            else
              store(p, here ? v : none);
          }
        all &= found;
      }
    }
    if (!all_set<T>(all)) return false;
  }
  if (past_caches) finish_streaming();
  return all_small(seen);
}

template <class T, int first, int... I>
NNARCH_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, Indices<I...>) {
  constexpr int w = kLanes<T>;
  return __builtin_shufflevector(a, b, (first + I / 2 + I % 2 * w)...);
}

// Windows are two columns wide.
template <class T>
bool plane(const T* x, const int64_t* index, const Windows2d& w, int64_t from, int64_t to, T* y) {
  constexpr int64_t lane = kLanes<T>;
  const MakeIndices<kLanes<T>> every{};
  const int64_t width = 2 * w.width;
  Lanes<T> steps{};
  for (int l = 0; l < lane; ++l) steps[l] = 2 * l;
  Words seen{};
  for (int64_t i = from; i < to; ++i) {
    Lanes<T> all = lanes<T>(-1);
    for (int64_t j = 0; j < w.width; j += lane) {
      const int64_t n = w.width - j < lane ? w.width - j : lane, at = i * w.width + j;
      const Vec<T> v = load_n(x + at, n), none{};
      const Lanes<T> where = load_lanes(index + at, n, seen, T{});
      Lanes<T> found = steps >= lanes<T>(2 * n);  // lanes past the row
      for (int64_t r = 0; r < w.tall; ++r) {
        const int64_t pixel = (i * w.tall + r) * width + 2 * j;
        const Lanes<T> first = lanes<T>(pixel) + steps;
        const Lanes<T> left = where == first, right = where == first + 1;
        found |= left | right;
        const Vec<T> a = left ? v : none, b = right ? v : none;
        const int64_t more = 2 * n - lane;
        store_n(y + pixel, interleave<T, 0>(a, b, every), more < 0 ? 2 * n : lane);
        if (more > 0) store_n(y + pixel + lane, interleave<T, lane / 2>(a, b, every), more);
      }
      all &= found;
    }
    if (!all_set<T>(all)) return false;
  }
  return all_small(seen);
}

template <class T>
NNARCH_INLINE void clear(T* y, int64_t from, int64_t to, int64_t stride, int64_t channels) {
  if (channels == stride) {
    __builtin_memset(y + from * stride, 0, static_cast<size_t>((to - from) * stride) * sizeof(T));
    return;
  }
  for (int64_t i = from; i < to; ++i)
    __builtin_memset(y + i * stride, 0, static_cast<size_t>(channels) * sizeof(T));
}

template <class T>
bool scatter(const T* x, const int64_t* index, int64_t pixels, int64_t outputs, int64_t stride,
             int64_t channels, T* y) {
  const int64_t chunk = channels < 1024 ? 1024 / channels : 1, ahead = 4 * chunk;
  int64_t cleared = 0;  // memory is cleared shortly before something arrives there
  for (int64_t first = 0; first < pixels; first += chunk) {
    const int64_t last = first + chunk < pixels ? first + chunk : pixels;
    int64_t most = -1, bits = 0;
    for (int64_t i = first; i < last; ++i)
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = index[i * stride + c];
        most = at > most ? at : most;
        bits |= at;
      }
    if (bits < 0 || most >= outputs) return false;
    if (most >= cleared) {
      const int64_t end = most + ahead < outputs ? most + ahead : outputs;
      clear(y, cleared, end, stride, channels);
      cleared = end;
    }
    for (int64_t i = first; i < last; ++i)
      for (int64_t c = 0; c < channels; ++c)
        y[index[i * stride + c] * stride + c] = x[i * stride + c];
  }
  clear(y, cleared, outputs, stride, channels);
  return true;
}

template <class T>
constexpr UnpoolTable<T> kTable = {kLanes<T>, scatter<T>, rows<T>, plane<T>};

}  // namespace

template <>
const UnpoolTable<float>& unpool_table<float>() {
  return kTable<float>;
}
template <>
const UnpoolTable<double>& unpool_table<double>() {
  return kTable<double>;
}

}  // namespace nnarch::NNARCH_ISA
