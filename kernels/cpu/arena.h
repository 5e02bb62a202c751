// Scratch memory of the calling thread: allocated once, grown when needed, freed with the thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace nnarch {

// A stack of 64-byte aligned buffers. `Scratch` objects of one thread nest like scopes.
class Arena {
 public:
  static Arena& mine() {
    thread_local Arena arena;
    return arena;
  }

  ~Arena() {
    for (Block& block : blocks_) std::free(block.memory);
  }

  void* take(int64_t bytes) {
    if (depth_ == blocks_.size()) blocks_.push_back({nullptr, 0});
    Block& block = blocks_[depth_];
    if (block.bytes < bytes) {
      std::free(block.memory);
      block = {nullptr, 0};
      const int64_t rounded = (bytes + 4095) / 4096 * 4096;
      block.memory = std::aligned_alloc(4096, static_cast<size_t>(rounded));
      if (block.memory == nullptr) throw std::bad_alloc();
      block.bytes = rounded;
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
  std::vector<Block> blocks_;
  size_t depth_ = 0;
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
