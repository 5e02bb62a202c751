// The activation kernels of one instruction set, over runs of n elements.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

template <class T>
struct ActivationTable {
  void (*forward)(const T* x, T* y, int64_t n, int64_t code, T alpha);
  void (*grad)(const T* grad, const T* saved, T* out, int64_t n, int64_t code, T alpha);
  void (*grad_grad)(const T* gradgrad, const T* grad, const T* saved, T* out, int64_t n,
                    int64_t code, T alpha);
  // y = act(gate)·value, and its two gradients.
  void (*gate)(const T* gate, const T* value, T* y, int64_t n, int64_t code, T alpha);
  void (*gate_grad)(const T* grad, const T* gate, const T* value, T* d_gate, T* d_value, int64_t n,
                    int64_t code, T alpha);
};

NNARCH_PER_ISA(template <class T> const ActivationTable<T>& activation_table();)

}  // namespace nnarch
