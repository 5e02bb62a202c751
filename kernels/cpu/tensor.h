// What native entry points do with tensors: checks, dtypes, memory formats. Stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace nnarch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using IntList = std::vector<int64_t>;

// Python's check functions turn this into the precise ValueError or TypeError.
template <class... Parts>
void require(bool holds, const char* message) {
  if (!holds) [[unlikely]]
    throw std::runtime_error(message);
}

// Python puts the operation's name before it (nnarch/library.py).
constexpr const char* kSizeOverflow = "size overflows int64";

// a*b where both are sizes; throws where the product leaves int64.
inline int64_t checked_product(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) throw std::runtime_error(kSizeOverflow);
  return product;
}

// a+b likewise.
inline int64_t checked_sum(int64_t a, int64_t b) {
  int64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) throw std::runtime_error(kSizeOverflow);
  return sum;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline bool is_half(ScalarType type) {
  return type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline ScalarType compute_type(ScalarType type) { return is_half(type) ? ScalarType::Float : type; }

// Calls f with a float or a double (its value means nothing); half types compute as float.
template <class F>
auto with_scalar_type(ScalarType type, const char* op, const F& f) {
  if (type == ScalarType::Float || is_half(type)) return f(float{});
  if (type == ScalarType::Double) return f(double{});
  throw std::runtime_error(std::string(op) + ": dtype must be floating point");
}

// An uninitialised tensor: large ones from the pool or on huge pages. (new_tensor.cpp)
Tensor new_strided(const IntList& sizes, const IntList& strides, ScalarType type);
// [size], for packed weights, among others of their kind (pool.h).
Tensor new_packed(int64_t size, ScalarType type);

inline IntList contiguous_strides(const IntList& sizes) {
  IntList strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step = checked_product(step, sizes[d] > 1 ? sizes[d] : 1);
  }
  return strides;
}

inline IntList channels_last_strides(const IntList& s) {
  int64_t step = 1;
  IntList strides(4);
  for (int d : {1, 3, 2, 0}) {
    strides[d] = step;
    step = checked_product(step, s[d] > 1 ? s[d] : 1);
  }
  return strides;
}

inline IntList sizes_of(const Tensor& t) {
  const auto s = t.sizes();
  return IntList(s.begin(), s.end());
}

// Whether a 4-D tensor lies dense in memory in the order n, h, w, c.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// The memory format of an output that follows `t` (the rule of nnarch.library.output_format).
inline bool follows_channels_last(const Tensor& t) {
  return t.dim() == 4 && !t.is_contiguous() && is_channels_last(t);
}

// Whether strides tell of channels_last, those of size 1 among them: an image of one channel or of
// one pixel is dense both ways. (torch's suggest_memory_format.)
inline bool looks_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.stride(1) == 0) return false;
  int64_t least = 0;
  for (int d : {1, 3, 2, 0}) {
    const int64_t size = t.size(d), stride = t.stride(d);
    if (size == 0 || stride < least || (d == 0 && least == t.stride(1))) return false;
    least = stride * (size > 1 ? size : 1);
  }
  return true;
}

// The same of a convolution's output: where x is dense both ways, its weight decides.
inline bool follows_channels_last(const Tensor& x, const Tensor& weight) {
  return x.is_contiguous() && is_channels_last(x) ? looks_channels_last(weight)
                                                  : follows_channels_last(x);
}

// Whether a 4-D tensor lies dense in memory channel by channel, and no other way.
inline bool is_planar(const Tensor& t) { return t.is_contiguous() && !is_channels_last(t); }

inline Tensor new_contiguous(const IntList& sizes, ScalarType type) {
  return new_strided(sizes, contiguous_strides(sizes), type);
}
inline Tensor new_channels_last(const IntList& sizes, ScalarType type) {
  return new_strided(sizes, channels_last_strides(sizes), type);
}

// `t` in the type that kernels compute in: half types become float, others stay. A float copy of a
// whole tensor: for small ones, and where cpu/half.h's blocks do not serve yet. (half.cpp)
Tensor to_compute_type(const Tensor& t);
inline OptTensor to_compute_type(const OptTensor& t) {
  return t ? OptTensor(to_compute_type(*t)) : t;
}
// Back to the type of the caller's input.
Tensor to_type(const Tensor& t, ScalarType type);

// Copies of any strides into the two dense orders; a tensor that already has the order is returned
// as it is. (layout.cpp)
Tensor as_channels_last(const Tensor& t);
Tensor as_contiguous(const Tensor& t);
// The result of a channels_last computation in the memory format of `like`.
Tensor in_format_of(const Tensor& result, const Tensor& like);
// A scope in which in_format_of leaves results as they are, on the calling thread: a program's
// first convolution takes an image in any format, and the rest of the program wants channels_last.
class StayChannelsLast {
 public:
  StayChannelsLast();
  ~StayChannelsLast();
  static bool holds();
};

template <class T>
T* mutable_data(const Tensor& t) {
  void* memory = t.data_ptr();
  // Sharded training frees the storage of parameters that it has sent away.
  if (!memory && t.numel() > 0) [[unlikely]]
    throw std::runtime_error("a tensor's memory has been freed (its storage has size 0)");
  return static_cast<T*>(memory);
}
template <class T>
const T* data(const Tensor& t) {
  return mutable_data<T>(t);
}

// The algorithm that ran last on this thread, for nnarch.trace(): a string literal.
void set_algorithm(const char* name);

}  // namespace nnarch
