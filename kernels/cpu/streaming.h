// Which outputs are written past the caches.
#pragma once

#include <atomic>
#include <cstdint>

namespace nnarch {

// Outputs of this size and more. Depthwise 3×3, 256 channels of 28×28, N 8, 6.4 MB written: 1067 µs
// through the caches, 536 past them, on a machine with 32 MB of last-level cache that others share.
// MobileNetV2 and ResNet-50 take the same time with 4, 6 and 8 MB here, and 2 to 10 % more with no
// streaming at all.
inline constexpr int64_t kStreamBytes = int64_t{6} << 20;

// What is larger than a good part of the last-level cache leaves it anyway before it is read again,
// and a line that is written whole need not be read first: 1.2 times as fast for a 1x1 convolution
// to 26 MB. Smaller outputs serve the next layer better in cache. Rows must begin at cache lines.
template <class T>
bool outgrows_caches(const T* c, int64_t rows, int64_t columns) {
  constexpr int64_t line = 64;
  const int64_t row_bytes = columns * int64_t{sizeof(T)};
  return rows * row_bytes >= kStreamBytes && row_bytes % line == 0 &&
         reinterpret_cast<uintptr_t>(c) % line == 0;
}

// What went past the caches is there before another thread may look. A fence with every few lines
// would take what such writing gains.
inline void finish_past_caches(bool any) {
  if (any) std::atomic_thread_fence(std::memory_order_seq_cst);  // x86: whatever has a lock drains
}

// Input and output of this size together are taken to come from memory, not from a cache.
inline constexpr int64_t kFarBytes = int64_t{16} << 20;

}  // namespace nnarch
