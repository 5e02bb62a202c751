// Transposed convolution on packed weights: phase by phase, or one product for an input of one
// pixel, or (cpu_taps.h) products with all taps at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv2d/cpu_product.h"
#include "conv_transpose2d/cpu_phases.h"
#include "conv_transpose2d/cpu_taps.h"
#include "conv_transpose2d/layout_choice.h"
#include "cpu/epilogue.h"

namespace nnarch {

// Where the phases lie in a packed weight: group by group, residue by residue.
template <class T>
class PackedPhases {
 public:
  PackedPhases(const TransposedShape& p, int64_t layout)
      : p_(p),
        rows_(TransposedAxis::rows(p)),
        columns_(TransposedAxis::columns(p)),
        layout_(layout),
        row_residues_(rows_.residues()),
        column_residues_(columns_.residues()) {
    begin_.push_back(0);
    for (const int64_t i : row_residues_)
      for (const int64_t j : column_residues_)
        begin_.push_back(checked_sum(begin_.back(), size(i, j)));
  }

  int64_t group_size() const { return begin_.back(); }

  WinogradTile tile(int64_t row_residue, int64_t column_residue) const {
    return phase_tile(rows_, row_residue, columns_, column_residue, layout_);
  }

  bool any_direct() const {
    for (const int64_t i : row_residues_)
      for (const int64_t j : column_residues_)
        if (tile(i, j).m == 0) return true;
    return false;
  }

  // The first element of a phase in the packed weight of `group`; -1: it has no taps.
  int64_t begin(int64_t group, int64_t row_residue, int64_t column_residue) const {
    const int64_t i = index(row_residues_, row_residue),
                  j = index(column_residues_, column_residue);
    if (i < 0 || j < 0) return -1;
    return group * group_size() + begin_[i * static_cast<int64_t>(column_residues_.size()) + j];
  }

  void pack(const Tensor& weight, T* dst) const {
    if (layout_ == kPhases && taps_lie_together(weight)) return pack_in_one_pass(weight, dst);
    for (int64_t group = 0; group < p_.groups; ++group)
      for (const int64_t i : row_residues_)
        for (const int64_t j : column_residues_)
          conv_pack(phase_weight<T>(weight, p_.groups, group, rows_.taps(i), columns_.taps(j)),
                    tile(i, j), dst + begin(group, i, j));
  }

 private:
  int64_t size(int64_t i, int64_t j) const {
    const auto taps = static_cast<int64_t>(rows_.taps(i).size() * columns_.taps(j).size());
    return conv_packed_size<T>(p_.group_k(), taps, p_.group_c(), tile(i, j));
  }

  // [c][k][r, s] in memory: every phase would read every line.
  bool taps_lie_together(const Tensor& weight) const {
    return weight.stride(3) == 1 && weight.stride(2) == p_.s && weight.stride(1) == p_.taps() &&
           p_.taps() > 1;
  }

  // Where the values of tap (r, s) lie in panel 0 of a group's packed weight, and how far the next
  // panel is.
  struct Place {
    int64_t at, panel;
  };
  std::vector<Place> places() const {
    const int64_t depth = p_.group_c(), nr = gemm<T>().nr;
    std::vector<Place> all(static_cast<size_t>(p_.taps()));
    for (const int64_t i : row_residues_)
      for (const int64_t j : column_residues_) {
        const std::vector<int64_t> rows = rows_.taps(i), columns = columns_.taps(j);
        const auto count = static_cast<int64_t>(rows.size() * columns.size());
        int64_t at = begin(0, i, j);
        for (const int64_t r : rows)
          for (const int64_t s : columns) {
            all[r * p_.s + s] = {at, count * depth * nr};
            at += depth * nr;
          }
      }
    return all;
  }

  // All phases in one pass over the weight, block by block: [k][r, s] of one input channel, a panel
  // wide, is transposed and its rows go to their phases. 512 × 256 × 4 × 4: 2.8 ms phase by phase.
  void pack_in_one_pass(const Tensor& weight, T* dst) const {
    const int64_t depth = p_.group_c(), k = p_.group_k(), nr = gemm<T>().nr, taps = p_.taps();
    const int64_t panels = ceil_div(k, nr), line = 64 / int64_t{sizeof(T)};
    const std::vector<Place> to = places();
    parallel_tasks(p_.groups * panels, [&](int64_t task) {
      const int64_t group = task / panels, panel = task % panels;
      const int64_t n = std::min(nr, k - panel * nr), step = weight.stride(0);
      const T* from = data<T>(weight) + group * depth * step + panel * nr * taps;
      T* base = dst + group * group_size();
      Scratch<T> rows(taps * nr);
      std::fill_n(rows.get(), taps * nr, T{0});
      for (int64_t c = 0; c < depth; ++c, from += step) {
        for (int64_t i = 0; i < n * taps; i += line) __builtin_prefetch(from + 2 * step + i);
        transpose_fn<T>()(from, taps, rows.get(), nr, n, taps);
        for (int64_t t = 0; t < taps; ++t)
          std::copy_n(rows.get() + t * nr, nr, base + to[t].at + panel * to[t].panel + c * nr);
      }
    });
  }

