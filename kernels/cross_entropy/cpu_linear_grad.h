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
// logits, in cache, and goes into the weight's product at once, into that of dx with some others.
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

  // What the tiles of a group contribute; logits_of(first, classes) is a tile's logits, `step`
  // apart from class to class, which its gradient replaces.
  template <class Logits>
  void add(int64_t group, int64_t step, const SlopeRows<T>& slopes, const ClassFactors<T>& a,
           const int64_t* target, const Logits& logits_of) const {
    Scratch<T> turned(to_.dx ? p_.samples * turned_step() : 0);
    int64_t gathered = 0;
    const int64_t start = tiles_.first_of(group), end = tiles_.first_of(group + 1);
    tiles_.each(group, [&](int64_t first, int64_t classes) {
      T* z = logits_of(first, classes);
      to_gradient(first, classes, z, step, slopes, a, target);
      if (to_.db) add_bias(first, classes, z, step);
      if (to_.dw) add_weight(first, classes, z, step);
      if (!to_.dx) return;
      transpose_fn<T>()(z, step, turned.get() + gathered, turned_step(), classes, p_.samples);
      gathered += classes;
      const int64_t seen = first + classes;
      if (gathered < kGathered && seen < end) return;
      add_input(group, seen - gathered, gathered, turned.get(), seen == start + gathered);
      gathered = 0;
    });
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
  // Classes whose products with the weight are added to dx at once: with fewer of them dx would be
  // read and written more often, and it does not stay in the second-level cache.
  static constexpr int64_t kGathered = 4 * ClassTiles::kTile;
  static constexpr int64_t kInputColumns = 128;  // of dx, which do
  int64_t turned_step() const { return padded_step<T>(std::min(kGathered, tiles_.classes)); }

  void to_gradient(int64_t first, int64_t classes, T* z, int64_t step, const SlopeRows<T>& slopes,
                   const ClassFactors<T>& a, const int64_t* target) const {
    softmax<T>().gradient(z, step, classes, p_.samples, slopes.max, slopes.alpha, slopes.scale,
                          a.from(first), z, step);
    for (int64_t i = 0; i < p_.samples; ++i) {
      const int64_t c = target[i] - first;
      if (c >= 0 && c < classes) z[c * step + i] -= slopes.beta[i];
    }
  }

  void add_bias(int64_t first, int64_t classes, const T* g, int64_t step) const {
    for (int64_t c = 0; c < classes; ++c)
      to_.db[first + c] = static_cast<T>(softmax<T>().row_sum(g + c * step, p_.samples) +
                                         (again_ ? to_.db[first + c] : T{0}));
  }

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

  // `turned` is the gradient of the logits of `classes` classes, sample by sample.
  void add_input(int64_t group, int64_t first, int64_t classes, const T* turned,
                 bool starts) const {
    T* const to = tiles_.groups > 1 ? parts_ + group * p_.samples * p_.depth : to_.dx;
    const Reading<T> rows(p_.w, {first * p_.w_step, p_.depth, classes, p_.w_step});
    const UnpackedProduct<T> multiply = NNARCH_SELECT(unpacked_product<T>());
    static_assert(ClassTiles::kTile <= kUnpackedDepth);
    for (int64_t column = 0; column < p_.depth; column += kInputColumns)
      for (int64_t part = 0; part < classes; part += ClassTiles::kTile) {
        const int64_t after = part + ClassTiles::kTile;
        multiply({.a = turned + part,
                  .a_step = turned_step(),
                  .b = rows.get() + part * rows.step() + column,
                  .b_step = rows.step(),
                  .c = to + column,
                  .c_step = p_.depth,
                  .m = p_.samples,
                  .n = std::min(kInputColumns, p_.depth - column),
                  .depth = std::min(ClassTiles::kTile, classes - part),
                  .accumulate = !starts || part > 0,
                  .after = after < classes ? rows.get() + after * rows.step() + column : nullptr,
                  .after_rows = std::min(ClassTiles::kTile, classes - after)});
      }
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
