// What the entry points do with their tensors.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/dense.h"
#include "cpu/layout.h"
#include "cpu/tensor.h"

namespace nnarch {

// [rows][n] whose rows are dense; the rows may lie apart.
inline Tensor dense_rows(const Tensor& t) {
  return t.stride(1) == 1 && t.stride(0) >= t.size(1) ? t : as_contiguous(t);
}

inline OptTensor dense(const OptTensor& t) {
  return t ? OptTensor(as_contiguous(to_compute_type(*t))) : t;
}

// A vector of class indices, of any stride.
class Indices {
 public:
  explicit Indices(const Tensor& t) : tensor_(t) {
    if (t.stride(0) == 1 || t.size(0) <= 1) return;
    copy_.resize(static_cast<size_t>(t.size(0)));
    const int64_t* from = data<int64_t>(t);
    for (size_t i = 0; i < copy_.size(); ++i)
      copy_[i] = from[static_cast<int64_t>(i) * t.stride(0)];
  }
  const int64_t* get() const { return copy_.empty() ? data<int64_t>(tensor_) : copy_.data(); }

 private:
  Tensor tensor_;
  std::vector<int64_t> copy_;
};

inline bool is_vector(const OptTensor& t, int64_t n, ScalarType type) {
  return !t || (t->dim() == 1 && t->size(0) == n && t->scalar_type() == type);
}

// Class weights come in the type that is computed in.
inline bool is_class_weight(const OptTensor& t, int64_t n, ScalarType type) {
  return is_vector(t, n, is_half(type) ? ScalarType::Float : type);
}

inline void zero(const Tensor& t) {
  with_scalar_type(t.scalar_type(), "zero", [&](auto scalar) {
    using T = decltype(scalar);
    if (t.numel() > 0) std::fill_n(mutable_data<T>(t), t.numel(), T{0});
  });
}

}  // namespace nnarch
