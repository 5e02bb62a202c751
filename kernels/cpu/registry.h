// Registration of native operations with PyTorch's dispatcher.
//
//   NNARCH_OPS(pooling, ops) { ops.impl("max_pool2d", TORCH_BOX(&max_pool2d)); }
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace nnarch {

// The names of all registered operations, each followed by a space.
std::string& registered_ops();

class Registrar {
 public:
  explicit Registrar(torch::stable::detail::StableLibrary& library) : library_(library) {}

  template <class Function>
  Registrar& impl(const char* name, Function boxed) {
    registered_ops().append(name).append(" ");
    library_.impl(name, boxed);
    return *this;
  }

 private:
  torch::stable::detail::StableLibrary& library_;
};

}  // namespace nnarch

#define NNARCH_OPS(family, ops)                        \
  static void register_##family(::nnarch::Registrar&); \
  STABLE_TORCH_LIBRARY_IMPL(nnarch, CPU, library) {    \
    ::nnarch::Registrar registrar(library);            \
    register_##family(registrar);                      \
  }                                                    \
  static void register_##family(::nnarch::Registrar& ops)
