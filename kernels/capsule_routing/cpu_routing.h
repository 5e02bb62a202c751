// What the forward and the backward of capsule routing share: sizes, orders, the squash.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "capsule_routing/cpu_kernels.h"
#include "cpu/arena.h"
#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace nnarch {

// Elements from one sample to the next. The votes of 1152 capsules for 10 × 16 values are 180
// pages: without the padding, all samples of a group would meet in the same sets of the caches.
template <class T>
int64_t padded(int64_t elements) {
  return checked_sum(elements, 5 * kCapsuleBlock<T>);
}

// Samples that share a pass over the weight, at most, and what their votes may take together: they
// are read again from the last-level cache. Four samples of MNIST's CapsNet are 3 MB: eight took
// 2 µs less where all of it was in that cache, but left no room for the rest there (of a training
// step with N 32 backward 6.1 ms instead of 5.8, forward 2.8 instead of 2.6).
inline constexpr int64_t kGroupSamples = 4;
inline constexpr int64_t kGroupBytes = int64_t{8} << 20;

template <class T>
struct Routing {
  int64_t samples, inputs;  // B, I
  CapsuleShape shape;
  int64_t outputs;                          // O·D_out
  int64_t weight_block, x_block, x_sample;  // elements
  int64_t votes_step;                       // between the votes of two samples of a group
  int64_t group;                            // samples that share a pass over the weight

  Routing(const Tensor& x, const Tensor& weight) {
    constexpr int64_t block = kCapsuleBlock<T>;
    samples = x.size(0), inputs = x.size(1);
    const int64_t in = x.size(2), out = weight.size(0), dim = weight.size(2);
    // Capsules without values have no votes.
    shape = {in == 0 ? 0 : ceil_div(inputs, block), in, out, dim};
    outputs = checked_product(out, dim);
    weight_block = checked_product(outputs, checked_product(in, block));
    x_block = checked_product(in, block);
    x_sample = padded<T>(checked_product(shape.blocks, x_block));
    const int64_t votes = checked_product(shape.blocks, checked_product(outputs, block));
    votes_step = padded<T>(votes);
    group = std::clamp<int64_t>(kGroupBytes / (votes_step * int64_t{sizeof(T)}), 1, kGroupSamples);
    checked_product(shape.blocks, weight_block);
    checked_product(group, votes_step);
  }

  int64_t packed_size() const { return shape.blocks * weight_block; }
  // Input capsules in a block.
  int64_t inside(int64_t i) const {
    return std::min(kCapsuleBlock<T>, inputs - i * kCapsuleBlock<T>);
  }
};

// to[column][kBlock] = from[row][columns] for the rows of a block that exist, zero for the others.
template <class T, class Transpose>
void pack_block(const Transpose& transpose, const T* from, int64_t rows, int64_t columns, T* to) {
  constexpr int64_t block = kCapsuleBlock<T>;
  if (rows < block) std::memset(to, 0, static_cast<size_t>(columns * block) * sizeof(T));
  transpose(from, columns, to, block, rows, columns);
}

// From [O, I, D_out, D_in] as it lies: contiguous, or channels_last, which a network becomes as a
// whole. Then input capsules are side by side already.
template <class T>
void pack_weight(const Routing<T>& r, const T* weight, bool channels_last, T* packed) {
  const int64_t row = r.shape.dim * r.shape.in, tile = row * kCapsuleBlock<T>;
  if (row == 0) return;  // capsules without values
  const auto& table = NNARCH_SELECT(routing_table<T>());
  const auto transpose = table.transpose;
  // In the order of the weight's memory, which is then read ahead.
  if (channels_last)
    return parallel_tasks(r.shape.out * row, [&](int64_t task) {
      constexpr int64_t block = kCapsuleBlock<T>;
      const int64_t o = task / row, value = task % row, whole = r.inputs / block;
      const T* const from = weight + task * r.inputs;
      T* const to = packed + o * tile + value * block;
      table.copy_rows(from, block, to, r.weight_block, whole, block, false);
      if (whole == r.shape.blocks) return;
      T* const last = std::copy(from + whole * block, from + r.inputs, to + whole * r.weight_block);
      std::fill(last, to + whole * r.weight_block + block, T{0});
    });
  parallel_tasks(r.shape.out * r.shape.blocks, [&](int64_t task) {
    const int64_t o = task / r.shape.blocks, i = task % r.shape.blocks;
    pack_block(transpose, weight + (o * r.inputs + i * kCapsuleBlock<T>)*row, r.inside(i), row,
               packed + (i * r.shape.out + o) * tile);
  });
}

