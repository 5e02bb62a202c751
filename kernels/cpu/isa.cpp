#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace nnarch {
namespace {

bool supported(Isa set) {
#ifdef NNARCH_X86
  // What the flags in CMakeLists.txt let the compiler emit; a virtual machine may hide any of it.
  // (F16C, also among them, is emitted for half types only, which no kernel has.)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  if (set == Isa::avx2) return avx2;
  if (set == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return set == Isa::generic;
}

Isa choose() {
  const char* forced = std::getenv("NNARCH_ISA");
  for (Isa set : {Isa::avx512, Isa::avx2, Isa::generic}) {
    const char* name = set == Isa::avx512 ? "avx512" : set == Isa::avx2 ? "avx2" : "generic";
    if (forced == nullptr || *forced == '\0') {
      if (supported(set)) return set;
    } else if (std::string(forced) == name) {
      if (supported(set)) return set;
      throw std::runtime_error(std::string("NNARCH_ISA=") + forced + ": this CPU lacks it");
    }
  }
  throw std::runtime_error(std::string("NNARCH_ISA must be generic, avx2 or avx512, got ") +
                           (forced ? forced : ""));
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}

}  // namespace nnarch
