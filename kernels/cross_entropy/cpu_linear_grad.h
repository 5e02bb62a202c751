// The gradients of x, weight and bias from tiles of logits, or of logits' gradients.
#pragma once

#include "cpu/unpacked.h"
#include "cross_entropy/cpu_linear.h"

namespace nnarch {

// Where the gradients go, dense; null where one is not wanted.
template <class T>
struct LinearGradients {
  T *dx, *dw, *db;
  bool any() const { return dx || dw || db; }
};

// Adds what some samples contribute. Each tile's gradient of the logits takes the place of its
// logits, in cache, and goes into the products at once.
template <class T>
class TileGradients {
 public:
  // `again`: dw and db already hold what other samples contributed.
  TileGradients(const LinearLogits<T>& p, const ClassTiles& tiles, const LinearGradients<T>& to,
                bool again, ScalarType type)
      : p_(p),
        tiles_(tiles),
        to_(to),
        again_(again),
        rows_(to.dw ? packed_size<T>(p.depth, 1, p.samples) : 0),
        parts_memory_(new_contiguous(
            {to.dx && tiles.groups > 1 ? tiles.groups * p.samples * p.depth : 0}, type)),
        parts_(mutable_data<T>(parts_memory_)) {
    if (to.dw) pack_samples(p, true, rows_.get());
  }

  // z is a tile of logits in scratch memory.
  void add(int64_t group, int64_t first, int64_t classes, T* z, int64_t step,
           const SlopeRows<T>& slopes, const ClassFactors<T>& a, const int64_t* target) const {
    const SoftmaxTable<T>& table = softmax<T>();
    table.gradient(z, step, classes, p_.samples, slopes.lse, slopes.alpha, slopes.scale,
                   a.from(first), z, step);
    for (int64_t i = 0; i < p_.samples; ++i) {
      const int64_t c = target[i] - first;
      if (c >= 0 && c < classes) z[c * step + i] -= slopes.beta[i];
    }
    if (to_.db)
      for (int64_t c = 0; c < classes; ++c)
        to_.db[first + c] = static_cast<T>(table.row_sum(z + c * step, p_.samples) +
                                           (again_ ? to_.db[first + c] : T{0}));
    if (to_.dw) add_weight(first, classes, z, step);
    if (to_.dx) add_input(group, first, classes, z, step);
  }

  // dx is the sum of what the groups added.
  void finish() const {
    if (!to_.dx || tiles_.groups == 1) return;
    const int64_t n = p_.samples * p_.depth;
    constexpr int64_t run = 4096;
    parallel_tasks(ceil_div(n, run), [&](int64_t task) {
      const int64_t i = task * run;
      softmax<T>().add_parts(parts_ + i, n, tiles_.groups, to_.dx + i, std::min(run, n - i));
    });
  }

 private:
  void add_weight(int64_t first, int64_t classes, const T* g, int64_t step) const {
    const Strip<T> rows{g, 0, classes};
    T* c = to_.dw + first * p_.depth;
    gemm<T>().run({.depth = p_.samples,
                   .b = rows_.get(),
                   .c = c,
                   .n = p_.depth,
                   .accumulate = again_,
                   .stream = !again_ && outgrows_caches<T>(to_.dw, tiles_.classes, p_.depth),
                   .strips = &rows,
                   .strip_count = 1,
                   .a_step = step,
                   .c_step = p_.depth});
  }

  void add_input(int64_t group, int64_t first, int64_t classes, const T* g, int64_t step) const {
    const int64_t turned_step = padded_step<T>(classes);
    Scratch<T> turned(p_.samples * turned_step);
    transpose_fn<T>()(g, step, turned.get(), turned_step, classes, p_.samples);
    const bool starts = first == tiles_.tiles * group / tiles_.groups * ClassTiles::kTile;
    T* to = tiles_.groups > 1 ? parts_ + group * p_.samples * p_.depth : to_.dx;
    static_assert(ClassTiles::kTile <= kUnpackedDepth);
    const Reading<T> rows(p_.w, {first * p_.w_step, p_.depth, classes, p_.w_step});
    const UnpackedProduct<T> multiply = NNARCH_SELECT(unpacked_product<T>());
    multiply({.a = turned.get(),
              .a_step = turned_step,
              .b = rows.get(),
              .b_step = rows.step(),
              .c = to,
              .c_step = p_.depth,
              .m = p_.samples,
              .n = p_.depth,
              .depth = classes,
              .accumulate = !starts});
  }

  LinearLogits<T> p_;
  ClassTiles tiles_;
  LinearGradients<T> to_;
  bool again_;
  Scratch<T> rows_;
  Tensor parts_memory_;
  T* parts_;
};

}  // namespace nnarch
