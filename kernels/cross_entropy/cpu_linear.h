// logits = x·wᵀ + bias, seen tile by tile: [class][sample], so that the weight's rows are the
// product's A, read as they lie, and samples are the columns of the softmax's vectors.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/gemm.h"
#include "cpu/half.h"
#include "cpu/pack_half.h"
#include "cpu/pack_weight.h"
#include "cpu/parallel.h"
#include "cross_entropy/cpu_loss.h"

namespace nnarch {

template <class T>
struct LinearLogits {
  Stored x;  // [samples][depth], rows x_step apart, from element x_first on
  int64_t x_first, x_step, samples, depth;
  Stored w;  // [classes][depth], rows w_step apart
  int64_t w_step, classes;
  const T* bias;  // [classes] or null

  LinearLogits rows(int64_t first, int64_t count) const {
    LinearLogits part = *this;
    part.x_first += first * x_step, part.samples = count;
    return part;
  }
};

// Samples packed for a product: the product's columns, or, `turned`, its depth.
template <class T>
void pack_samples(const LinearLogits<T>& p, bool turned, T* packed) {
  const int64_t columns = turned ? p.depth : p.samples, depth = turned ? p.samples : p.depth;
  const int64_t column_step = turned ? 1 : p.x_step, depth_step = turned ? p.x_step : 1;
  if constexpr (std::is_same_v<T, float>)
    if (p.x.half) {
      const HalfMatrix samples{p.x, p.x_first, column_step, depth_step, depth};
      const int64_t nr = gemm<float>().nr;
      return parallel_tasks(ceil_div(columns, nr), [&](int64_t j) {
        pack_half_columns(samples, j * nr, std::min(nr, columns - j * nr), packed + j * nr * depth);
      });
    }
  pack_weight(
      WeightView<T>{p.x.template at<T>(p.x_first), columns, depth, column_step, depth_step, {0}},
      packed);
}

// How the classes are cut: tiles whose logits and weights stay in L2; groups of tiles are tasks,
// each with sums of its own, which are joined in the order of the groups. By the shape alone.
struct ClassTiles {
  static constexpr int64_t kTile = 126;  // whole register tiles of 14 and of 6 rows
  int64_t classes, tiles, groups;

  explicit ClassTiles(int64_t all)
      : classes(all), tiles(ceil_div(all, kTile)), groups(std::clamp<int64_t>(tiles / 2, 1, 16)) {}

  // The first class of a group; of the group after the last: all classes.
  int64_t first_of(int64_t group) const {
    return std::min(classes, tiles * group / groups * kTile);
  }
  // Calls f(first class, classes) for the tiles of a group.
  template <class F>
  void each(int64_t group, const F& f) const {
    for (int64_t c = first_of(group), end = first_of(group + 1); c < end; c += kTile)
      f(c, std::min(kTile, end - c));
  }
};

// Rows that lie a multiple of 4 KB apart evict each other from the L1 cache.
template <class T>
int64_t padded_step(int64_t n) {
  const int64_t line = 64 / int64_t{sizeof(T)}, step = round_up(n, line);
  return step * int64_t{sizeof(T)} % 1024 == 0 ? step + line : step;
}

// Tiles of logits of some samples, which are packed once for all tiles.
template <class T>
class LogitTiles {
 public:
  static constexpr int64_t kColumns = 256;  // of a tile at a time: 126 KB of floats
  static constexpr int64_t kFew = 4;        // samples that are not worth a register tile

  explicit LogitTiles(const LinearLogits<T>& p)
      : p_(p),
        few_(p.samples <= kFew && p.depth > 0),
        pairs_(!few_ && p.w.half && p.w.half == &half_table(ScalarType::BFloat16) && pairs()),
        few_x_(p.x, {p.x_first, p.depth, few_ ? p.samples : 0, p.x_step}),
        packed_(few_     ? 0
                : pairs_ ? pairs_packed_size(p.samples, p.depth) / 2  // a pair is a float long
                         : packed_size<T>(p.samples, 1, p.depth)) {
    if (pairs_)
      pack_sample_pairs();
    else if (!few_)
      pack_samples(p, false, packed_.get());
  }

