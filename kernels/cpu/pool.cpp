#include "cpu/pool.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

#include "cpu/tensor.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace nnarch {
namespace {

constexpr int64_t kSmallest = int64_t{256} << 10;  // smaller tensors are malloc's business
constexpr int64_t kMostIdle = int64_t{512} << 20;  // idle bytes kept at most
constexpr int64_t kPage = 4096, kHugePage = int64_t{2} << 20;

thread_local int scopes = 0;

class Pool {
 public:
  void* take(int64_t wanted) {
    const int64_t alignment = wanted < kHugePage ? kPage : kHugePage;
    const int64_t bytes = round_up(wanted, alignment);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto fit = idle_.lower_bound(bytes);
      if (fit != idle_.end() && fit->first <= bytes + bytes / 2) {
        const auto [size, block] = *fit;
        idle_.erase(fit);
        idle_bytes_ -= size;
        return block;
      }
    }
    void* block = std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(bytes));
    if (block == nullptr) throw std::bad_alloc();
    prefer_huge_pages(block, bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    sizes_[block] = bytes;
    return block;
  }

  void give_back(void* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t size = sizes_.at(block);
    if (idle_bytes_ + size <= kMostIdle) {
      idle_.emplace(size, block);
      idle_bytes_ += size;
    } else {
      sizes_.erase(block);
      std::free(block);
    }
  }

  int64_t clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t bytes = idle_bytes_;
    for (const auto& [size, block] : idle_) {
      sizes_.erase(block);
      std::free(block);
    }
    idle_.clear();
    idle_bytes_ = 0;
    return bytes;
  }

 private:
  std::mutex mutex_;
  std::multimap<int64_t, void*> idle_;
  std::unordered_map<void*, int64_t> sizes_;  // of all blocks
  int64_t idle_bytes_ = 0;
};

// Never destroyed: tensors may die after static destructors have run.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

}  // namespace

bool pool_serves(int64_t bytes) {
  return scopes > 0 && bytes >= kSmallest && torch_adopts_memory();
}
void* pool_take(int64_t bytes) { return pool().take(bytes); }
void pool_give_back(void* block) { pool().give_back(block); }
int64_t pool_clear() { return pool().clear(); }

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t page = 4096;
  const auto begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const auto end =
      (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace nnarch

#define NNARCH_EXPORT extern "C" __attribute__((visibility("default")))

// A pooled scope of the calling thread; scopes nest.
NNARCH_EXPORT void nnarch_pool_enter() { ++nnarch::scopes; }
NNARCH_EXPORT void nnarch_pool_leave() { --nnarch::scopes; }
NNARCH_EXPORT int64_t nnarch_pool_clear() { return nnarch::pool_clear(); }
