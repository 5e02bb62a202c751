// Upsampling of planes: vectors lie along rows. Rows are combined first; what a vector of outputs
// needs of them is then picked out of one or two vectors by a permutation. For *_isa.cpp files.
#pragma once

#include "cpu/simd.h"
#include "upsample/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {

template <class T>
struct LaneVector {
  typedef typename LaneOf<T>::Type V
      __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};

// A vector's worth of lane indices, ready to pick from rows.
template <class T, Reach reach>
class Picker {
 public:
  using Lane = typename LaneOf<T>::Type;
  NNARCH_INLINE explicit Picker(const Lane* lanes)
      : lanes_(lanes), v_(*reinterpret_cast<const typename LaneVector<T>::V*>(lanes)) {}

  NNARCH_INLINE Vec<T> operator()(const T* p) const {
    if constexpr (reach != Reach::any) {
#if defined(NNARCH_ISA_avx512)
      const Vec<T> a = load(p);
      if constexpr (sizeof(T) == 4) {
        if constexpr (reach == Reach::one)
          return (Vec<T>)_mm512_permutexvar_ps((__m512i)v_, (__m512)a);
        return (Vec<T>)_mm512_permutex2var_ps((__m512)a, (__m512i)v_, (__m512)load(p + kLanes<T>));
      } else {
        if constexpr (reach == Reach::one)
          return (Vec<T>)_mm512_permutexvar_pd((__m512i)v_, (__m512d)a);
        return (Vec<T>)_mm512_permutex2var_pd((__m512d)a, (__m512i)v_,
                                              (__m512d)load(p + kLanes<T>));
      }
#elif defined(NNARCH_ISA_avx2)
      if constexpr (sizeof(T) == 4) {
        const __m256 a = _mm256_permutevar8x32_ps((__m256)load(p), (__m256i)v_);
        if constexpr (reach == Reach::one) return (Vec<T>)a;
        const __m256 b = _mm256_permutevar8x32_ps((__m256)load(p + kLanes<T>), (__m256i)v_);
        return (Vec<T>)_mm256_blendv_ps(a, b, (__m256)_mm256_slli_epi32((__m256i)v_, 28));
      }
#endif
    }
    Vec<T> v;
    for (int l = 0; l < kLanes<T>; ++l) v[l] = p[lanes_[l]];
    return v;
  }

 private:
  const Lane* lanes_;
  typename LaneVector<T>::V v_;
};

template <Reach value>
struct ReachIs {
  static constexpr Reach reach = value;
};

template <class F>
NNARCH_INLINE void with_reach(Reach reach, const F& f) {
  if (reach == Reach::one) return f(ReachIs<Reach::one>{});
  if (reach == Reach::two) return f(ReachIs<Reach::two>{});
  return f(ReachIs<Reach::any>{});
}

// Past the caches where dst is aligned.
template <class T>
NNARCH_INLINE void stream_row(const T* src, int64_t n, T* dst) {
  constexpr int64_t w = kLanes<T>;
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(dst) % kVectorBytes);
  int64_t i = past ? (kVectorBytes - past) / static_cast<int64_t>(sizeof(T)) : 0;
  if (i > n) i = n;
  if (i > 0) store_n(dst, load_n(src, i), i);
  for (; i + w <= n; i += w) stream(dst + i, load(src + i));
  if (i < n) store_n(dst + i, load_n(src + i, n - i), n - i);
}

// to[i] = f(i, lanes) for the elements of a row; to has room for whole vectors.
template <class T, class F>
NNARCH_INLINE void fill_row(T* to, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(to + i, f(i, kLanes<T>));
  if (i < n) store(to + i, f(i, n - i));
}

// A row of outputs, picked from `row`, and its copies at to, to + outputs and so on before `end`.
// (What the tables hold is in registers here; behind references it was read anew after each store.)
template <class T, Reach reach>
NNARCH_INLINE void pick_row(const T* row, const int64_t* base, const typename LaneOf<T>::Type* lane,
                            int64_t outputs, T* to, const T* end) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t j = 0;
  for (; j + lanes <= outputs; j += lanes, lane += lanes) {
    const Vec<T> v = Picker<T, reach>(lane)(row + *base++);
    for (T* at = to + j; at < end; at += outputs) store(at, v);
  }
  if (j == outputs) return;
  const Vec<T> v = Picker<T, reach>(lane)(row + *base);
  for (T* at = to + j; at < end; at += outputs) store_n(at, v, outputs - j);
}