  // z[class][sample] for classes [first, first + classes); calls seen(z, first sample, samples) for
  // blocks of samples while they are hot.
  template <class F>
  void compute(int64_t first, int64_t classes, T* z, int64_t step, const F& seen) const {
    const bool copied =
        !few_ && !pairs_ && (p_.w.half || p_.w_step * int64_t{sizeof(T)} % 4096 == 0);
    const int64_t w_step = copied ? padded_step<T>(p_.depth) : p_.w_step;
    Scratch<T> copy(copied ? classes * w_step : 0);
    if (copied) copy_rows(first, classes, copy.get(), w_step);
    const T* w = copied ? copy.get() : p_.w.half ? nullptr : p_.w.template at<T>(first * p_.w_step);
    const PairRowsApart rows(p_.w, first * p_.w_step, pairs_ ? classes : 0, p_.w_step, p_.depth);
    for (int64_t n = 0; n < p_.samples; n += kColumns) {
      const int64_t columns = std::min(kColumns, p_.samples - n);
      if (few_)
        multiply_few(first, classes, z, step);
      else if (pairs_)
        multiply_pairs(rows, classes, n, columns, z + n, step);
      else
        multiply(w, w_step, classes, n, columns, z + n, step,
                 copied ? 0 : rows_after(first + classes));
      if (p_.bias) softmax<T>().add_bias(z + n, step, classes, columns, p_.bias + first);
      seen(z + n, n, columns);
    }
  }

 private:
  // Rows of the weight, at a distance that suits the L1 cache.
  void copy_rows(int64_t first, int64_t classes, T* to, int64_t step) const {
    for (int64_t c = 0; c < classes; ++c, to += step) {
      const int64_t at = (first + c) * p_.w_step;
      if constexpr (std::is_same_v<T, float>)
        if (p_.w.half) {
          p_.w.half->widen(p_.w.bits() + at, to, p_.depth);
          continue;
        }
      std::memcpy(to, p_.w.template at<T>(at), p_.depth * sizeof(T));
    }
  }
  // Of the weight's rows from class `first` on, those of the next tile that are fetched ahead.
  int64_t rows_after(int64_t first) const {
    return p_.w_step == p_.depth ? std::clamp<int64_t>(p_.classes - first, 0, ClassTiles::kTile)
                                 : 0;
  }
  void multiply(const T* w, int64_t w_step, int64_t classes, int64_t n, int64_t columns, T* z,
                int64_t step, int64_t after) const {
    const Strip<T> rows{w, 0, classes};
    if (n + columns < p_.samples) after = 0;
    gemm<T>().run({.depth = p_.depth,
                   .b = packed_.get() + n * p_.depth,
                   .after = {w + classes * w_step, after * p_.depth},
                   .c = z,
                   .n = columns,
                   .strips = &rows,
                   .strip_count = 1,
                   .a_step = w_step,
                   .c_step = step});
  }
  // bfloat16 as it lies (cpu/pairs.h).
  void pack_sample_pairs() {
    const HalfMatrix view{p_.x, p_.x_first, p_.x_step, 1, p_.depth};
    const int64_t nr = pairs()->nr;
    parallel_tasks(ceil_div(p_.samples, nr), [&](int64_t j) {
      pack_pairs(view, j * nr, std::min(nr, p_.samples - j * nr),
                 packed_bits() + j * nr * round_up(p_.depth, 2));
    });
  }
  uint16_t* packed_bits() const { return reinterpret_cast<uint16_t*>(packed_.get()); }
  void multiply_pairs(const PairRowsApart& rows, int64_t classes, int64_t n, int64_t columns, T* z,
                      int64_t step) const {
    if constexpr (std::is_same_v<T, float>)
      pairs()->run({.a = rows.get(),
                    .a_step = rows.step(),
                    .b = packed_bits() + n * round_up(p_.depth, 2),
                    .depth = p_.depth,
                    .m = classes,
                    .n = columns,
                    .c = z,
                    .c_step = step});
  }
  void multiply_few(int64_t first, int64_t classes, T* z, int64_t step) const {
    Scratch<T> rows(p_.samples * classes);
    const int64_t at = first * p_.w_step;
    if (p_.w.half) {
      if constexpr (std::is_same_v<T, float>)
        p_.w.half->few_rows(few_x_.get(), few_x_.step(), p_.samples, p_.w.bits() + at, p_.w_step,
                            p_.depth, classes, rows.get(), classes, {});
    } else {
      gemm<T>().few_rows(few_x_.get(), few_x_.step(), p_.samples, p_.w.template at<T>(at),
                         p_.w_step, p_.depth, classes, rows.get(), classes, {});
    }
    for (int64_t c = 0; c < classes; ++c)
      for (int64_t i = 0; i < p_.samples; ++i) z[c * step + i] = rows[i * classes + c];
  }