// A weight in one of the two orders.
inline Tensor in_either_order(const Tensor& weight) {
  return is_channels_last(weight) ? weight : as_contiguous(weight);
}

template <class T>
void check_packed(const Routing<T>& r, const Tensor& weight, const OptTensor& packed) {
  require(!packed || (packed->is_contiguous() && packed->numel() == r.packed_size() &&
                      packed->scalar_type() == weight.scalar_type()),
          "capsule_routing: packed is not what this weight was packed to");
}

// The weight in the order of the kernels: the caller's packed copy, or one in scratch memory.
template <class T>
class PackedWeight {
 public:
  PackedWeight(const Routing<T>& r, const Tensor& weight, const OptTensor& packed)
      : scratch_(packed ? 0 : r.packed_size()) {
    check_packed(r, weight, packed);
    if (packed) {
      get_ = data<T>(*packed);
    } else {
      const Tensor w = in_either_order(weight);
      pack_weight(r, data<T>(w), !w.is_contiguous(), scratch_.get());
      get_ = scratch_.get();
    }
  }
  const T* get() const { return get_; }

 private:
  Scratch<T> scratch_;
  const T* get_;
};

// A sample's [I, D_in] in blocks.
template <class T>
void pack_sample(const Routing<T>& r, const T* x, T* packed) {
  const int64_t in = r.shape.in;
  for (int64_t i = 0; i < r.shape.blocks; ++i)
    pack_block(transpose_fn<T>(), x + i * kCapsuleBlock<T> * in, r.inside(i), in,
               packed + i * r.x_block);
}

// v = s·|s| / (1 + |s|²) for each output capsule.
template <class T>
void squash_capsules(const CapsuleShape& shape, const T* s, T* v) {
  for (int64_t o = 0; o < shape.out; ++o, s += shape.dim, v += shape.dim) {
    T energy{0};
    for (int64_t d = 0; d < shape.dim; ++d) energy += s[d] * s[d];
    const T scale = std::sqrt(energy) / (1 + energy);
    for (int64_t d = 0; d < shape.dim; ++d) v[d] = s[d] * scale;
  }
}

// The gradient of s from that of v.
template <class T>
void squash_capsules_grad(const CapsuleShape& shape, const T* dv, const T* s, T* ds) {
  for (int64_t o = 0; o < shape.out; ++o, s += shape.dim, dv += shape.dim, ds += shape.dim) {
    T energy{0}, dot{0};
    for (int64_t d = 0; d < shape.dim; ++d) energy += s[d] * s[d], dot += s[d] * dv[d];
    const T norm = std::sqrt(energy), factor = 1 + energy;
    // In this order no factor leaves the range of T as long as the energy does not.
    const T along = norm == 0 ? T{0} : dot / norm * ((1 - energy) / factor) / factor;
    for (int64_t d = 0; d < shape.dim; ++d) ds[d] = dv[d] * (norm / factor) + s[d] * along;
  }
}

inline void check_capsules(const char* op, const Tensor& x, const Tensor& weight) {
  require(x.dim() == 3 && weight.dim() == 4 && x.size(1) == weight.size(1) &&
              x.size(2) == weight.size(3) && x.scalar_type() == weight.scalar_type(),
          op);
}

}  // namespace nnarch