  static int64_t index(const std::vector<int64_t>& all, int64_t residue) {
    const auto at = std::find(all.begin(), all.end(), residue);
    return at == all.end() ? -1 : at - all.begin();
  }

  const TransposedShape& p_;
  TransposedAxis rows_, columns_;
  int64_t layout_;
  std::vector<int64_t> row_residues_, column_residues_;
  std::vector<int64_t> begin_;
};

template <class T>
int64_t transposed_packed_size(const TransposedShape& p, int64_t layout) {
  if (layout == kPixel || layout == kTaps)
    return checked_product(p.groups,
                           packed_size<T>(checked_product(p.group_k(), p.taps()), 1, p.group_c()));
  return checked_product(p.groups, PackedPhases<T>(p, layout).group_size());
}

// The weight [c, k, r, s] as a matrix [c][r, s, k].
template <class T>
void pack_taps(const Tensor& weight, const TransposedShape& p, T* dst) {
  const int64_t nr = gemm<T>().nr, all = p.k * p.taps(), panels = ceil_div(all, nr);
  parallel_tasks(panels, [&](int64_t panel) {
    T* to = dst + panel * p.c * nr;
    std::fill_n(to, p.c * nr, T{0});
    for (int64_t j = 0; j < std::min(nr, all - panel * nr); ++j) {
      const int64_t column = panel * nr + j, tap = column / p.k;
      const T* from = data<T>(weight) + column % p.k * weight.stride(1) +
                      tap / p.s * weight.stride(2) + tap % p.s * weight.stride(3);
      for (int64_t c = 0; c < p.c; ++c) to[c * nr + j] = from[c * weight.stride(0)];
    }
  });
}

// Group by group as a matrix [c][k, r, s]: the order of a contiguous weight.
template <class T>
void pack_pixel(const Tensor& weight_in, const TransposedShape& p, T* dst) {
  const Tensor weight = as_contiguous(weight_in);
  const int64_t all = p.group_k() * p.taps(), size = packed_size<T>(all, 1, p.group_c());
  for (int64_t group = 0; group < p.groups; ++group)
    pack_weight<T>({.data = data<T>(weight) + group * p.group_c() * all,
                    .columns = all,
                    .depth = p.group_c(),
                    .column_stride = 1,
                    .depth_stride = all,
                    .tap_offset = {0}},
                   dst + group * size);
}

template <class T>
void pack_transposed(const Tensor& weight, const TransposedShape& p, int64_t layout, T* dst) {
  if (layout == kPixel) return pack_pixel<T>(weight, p, dst);
  if (layout == kTaps) return pack_taps<T>(weight, p, dst);
  PackedPhases<T>(p, layout).pack(weight, dst);
}

// y channels_last; `packed` may be null. Then several direct phases are packed first, in one pass,
// and a single one or Winograd's, whose transformed weights may outgrow the caches, on the way.
template <class T>
void by_phases(const T* x, const Tensor& weight, const T* packed, int64_t layout, T* y,
               const TransposedShape& p, const Epilogue<T>& epilogue) {
  const TransposedAxis row_axis = TransposedAxis::rows(p), column_axis = TransposedAxis::columns(p);
  const PackedPhases<T> phases(p, layout), direct(p, kPhases);
  const std::vector<TransposedPhase> all_columns = phases_of(column_axis);
  const OutputGrid out{p.oh * p.ow * p.k, p.stride_h * p.ow * p.k, p.stride_w * p.k};
  const bool own = !packed && phases.any_direct() && p.stride_h * p.stride_w > 1;
  Scratch<T> packed_here(own ? checked_product(p.groups, direct.group_size()) : 0);
  if (own) direct.pack(weight, packed_here.get());
  for (const TransposedPhase& rows : phases_of(row_axis))
    for (const TransposedPhase& columns : all_columns)
      for (int64_t group = 0; group < p.groups; ++group) {
        const WinogradTile tile = phases.tile(rows.residue, columns.residue);
        const PackedPhases<T>& order = packed ? phases : direct;
        const T* from = packed ? packed : own && tile.m == 0 ? packed_here.get() : nullptr;
        const int64_t at = order.begin(group, rows.residue, columns.residue);
        const int64_t first = (rows.first * p.ow + columns.first) * p.k + group * p.group_k();
        Epilogue<T> of_phase = epilogue.from_channel(group * p.group_k());
        if (of_phase.residual) of_phase.residual += first - group * p.group_k();
        conv_product<T>(phase_image(x, p, group, rows, columns), tile,
                        from && at >= 0 ? from + at : nullptr,
                        phase_weight<T>(weight, p.groups, group, rows.taps, columns.taps),
                        y + first, out, of_phase);
      }
}

// The per-channel vectors of an epilogue for rows of several outputs: channel by channel each value
// `times` times, or all channels again and again. Padded as FoldedEpilogue's.
template <class T>
class RepeatedEpilogue {
 public:
  enum class Order { channels_apart, channels_together };

