#include "cpu/machine.h"

#include <atomic>
#include <fstream>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace nnarch {
namespace {

std::atomic<Precision> chosen_precision = Precision::high;
// What tests ask for in place of this machine; 0: nothing.
std::atomic<int64_t> pretended_l2 = 0;
enum Distance : int64_t { kReal, kNear, kFar };
std::atomic<int64_t> pretended_l3 = kReal;

// What Linux says of the first core's cache; sysconf(3) adds up the caches of several cores on some
// machines.
int64_t reported_or(int index, int64_t usual) {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
  int64_t size = 0;
  char unit = 'K';
  if (!(file >> size >> unit) || size <= 0) return usual;
  return size << (unit == 'M' ? 20 : 10);
}

}  // namespace

int64_t l2_bytes() {
  static const int64_t bytes = reported_or(2, int64_t{512} << 10);
  const int64_t pretended = pretended_l2.load(std::memory_order_relaxed);
  return pretended > 0 ? pretended : bytes;
}

int64_t l3_bytes() {
  static const int64_t bytes = reported_or(3, int64_t{8} << 20);
  return bytes;
}

bool far_l3() {
  const int64_t pretended = pretended_l3.load(std::memory_order_relaxed);
  if (pretended != kReal) return pretended == kFar;
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool far = __builtin_cpu_is("intel");
  return far;
#else
  return false;
#endif
}

bool fast_gathers() {
  const int64_t pretended = pretended_l3.load(std::memory_order_relaxed);
  if (pretended != kReal) return pretended == kFar;
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool fast = [] {
    constexpr unsigned sapphire_rapids = 0x8f;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__builtin_cpu_is("intel") || !__get_cpuid(1, &a, &b, &c, &d)) return false;
    const unsigned family = a >> 8 & 0xf, model = (a >> 4 & 0xf) | (a >> 12 & 0xf0);
    return family > 6 || (family == 6 && model >= sapphire_rapids);
  }();
  return fast;
#else
  return false;
#endif
}

double read_cost(double bytes, double lanes) {
  // Bytes that come during an FMA of one lane: from the last-level cache, far or not, or memory.
  constexpr double near = 1, far = 0.2, memory = 0.4;
  if (bytes < double(l2_bytes()) * 0.4) return 0;
  if (far_l3()) return bytes / (lanes * far);
  // What is read in turn and does not stay as a whole has left before it comes again.
  return bytes / (lanes * (bytes <= double(l3_bytes()) * 0.75 ? near : memory));
}

Precision precision() { return chosen_precision.load(std::memory_order_relaxed); }

}  // namespace nnarch

extern "C" __attribute__((visibility("default"))) void nnarch_set_precision(int64_t level) {
  nnarch::chosen_precision.store(static_cast<nnarch::Precision>(level), std::memory_order_relaxed);
}

// For tests: choices as on a machine with this second-level cache, whose last level is near (1) or
// far (2, and gathers are fast); 0 is what this machine has.
extern "C" __attribute__((visibility("default"))) void nnarch_pretend_machine(int64_t l2,
                                                                              int64_t l3_distance) {
  nnarch::pretended_l2.store(l2, std::memory_order_relaxed);
  nnarch::pretended_l3.store(l3_distance, std::memory_order_relaxed);
}
