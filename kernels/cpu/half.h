// Half types are storage. A kernel computes in float: a block of such a tensor is widened into
// scratch memory right before it is read, or rounded from there right after it was written, so that
// there is never a float copy of a whole tensor. Other types are read and written in place.
#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>

#include "cpu/arena.h"
#include "cpu/half_kernels.h"
#include "cpu/tensor.h"

namespace nnarch {

inline const HalfTable& half_table(ScalarType type) {
  return NNARCH_SELECT(half_table(type == ScalarType::BFloat16));
}

// A tensor's memory: as it lies, or behind a half type. Null where there is no tensor.
struct Stored {
  char* memory = nullptr;
  const HalfTable* half = nullptr;

  Stored() = default;
  explicit Stored(const Tensor& t)
      : memory(mutable_data<char>(t)),
        half(is_half(t.scalar_type()) ? &half_table(t.scalar_type()) : nullptr) {}
  explicit Stored(const OptTensor& t) : Stored(t ? Stored(*t) : Stored()) {}

  uint16_t* bits() const { return reinterpret_cast<uint16_t*>(memory); }
  template <class T>
  T* at(int64_t element) const {
    return reinterpret_cast<T*>(memory) + element;
  }
};

// `rows` runs of `n` elements, `step` apart in the tensor: what a task reads or writes of it.
struct StoredBlock {
  int64_t first, n, rows = 1, step = 0;
};

template <class T>
class BlockScratch {
 public:
  int64_t step() const { return step_; }

 protected:
  BlockScratch(const Stored& tensor, const StoredBlock& block)
      : tensor_(tensor), block_(block), step_(tensor.half ? block.n : block.step) {
    if (tensor.half)
      values_ = scratch_.emplace(block.rows * block.n).get();
    else if (tensor.memory)
      values_ = tensor.at<T>(block.first);
  }

  Stored tensor_;
  StoredBlock block_;
  std::optional<Scratch<T>> scratch_;
  int64_t step_;
  T* values_ = nullptr;
};

// The values of a block. Nested like scopes (cpu/arena.h).
template <class T>
class Reading : BlockScratch<T> {
 public:
  Reading(const Stored& tensor, const StoredBlock& block) : BlockScratch<T>(tensor, block) {
    if constexpr (std::is_same_v<T, float>)
      for (int64_t r = 0; tensor.half && r < block.rows; ++r)
        tensor.half->widen(tensor.bits() + block.first + r * block.step,
                           this->values_ + r * block.n, block.n);
  }
  const T* get() const { return this->values_; }
  // Where element 0 of the tensor would lie beside the block's first run.
  const T* origin() const { return this->values_ ? this->values_ - this->block_.first : nullptr; }
  using BlockScratch<T>::step;
};

// Room for the values of a block, stored at the end of the scope.
template <class T>
class Writing : BlockScratch<T> {
 public:
  Writing(const Stored& tensor, const StoredBlock& block) : BlockScratch<T>(tensor, block) {}
  ~Writing() {
    const Stored& to = this->tensor_;
    const StoredBlock& b = this->block_;
    if constexpr (std::is_same_v<T, float>)
      for (int64_t r = 0; to.half && r < b.rows; ++r)
        to.half->narrow(this->values_ + r * b.n, to.bits() + b.first + r * b.step, b.n);
  }
  Writing(const Writing&) = delete;
  T* get() const { return this->values_; }
  T* origin() const { return this->values_ - this->block_.first; }
  using BlockScratch<T>::step;
};

// ---------------------------------------------------------------------------------- whole images

// Rows [row, row + rows) of images [image, image + images) of a tensor [N, C, H, W].
struct ImagePart {
  int64_t image, images, row, rows;
};

// The part in float, dense, channels_last where x follows that order and planar elsewhere. x may
// have any strides.
Tensor widened(const Tensor& x, const ImagePart& part);
inline OptTensor widened(const OptTensor& x, const ImagePart& part) {
  return x ? OptTensor(widened(*x, part)) : x;
}

// `from`, a part in float, rounded into the dense tensor y.
void round_into(const Tensor& y, const ImagePart& part, const Tensor& from);

// Calls f(part) for parts that cover `rows` rows of `images` images, one after the other: whole
// images, or rows of one, whose floats have about `most` bytes where a row has `row_bytes`, in
// tasks of its own. Cut by the shape alone. `may_cut`: whether an image may be cut into rows.
template <class F>
void over_image_parts(int64_t images, int64_t rows, int64_t row_bytes, bool may_cut, int64_t most,
                      const F& f) {
  constexpr int64_t unit = 4;  // rows of a Winograd tile
  const int64_t row = row_bytes > 0 ? row_bytes : 1, image = rows * row;
  if (image > most && may_cut && rows > unit) {
    const int64_t fit = most / row > unit ? most / row : unit;
    const int64_t each = round_up(ceil_div(rows, ceil_div(rows, fit)), unit);
    for (int64_t n = 0; n < images; ++n)
      for (int64_t y = 0; y < rows; y += each)
        f(ImagePart{n, 1, y, each < rows - y ? each : rows - y});
    return;
  }
  const int64_t fit = most / image > 1 ? most / image : 1;
  const int64_t each = images > 0 ? ceil_div(images, ceil_div(images, fit)) : 1;
  for (int64_t n = 0; n < images; n += each)
    f(ImagePart{n, each < images - n ? each : images - n, 0, rows});
}

// What the parts of an operation that multiplies, and of one that moves memory, may have: a good
// part of the L3 cache, and half of L2.
inline constexpr int64_t kPartBytes = int64_t{2} << 20, kMemoryPartBytes = int64_t{512} << 10;

}  // namespace nnarch