// Rows are picked from where they lie. In the last of a plane a vector might end past the tensor:
// these are copied first, which costs 20 cycles a row (kRowsTogether).
template <class T>
void nearest_planes(const T* x, const Sources<T>& h, const Columns<T>& w, int64_t from, int64_t to,
                    T* scratch, T* y, bool past_caches) {
  const int64_t inputs = w.inputs, outputs = w.outputs, *first = h.first, *base = w.base0;
  const auto* const lane = w.lane0;
  T* const wide = scratch + kRowsTogether * input_pitch(w);
  const T* const plane_end = x + h.inputs * inputs;
  with_reach(w.reach, [&](auto r) NNARCH_INLINE_LAMBDA {
    for (int64_t i = from; i < to;) {
      int64_t end = i + 1;  // of the rows that copy the same one
      while (end < to && first[end] == first[i]) ++end;
      const T* row = x + first[i] * inputs;
      if (plane_end - row < inputs + 2 * kLanes<T>) {
        fill_row(scratch, inputs, [&](int64_t j, int64_t n) { return load_n(row + j, n); });
        row = scratch;
      }
      if (past_caches) {
        pick_row<T, r.reach>(row, base, lane, outputs, wide, wide + outputs);
        for (int64_t k = i; k < end; ++k) stream_row(wide, outputs, y + k * outputs);
      } else {
        pick_row<T, r.reach>(row, base, lane, outputs, y + i * outputs, y + end * outputs);
      }
      i = end;
    }
  });
  if (past_caches) finish_streaming();
}

template <class T>
void bilinear_planes(const T* x, const Sources<T>& h, const Columns<T>& w, int64_t from, int64_t to,
                     T* scratch, T* y, bool past_caches) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t pitch = input_pitch(w), wide_pitch = output_pitch(w);
  T* wide = scratch + kRowsTogether * pitch;
  with_reach(w.reach, [&](auto reach) NNARCH_INLINE_LAMBDA {
    for (int64_t i = from; i < to; i += kRowsTogether) {
      const int64_t rows = to - i < kRowsTogether ? to - i : kRowsTogether;
      for (int64_t r = 0; r < rows; ++r) {
        const T *a = x + h.first[i + r] * w.inputs, *b = x + h.second[i + r] * w.inputs;
        const Vec<T> w0 = broadcast(h.w0[i + r]), w1 = broadcast(h.w1[i + r]);
        fill_row(scratch + r * pitch, w.inputs, [&](int64_t j, int64_t n) NNARCH_INLINE_LAMBDA {
          return load_n(a + j, n) * w0 + load_n(b + j, n) * w1;
        });
      }
      for (int64_t j = 0, b = 0; j < w.outputs; j += lanes, ++b) {
        const Picker<T, reach.reach> left(w.lane0 + j), right(w.lane1 + j);
        const Vec<T> w0 = load(w.w0 + j), w1 = load(w.w1 + j);
        const int64_t n = w.outputs - j < lanes ? w.outputs - j : lanes;
        for (int64_t r = 0; r < rows; ++r) {
          const T* p = scratch + r * pitch;
          const Vec<T> v = left(p + w.base0[b]) * w0 + right(p + w.base1[b]) * w1;
          if (past_caches)
            store(wide + r * wide_pitch + j, v);
          else
            store_n(y + (i + r) * w.outputs + j, v, n);
        }
      }
      for (int64_t r = 0; r < rows && past_caches; ++r)
        stream_row(wide + r * wide_pitch, w.outputs, y + (i + r) * w.outputs);
    }
  });
  if (past_caches) finish_streaming();
}

template <class T>
void spread_planes(const T* grad, const Spread<T>& h, const Columns<T>& w, int64_t from, int64_t to,
                   T* scratch, T* dx) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t pitch = input_pitch(w);
  with_reach(w.reach, [&](auto reach) NNARCH_INLINE_LAMBDA {
    for (int64_t i = from; i < to; i += kRowsTogether) {
      const int64_t rows = to - i < kRowsTogether ? to - i : kRowsTogether;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t first = h.start[i + r], count = h.end[i + r] - first;
        const T *p = grad + first * w.inputs, *weight = h.weight + h.at[i + r];
        fill_row(scratch + r * pitch, w.inputs, [&](int64_t j, int64_t n) NNARCH_INLINE_LAMBDA {
          Vec<T> sum{};
          for (int64_t k = 0; k < count; ++k) sum += load_n(p + k * w.inputs + j, n) * weight[k];
          return sum;
        });
      }
      for (int64_t j = 0, b = 0; j < w.outputs; j += lanes, ++b) {
        const Picker<T, reach.reach> pick(w.lane0 + j);
        const T* weights = w.w0 + j * w.taps;
        const int64_t n = w.outputs - j < lanes ? w.outputs - j : lanes;
        for (int64_t r = 0; r < rows; ++r) {
          const T* p = scratch + r * pitch + w.base0[b];
          Vec<T> sum{};
          for (int64_t k = 0; k < w.taps; ++k) {
            const Vec<T> weight = load(weights + k * lanes), none{};
            sum += weight == none ? none
                                  : pick(p + k * w.step) * weight;  // what lies there is no source
          }
          store_n(dx + (i + r) * w.outputs + j, sum, n);
        }
      }
    }
  });
}

}  // namespace nnarch::NNARCH_ISA
