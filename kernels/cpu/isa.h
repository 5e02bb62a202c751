// The instruction sets that the SIMD sources are compiled for, and which one runs.
#pragma once

namespace nnarch {

enum class Isa { generic, avx2, avx512 };

// The best set that this CPU has, or the one that NNARCH_ISA names. Chosen once.
// Throws where NNARCH_ISA names an unknown set or one that this CPU lacks.
Isa isa();
const char* isa_name();

}  // namespace nnarch

// Declares something once in the namespace of every instruction set:
//   NNARCH_PER_ISA(template <class T> const GemmTable<T>& gemm_table();)
// and picks the one that runs:
//   const auto& table = NNARCH_SELECT(gemm_table<float>());
#ifdef NNARCH_X86
#define NNARCH_PER_ISA(...) \
  namespace generic {       \
  __VA_ARGS__               \
  }                         \
  namespace avx2 {          \
  __VA_ARGS__               \
  }                         \
  namespace avx512 {        \
  __VA_ARGS__               \
  }
#define NNARCH_SELECT(...)                                                  \
  (::nnarch::isa() == ::nnarch::Isa::avx512 ? ::nnarch::avx512::__VA_ARGS__ \
   : ::nnarch::isa() == ::nnarch::Isa::avx2 ? ::nnarch::avx2::__VA_ARGS__   \
                                            : ::nnarch::generic::__VA_ARGS__)
#else
#define NNARCH_PER_ISA(...) \
  namespace generic {       \
  __VA_ARGS__               \
  }
#define NNARCH_SELECT(...) (::nnarch::generic::__VA_ARGS__)
#endif
