// Logits [N, C] and [N, C, L] in the order that they lie in memory, and the walk over them.
#pragma once

#include <algorithm>

#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cross_entropy/cpu_loss.h"

namespace nnarch {

// `rows`: the classes of a position lie side by side. `planes`: the positions of a class do.
// `turned`: [N, C] whose samples do. Of the given tensor's strides alone:
// kernels/cross_entropy/op.py has the same rule for the gradient.
enum class Order { rows, planes, turned };

inline Order order_of(const Tensor& x) {
  if (x.dim() == 2) return x.stride(0) == 1 && x.stride(1) != 1 ? Order::turned : Order::rows;
  return x.stride(1) == 1 ? Order::rows : Order::planes;
}

inline IntList strides_in(Order order, const IntList& s) {
  if (s.size() == 2) return order == Order::turned ? IntList{1, s[0]} : IntList{s[1], 1};
  const int64_t all = checked_product(s[1], s[2]);
  return order == Order::rows ? IntList{all, 1, s[1]} : IntList{all, s[2], 1};
}

inline Tensor new_in(Order order, const Tensor& like, ScalarType type) {
  const IntList sizes = sizes_of(like);
  return new_strided(sizes, strides_in(order, sizes), type);
}

// `x` where its innermost dimension is dense in that order; else a copy.
inline Tensor in_order(Order order, const Tensor& x) {
  const int inner = order == Order::turned ? 0 : order == Order::rows ? 1 : 2;
  if (x.stride(inner) == 1 || x.size(inner) <= 1) return x;
  const Tensor copy = new_in(order, x, x.scalar_type());
  const bool flat = x.dim() == 2;
  const int64_t l = flat ? 1 : x.size(2), from_l = flat ? 0 : x.stride(2),
                to_l = flat ? 0 : copy.stride(2);
  with_scalar_type(x.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(copy);
    for (int64_t n = 0; n < x.size(0); ++n)
      for (int64_t c = 0; c < x.size(1); ++c)
        for (int64_t i = 0; i < l; ++i)
          to[n * copy.stride(0) + c * copy.stride(1) + i * to_l] =
              from[n * x.stride(0) + c * x.stride(1) + i * from_l];
  });
  return copy;
}

// One position's class c is at data + outer·outer_step + inner·inner_step + c·class_step.
template <class T>
struct LogitView {
  T* data = nullptr;
  int64_t outer = 0, inner = 0, classes = 0;
  int64_t outer_step = 0, inner_step = 0, class_step = 0;
  bool rows = false;

  LogitView() = default;
  LogitView(const Tensor& x, Order order)
      : data(mutable_data<T>(x)),
        outer(x.size(0)),
        inner(x.dim() == 2 ? 1 : x.size(2)),
        classes(x.size(1)),
        outer_step(x.stride(0)),
        inner_step(x.dim() == 2 ? 1 : x.stride(2)),
        class_step(x.stride(1)),
        rows(order == Order::rows) {
    if (rows) class_step = 1;
    if (order == Order::planes) inner_step = 1;
    // One long run of positions where they are evenly spaced.
    if (order == Order::turned || (rows && (inner == 1 || outer_step == inner * inner_step)))
      inner_step = inner == 1 ? outer_step : inner_step, inner *= outer, outer = 1, outer_step = 0;
  }
  int64_t positions() const { return outer * inner; }
  T* at(int64_t n, int64_t l, int64_t c = 0) const {
    return data + n * outer_step + l * inner_step + c * class_step;
  }
};

// Positions that are worked on together: they lie evenly.
struct PositionBlock {
  int64_t outer, inner, count;
  int64_t first;  // the number of the first one among all
};

template <class T>
class PositionBlocks {
 public:
  PositionBlocks(const LogitView<T>& x, int64_t size)
      : inner_(x.inner), size_(size), runs_(ceil_div(x.inner, size)), count_(x.outer * runs_) {}
  int64_t count() const { return count_; }
  PositionBlock at(int64_t i) const {
    const int64_t n = i / runs_, l = i % runs_ * size_;
    return {n, l, std::min(size_, inner_ - l), n * inner_ + l};
  }

 private:
  int64_t inner_, size_, runs_, count_;
};

// Tiles [class][position] of a block: planes as they lie, rows transposed into scratch memory.
template <class T>
class BlockTiles {
 public:
  static constexpr int64_t kClasses = 128, kRowColumns = 64, kPlaneColumns = 256;
  static int64_t columns(const LogitView<T>& x) { return x.rows ? kRowColumns : kPlaneColumns; }

  explicit BlockTiles(const LogitView<T>& view)
      : view_(view), scratch_(view.rows && view.data ? kClasses * kRowColumns : 0) {}

  int64_t step() const { return view_.rows ? kRowColumns : view_.class_step; }
  T* read(const PositionBlock& b, int64_t c, int64_t classes) const {
    if (!view_.rows) return view_.at(b.outer, b.inner, c);
    transpose_fn<T>()(view_.at(b.outer, b.inner, c), view_.inner_step, scratch_.get(), kRowColumns,
                      b.count, classes);
    return scratch_.get();
  }
  // Where a tile is to be written, and what must follow.
  T* to_write(const PositionBlock& b, int64_t c) const {
    return view_.rows ? scratch_.get() : view_.at(b.outer, b.inner, c);
  }
  void wrote(const PositionBlock& b, int64_t c, int64_t classes) const {
    if (view_.rows)
      transpose_fn<T>()(scratch_.get(), kRowColumns, view_.at(b.outer, b.inner, c),
                        view_.inner_step, classes, b.count);
  }

 private:
  LogitView<T> view_;
  Scratch<T> scratch_;
};

template <class F>
void each_class_tile(int64_t classes, int64_t tile, const F& f) {
  for (int64_t c = 0; c < classes; c += tile) f(c, std::min(tile, classes - c));
}

}  // namespace nnarch