  RepeatedEpilogue(const Epilogue<T>& e, int64_t channels, int64_t times, Order order)
      : scale_(e.scale ? channels * times + kPad : 0),
        shift_(e.shift ? channels * times + kPad : 0),
        repeated_(e) {
    if (e.scale) repeated_.scale = fill(e.scale, channels, times, order, scale_.get());
    if (e.shift) repeated_.shift = fill(e.shift, channels, times, order, shift_.get());
  }

  const Epilogue<T>& get() const { return repeated_; }

 private:
  static constexpr int64_t kPad = 64;
  static const T* fill(const T* from, int64_t channels, int64_t times, Order order, T* to) {
    if (order == Order::channels_apart)
      for (int64_t k = 0; k < channels; ++k) std::fill_n(to + k * times, times, from[k]);
    else
      for (int64_t i = 0; i < times; ++i) std::copy_n(from, channels, to + i * channels);
    std::fill_n(to + channels * times, kPad, T{0});
    return to;
  }

  Scratch<T> scale_, shift_;
  Epilogue<T> repeated_;
};

// An input of one pixel: y[n][k, r, s] = x[n] · weight, y contiguous.
template <class T>
void of_one_pixel(const T* x, const Tensor& weight, const T* packed, T* y, const TransposedShape& p,
                  const Epilogue<T>& epilogue) {
  const int64_t columns = p.group_k() * p.taps(), size = packed_size<T>(columns, 1, p.group_c());
  const RepeatedEpilogue<T> repeated(epilogue, p.k, p.taps(),
                                     RepeatedEpilogue<T>::Order::channels_apart);
  Scratch<T> own(packed ? 0 : p.groups * size);
  if (!packed) pack_pixel<T>(weight, p, own.get());
  const int64_t image = p.k * p.taps();
  for (int64_t group = 0; group < p.groups; ++group) {
    const GridImage<T> pixels{.data = x + group * p.group_c(),
                              .h = 1,
                              .w = p.n,
                              .pixel = p.c,
                              .n = 1,
                              .grid_h = 1,
                              .grid_w = p.n,
                              .step_y = 1,
                              .step_x = 1,
                              .taps = {{0, 0}},
                              .depth = p.group_c()};
    gather_gemm<T>(pixels, (packed ? packed : own.get()) + group * size, columns,
                   y + group * columns, {image, image, image},
                   repeated.get().from_channel(group * columns));
  }
}

// Few output channels; x and y channels_last.
template <class T>
void with_taps_together(const T* x, const Tensor& weight, const T* packed, T* y,
                        const TransposedShape& p, const Epilogue<T>& epilogue) {
  Scratch<T> own(packed ? 0 : transposed_packed_size<T>(p, kTaps));
  if (!packed) pack_taps<T>(weight, p, own.get());
  const RepeatedEpilogue<T> of_row(epilogue, p.k, p.ow,
                                   RepeatedEpilogue<T>::Order::channels_together);
  by_taps<T>(x, packed ? packed : own.get(), y, p, of_row.get());
}

// y = epilogue(x transposed with weight). x and y are channels_last, or contiguous under kPixel, as
// is the residual; `packed`, of this layout, may be null.
template <class T>
void transposed(const T* x, const Tensor& weight, const T* packed, int64_t layout, T* y,
                const TransposedShape& p, const Epilogue<T>& epilogue) {
  if (layout == kPixel) return of_one_pixel<T>(x, weight, packed, y, p, epilogue);
  if (layout == kTaps) return with_taps_together<T>(x, weight, packed, y, p, epilogue);
  by_phases<T>(x, weight, packed, layout, y, p, epilogue);
}

// For nnarch.trace(): a string literal.
inline const char* transposed_algorithm(const TransposedShape& p, int64_t layout) {
  const bool strided = p.stride_h * p.stride_w > 1;
  switch (layout) {
    case kPixel:
      return "gemm_1x1";
    case kTaps:
      return "gemm_taps";
    case 2:
      return strided ? "winograd_2x2_phases" : "winograd_2x2";
    case 3:
      return strided ? "winograd_3x3_phases" : "winograd_3x3";
    case 4:
      return strided ? "winograd_4x4_phases" : "winograd_4x4";
    case 5:
      return strided ? "winograd_5x5_phases" : "winograd_5x5";
    case 6:
      return strided ? "winograd_6x6_phases" : "winograd_6x6";
    default:
      return strided ? "implicit_gemm_phases" : "implicit_gemm";
  }
}

}  // namespace nnarch
