// Registration of native operations with PyTorch's dispatcher.
//
//   NNARCH_OPS(pooling, ops) { ops.impl("max_pool2d", TORCH_BOX(&max_pool2d)); }
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>
#include <vector>

namespace nnarch {

// The names of all registered operations, each followed by a space, and their functions.
using BoxedOp = void (*)(StableIValue* stack, uint64_t arguments, uint64_t outputs);
std::string& registered_ops();
std::vector<BoxedOp>& boxed_ops();

class Registrar {
 public:
  explicit Registrar(torch::stable::detail::StableLibrary& library) : library_(library) {}

  template <class Function>
  Registrar& impl(const char* name, Function boxed) {
    registered_ops().append(name).append(" ");
    boxed_ops().push_back(boxed);
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
