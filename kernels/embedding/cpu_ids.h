// Indices into tables: tensors of int64 or int32 with any strides, checked once.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/tensor.h"

namespace nnarch {

// The indices in the order in which the tensor is indexed.
class Ids {
 public:
  // Throws `message` unless all of them are at least 0 and below `limit`.
  Ids(const Tensor& t, int64_t limit, const char* message) : count_(t.numel()) {
    const ScalarType type = t.scalar_type();
    require(type == ScalarType::Long || type == ScalarType::Int, message);
    if (type == ScalarType::Long && t.is_contiguous()) {
      data_ = data<int64_t>(t);
    } else if (count_ > 0) {
      own_.reserve(static_cast<size_t>(count_));
      if (type == ScalarType::Long)
        collect(data<int64_t>(t), t, 0);
      else
        collect(data<int32_t>(t), t, 0);
      data_ = own_.data();
    }
    bool outside = false;
    for (int64_t i = 0; i < count_; ++i)
      outside |= static_cast<uint64_t>(data_[i]) >= static_cast<uint64_t>(limit);
    require(!outside, message);
  }
  const int64_t* get() const { return data_; }
  int64_t count() const { return count_; }

 private:
  template <class I>
  void collect(const I* at, const Tensor& t, int64_t d) {
    if (d == t.dim()) return own_.push_back(*at);
    for (int64_t i = 0; i < t.size(d); ++i) collect(at + i * t.stride(d), t, d + 1);
  }

  std::vector<int64_t> own_;
  const int64_t* data_ = nullptr;
  int64_t count_;
};

}  // namespace nnarch
