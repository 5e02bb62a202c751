#include "cpu/pool.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <list>
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

constexpr int64_t kSmallest = int64_t{16} << 10;   // smaller tensors are malloc's business
constexpr int64_t kMostIdle = int64_t{512} << 20;  // of calls: bytes kept for the next
constexpr int64_t kPage = 4096, kHugePage = int64_t{2} << 20, kSlab = 8 * kHugePage;

thread_local int scopes = 0;
std::atomic<int> first_byte = -1;

// Blocks of less than a huge page share several of these.
struct Slab {
  char* memory;
  int64_t used = 0;   // bytes that were made blocks
  int64_t taken = 0;  // blocks that tensors hold
};

char* system_memory(int64_t alignment, int64_t bytes) {
  void* memory = std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(bytes));
  if (memory == nullptr) throw std::bad_alloc();
  if (alignment == kHugePage) prefer_huge_pages(memory, bytes);
  return static_cast<char*>(memory);
}

// A sanitizer sees no end of a block among others, or of one that is larger than was asked for.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kBlocksApart = true;
#else
constexpr bool kBlocksApart = false;
#endif

class Pool {
 public:
  explicit Pool(int64_t most_idle) : most_idle_(most_idle) {}

  void* take(int64_t wanted) {
    constexpr int64_t line = 64;
    const bool shares = wanted < kHugePage && !kBlocksApart;
    const int64_t grain = kBlocksApart ? line : shares ? kPage : kHugePage;
    const int64_t bytes = round_up(wanted, grain), most = kBlocksApart ? bytes : bytes + bytes / 2;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto fit = idle_.lower_bound(bytes);
      if (fit != idle_.end() && fit->first <= most) {
        const auto [size, block] = *fit;
        idle_.erase(fit);
        idle_bytes_ -= size;
        if (Slab* slab = blocks_.at(block).slab) ++slab->taken;
        return block;
      }
      if (shares) return cut(bytes);
    }
    void* block = system_memory(grain, bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_[block] = {bytes, nullptr};
    return block;
  }

  void give_back(void* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto [size, slab] = blocks_.at(block);
    if (slab) --slab->taken;
    if (slab || idle_bytes_ + size <= most_idle_) {
      idle_.emplace_hint(idle_.lower_bound(size), size, block);  // the last one back serves first
      idle_bytes_ += size;
      if (most_idle_ == 0 && slab->taken == 0) free_idle();
    } else {
      blocks_.erase(block);
      std::free(block);
    }
  }

  int64_t clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return free_idle();
  }

 private:
  // Blocks of a slab go together, or stay for those that need as many bytes.
  int64_t free_idle() {
    int64_t bytes = 0;
    for (auto i = idle_.begin(); i != idle_.end();) {
      const auto [size, block] = *i;
      Slab* slab = blocks_.at(block).slab;
      if (slab && slab->taken > 0) {
        ++i;
        continue;
      }
      if (!slab) std::free(block);
      blocks_.erase(block);
      bytes += size;
      i = idle_.erase(i);
    }
    std::erase_if(slabs_, [](const Slab& slab) {
      if (slab.taken == 0) std::free(slab.memory);
      return slab.taken == 0;
    });
    idle_bytes_ -= bytes;
    return bytes;
  }

  // A new block of the last slab, or of one more.
  void* cut(int64_t bytes) {
    if (slabs_.empty() || slabs_.back().used + bytes > kSlab)
      slabs_.push_back({system_memory(kHugePage, kSlab)});
    Slab& slab = slabs_.back();
    void* block = slab.memory + slab.used;
    slab.used += bytes, ++slab.taken;
    blocks_[block] = {bytes, &slab};
    return block;
  }

  struct Block {
    int64_t bytes;
    Slab* slab;  // or null: a block of its own
  };
  std::mutex mutex_;
  std::multimap<int64_t, void*> idle_;
  std::unordered_map<void*, Block> blocks_;
  std::list<Slab> slabs_;  // stay where they are
  const int64_t most_idle_;
  int64_t idle_bytes_ = 0;
};

// Never destroyed: tensors may die after static destructors have run.
Pool& pool(Held held) {
  static Pool* const of_calls = new Pool(kMostIdle);
  static Pool* const between_calls = new Pool(0);
  return held == Held::in_calls ? *of_calls : *between_calls;
}

}  // namespace

bool pool_serves(int64_t bytes) {
  return scopes > 0 && bytes >= kSmallest && torch_adopts_memory();
}
void* pool_take(int64_t bytes, Held held) {
  void* block = pool(held).take(bytes);
  const int fill = first_byte.load(std::memory_order_relaxed);
  if (fill >= 0) std::memset(block, fill, static_cast<size_t>(bytes));
  return block;
}
void pool_give_back(void* block, Held held) { pool(held).give_back(block); }
int64_t pool_clear() { return pool(Held::in_calls).clear() + pool(Held::between_calls).clear(); }

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
// What the bytes of a new block are, for tests; below 0: whatever they were.
NNARCH_EXPORT void nnarch_pool_fill(int byte) { nnarch::first_byte.store(byte); }
