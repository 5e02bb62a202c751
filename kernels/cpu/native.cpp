// The plain C functions that nnarch/library.py reads, and the list of operations.
#include <cstdint>

#include "cpu/calibrate.h"
#include "cpu/isa.h"
#include "cpu/registry.h"
#include "cpu/tensor.h"

// GCC's <memory> asks glibc >= 2.32 for this variable, and torch's own wheels run on 2.28. With one
// of our own, which says "there are threads", the library loads there too.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

#define NNARCH_EXPORT extern "C" __attribute__((visibility("default")))

namespace nnarch {
namespace {
thread_local const char* last_algorithm = "";
}
void set_algorithm(const char* name) { last_algorithm = name; }
}  // namespace nnarch

NNARCH_EXPORT const char* nnarch_isa() {
  try {
    return nnarch::isa_name();
  } catch (const std::exception&) {
    return "";
  }
}

// The algorithm of the last operation of the calling thread; reading it clears it.
NNARCH_EXPORT const char* nnarch_last_algorithm() {
  const char* name = nnarch::last_algorithm;
  nnarch::last_algorithm = "";
  return name;
}

namespace nnarch {
std::string& registered_ops() {
  static std::string names;
  return names;
}
std::vector<BoxedOp>& boxed_ops() {
  static std::vector<BoxedOp> ops;
  return ops;
}
}  // namespace nnarch

NNARCH_EXPORT const char* nnarch_native_ops() { return nnarch::registered_ops().c_str(); }

// What one core of this machine can do, measured in the calling thread.
NNARCH_EXPORT double nnarch_peak_flops() { return NNARCH_SELECT(measure_flops()); }
// Bytes per second of a sequential read of `bytes` bytes, repeated over the same buffer.
NNARCH_EXPORT double nnarch_read_bandwidth(int64_t bytes) {
  return NNARCH_SELECT(measure_read_bandwidth(bytes));
}
