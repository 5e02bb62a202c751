// What the plain and the normalized LSTM share backwards. For *_isa.cpp files.
#pragma once

#include "cpu/math.h"
#include "recurrent/backward.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
NNARCH_INLINE Vec<T> grad_tanh(Vec<T> x) {
  return tanh<T>(x);
}

template <class T>
struct Gates {
  Vec<T> i, f, g, o;
};

template <class T>
NNARCH_INLINE void add_to(T* sums, int64_t n, Vec<T> v) {
  store_n(sums, load_n(sums, n) + v, n);
}

// The gradients of all gates before their activation, from that of o and that of the cell after the
// step; dc becomes that of the cell before it.
template <class T>
NNARCH_INLINE Gates<T> gates_of_cell(const CellGrad<T>& p, int64_t u, int64_t n,
                                     const Gates<T>& gate, Vec<T> before, Vec<T> c, Vec<T> d_o,
                                     Vec<T>& dc) {
  if (p.peephole) dc += d_o * load_n(p.peephole + 2 * p.hidden + u, n);
  const Gates<T> d{dc * gate.g * gate.i * (T(1) - gate.i), dc * before * gate.f * (T(1) - gate.f),
                   dc * gate.i * (T(1) - gate.g * gate.g), d_o};
  dc *= gate.f;
  if (!p.peephole) return d;
  dc += d.i * load_n(p.peephole + u, n) + d.f * load_n(p.peephole + p.hidden + u, n);
  if (p.peephole_sums) {
    add_to<T>(p.peephole_sums + u, n, d.i * before);
    add_to<T>(p.peephole_sums + p.hidden + u, n, d.f * before);
    add_to<T>(p.peephole_sums + 2 * p.hidden + u, n, d.o * c);
  }
  return d;
}

}  // namespace
}  // namespace nnarch::NNARCH_ISA