  LinearLogits<T> p_;
  bool few_, pairs_;
  Reading<T> few_x_;
  Scratch<T> packed_;
};

// The statistics of some samples: each group of tiles gathers its own.
template <class T>
class Statistics {
 public:
  Statistics(const ClassTiles& tiles, int64_t samples, bool weighs)
      : groups_(tiles.groups),
        n_(samples),
        running_(groups_ * 2 * n_),
        sums_(weighs ? groups_ * 2 * n_ : 0),
        at_target_(n_),
        weighs_(weighs) {
    std::fill_n(at_target_.get(), n_, T{0});
    for (int64_t g = 0; g < groups_; ++g) {
      std::fill_n(max(g), n_, -static_cast<T>(INFINITY));
      std::fill_n(sum(g), n_, T{0});
      if (weighs) std::fill_n(weighted(g), 2 * n_, 0.0);
    }
  }

  // A block of a tile; `target` is that of the block's first sample, or null.
  void observe(int64_t group, const T* z, int64_t step, int64_t first, int64_t classes, int64_t n,
               int64_t columns, const ClassFactors<T>& a, const int64_t* target) const {
    const SoftmaxTable<T>& table = softmax<T>();
    table.observe(z, step, classes, columns, max(group) + n, sum(group) + n);
    if (weighs_)
      table.weigh(z, step, classes, columns, max(group) + n, a.from(first), weighted(group) + n,
                  weighted(group) + n_ + n);
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t c = target[i] - first;
      if (c >= 0 && c < classes) at_target_[n + i] = z[c * step + i];
    }
  }

  Seen of(int64_t i) const {
    T top = max(0)[i];
    for (int64_t g = 1; g < groups_; ++g) top = max(g)[i] > top ? max(g)[i] : top;
    Seen seen{{}, static_cast<double>(at_target_[i]), 0, 0};
    double total = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      const double below = static_cast<double>(max(g)[i]) - static_cast<double>(top);
      // Nothing but -infinity in this group: -infinity less itself would be NaN.
      if (sum(g)[i] != T{0}) total += static_cast<double>(sum(g)[i]) * std::exp(below);
      if (weighs_) seen.weighted += weighted(g)[i], seen.total += weighted(g)[n_ + i];
    }
    seen.lse = LogSum::of(static_cast<double>(top), total);
    return seen;
  }

 private:
  T* max(int64_t g) const { return running_.get() + g * 2 * n_; }
  T* sum(int64_t g) const { return max(g) + n_; }
  double* weighted(int64_t g) const { return sums_.get() + g * 2 * n_; }

  int64_t groups_, n_;
  Scratch<T> running_;
  Scratch<double> sums_;
  Scratch<T> at_target_;
  bool weighs_;
};

}  // namespace nnarch
