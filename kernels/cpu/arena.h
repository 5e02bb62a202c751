// Scratch memory of the calling thread: taken once, more when needed, given back with the thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/pool.h"

namespace nnarch {

// A stack of 64-byte aligned buffers. `Scratch` objects of one thread nest like scopes.
class Arena {
 public:
  static Arena& mine() {
    thread_local Arena arena;
    return arena;
  }

  ~Arena() {
    for (Block& block : blocks_) free(block);
  }

  void* take(int64_t bytes) {
    if (depth_ == blocks_.size()) blocks_.push_back({nullptr, 0});
    Block& block = blocks_[depth_];
    if (block.bytes < bytes) {
      free(block);
      block = {nullptr, 0};
      block = {pool_take(bytes, Held::between_calls), bytes};
    }
    ++depth_;
    return block.memory;
  }

  void give_back() { --depth_; }

 private:
  struct Block {
    void* memory;
    int64_t bytes;
  };
  static void free(const Block& block) {
    if (block.memory) pool_give_back(block.memory, Held::between_calls);
  }
  std::vector<Block> blocks_;
  std::size_t depth_ = 0;
};

// `count` elements of T, uninitialised, until the end of the scope.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(Arena::mine().take(count * static_cast<int64_t>(sizeof(T)) + 64))) {}
  ~Scratch() { Arena::mine().give_back(); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace nnarch
