// The epilogue on vectors: scale, shift, residual, activation. For *_isa.cpp files.
#pragma once

#include "cpu/activation.h"
#include "cpu/epilogue.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {

// none, relu and relu6 are one clamp; the bounds of `none` change nothing.
template <class T>
struct ClampBounds {
  Vec<T> low, high;
  explicit ClampBounds(int64_t activation)
      : low(broadcast<T>(activation == kNone ? -static_cast<T>(__builtin_huge_val()) : T{0})),
        high(broadcast<T>(activation == kRelu6 ? T{6} : static_cast<T>(__builtin_huge_val()))) {}
};

NNARCH_INLINE bool is_clamp(int64_t activation) { return activation <= kRelu6; }

// A tile of two vectors a row, in registers: all of the epilogue but an activation that is no
// clamp. offset[i] is where row i of the residual starts; `columns` are valid.
template <class T, int... I>
NNARCH_INLINE void apply_epilogue(Indices<I...>, const Epilogue<T>& e, const int64_t* offset,
                                  int64_t columns, Vec<T>* left, Vec<T>* right) {
  constexpr int w = kLanes<T>;
  if (e.scale) {
    const Vec<T> s0 = load(e.scale), s1 = load(e.scale + w);
    ((left[I] *= s0, right[I] *= s1), ...);
  }
  if (e.shift) {
    const Vec<T> s0 = load(e.shift), s1 = load(e.shift + w);
    ((left[I] += s0, right[I] += s1), ...);
  }
  if (e.residual && columns >= 2 * w) {
    ((left[I] += load(e.residual + offset[I]), right[I] += load(e.residual + offset[I] + w)), ...);
  } else if (e.residual) {
    const int64_t n0 = columns < w ? columns : w, n1 = columns > w ? columns - w : 0;
    ((left[I] += load_n(e.residual + offset[I], n0),
      right[I] += load_n(e.residual + offset[I] + w, n1)),
     ...);
  }
  if (e.activation == kRelu) {
    const Vec<T> zero{};
    ((left[I] = at_least<T>(left[I], zero), right[I] = at_least<T>(right[I], zero)), ...);
  } else if (e.activation == kRelu6) {
    const ClampBounds<T> bounds(e.activation);
    ((left[I] = clamp<T>(left[I], bounds.low, bounds.high),
      right[I] = clamp<T>(right[I], bounds.low, bounds.high)),
     ...);
  }
}

// The other activations, from a tile of dense rows of two vectors to the output. Both vectors of a
// row go through together: one alone waits for itself.
template <class T>
NNARCH_NOINLINE void activate_tile(const Epilogue<T>& e, const T* tile, T* c, const int64_t* offset,
                                   int rows, int64_t columns, bool past_caches) {
  constexpr int w = kLanes<T>;
  const int64_t n0 = columns < w ? columns : w, n1 = columns > w ? columns - w : 0;
  with_activation(e.activation, [&](auto kind) {
    for (int i = 0; i < rows; ++i, tile += 2 * w) {
      T* to = c + offset[i];
      const Vec<T> y0 = activate_as<T, kind.code>(load(tile), e.alpha);
      const Vec<T> y1 = activate_as<T, kind.code>(load(tile + w), e.alpha);
      if (past_caches && columns >= 2 * w) {
        stream(to, y0);
        stream(to + w, y1);
      } else {
        store_n(to, y0, n0);
        store_n(to + w, y1, n1);
      }
    }
  });
}

// A dense row of n sums that are already in y. The residual is read from `offset` on. Scale and
// shift are read up to n only.
template <class T>
NNARCH_INLINE void finish_row(const Epilogue<T>& e, int64_t offset, int64_t n, T* y) {
  constexpr int w = kLanes<T>;
  if (!e.scale && !e.shift && !e.residual && e.activation == kNone) return;
  for (int64_t j = 0; j < n; j += w) {
    const int64_t count = n - j < w ? n - j : w;
    Vec<T> v = load_n(y + j, count);
    if (e.scale) v *= load_n(e.scale + j, count);
    if (e.shift) v += load_n(e.shift + j, count);
    if (e.residual) v += load_n(e.residual + offset + j, count);
    store_n(y + j, activate<T>(v, e.activation, e.alpha), count);
  }
}

}  // namespace nnarch::NNARCH_ISA
