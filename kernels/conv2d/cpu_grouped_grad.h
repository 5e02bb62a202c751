// The gradients of narrow groups.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "conv2d/cpu_grouped.h"
#include "conv_transpose2d/cpu_phases.h"
#include "cpu/arena.h"
#include "cpu/tensor.h"

namespace nnarch {

// One phase of a transposed convolution as a convolution of x with the phase's taps, which follow
// each other at even distances, from the last one of the kernel on.
inline int64_t even_step(const std::vector<int64_t>& v) { return v.size() > 1 ? v[1] - v[0] : 1; }

inline ConvShape phase_shape(const TransposedShape& p, const TransposedPhase& rows,
                             const TransposedPhase& columns) {
  ConvShape q{};
  q.n = p.n, q.c = p.c, q.h = p.h, q.w = p.w;
  q.k = p.k, q.r = std::ssize(rows.taps), q.s = std::ssize(columns.taps);
  q.stride_h = q.stride_w = 1;
  q.dilation_h = even_step(rows.offset), q.dilation_w = even_step(columns.offset);
  q.top = rows.taps.empty() ? 0 : -rows.offset[0];
  q.left = columns.taps.empty() ? 0 : -columns.offset[0];
  q.groups = p.groups, q.oh = rows.count, q.ow = columns.count;
  return q;
}

// Whether all phases can run for all groups at once.
template <class T>
bool transposed_groups_serve(const TransposedShape& p) {
  if (!grouped_serves<T>(p.groups, p.group_c(), p.group_k())) return false;
  for (const TransposedPhase& rows : phases_of(TransposedAxis::rows(p)))
    for (const TransposedPhase& columns : phases_of(TransposedAxis::columns(p)))
      if (!grouped_rows_fit<T>(phase_shape(p, rows, columns))) return false;
  return true;
}

template <class T>
void transposed_groups_phase(const T* x, const Tensor& weight, T* y, const TransposedShape& p,
                             const TransposedPhase& rows, const TransposedPhase& columns) {
  const ConvShape q = phase_shape(p, rows, columns);
  GroupedWeight<const T> w = grouped_weight(data<T>(weight), weight, p.groups);
  std::swap(w.outputs, w.depth), std::swap(w.output_stride, w.depth_stride);
  w.data += rows.taps[0] * w.r_stride + columns.taps[0] * w.s_stride;
  w.r = q.r, w.r_stride *= even_step(rows.taps);
  w.s = q.s, w.s_stride *= even_step(columns.taps);
  Scratch<T> packed(grouped_packed_size<T>(q.k, q.taps(), q.group_c()));
  grouped_pack<T>(w, packed.get());
  GroupedImages<T> images =
      grouped_images(q, x, false, y + (rows.first * p.ow + columns.first) * p.k, false);
  images.conv.y_row = p.stride_h * p.ow * p.k, images.conv.y_pixel = p.stride_w * p.k;
  images.y_image = p.oh * p.ow * p.k;
  grouped_product<T>(images, packed.get());
}

// y = the transposed convolution of x, both channels_last, where transposed_groups_serve.
template <class T>
void transposed_groups(const T* x, const Tensor& weight, T* y, const TransposedShape& p) {
  const auto all_rows = phases_of(TransposedAxis::rows(p));
  const auto all_columns = phases_of(TransposedAxis::columns(p));
  const auto has_no_taps = [](const TransposedPhase& phase) { return phase.taps.empty(); };
  if (std::any_of(all_rows.begin(), all_rows.end(), has_no_taps) ||
      std::any_of(all_columns.begin(), all_columns.end(), has_no_taps))
    std::fill_n(y, p.n * p.oh * p.ow * p.k, T{0});
  for (const TransposedPhase& rows : all_rows)
    for (const TransposedPhase& columns : all_columns)
      if (!has_no_taps(rows) && !has_no_taps(columns))
        transposed_groups_phase(x, weight, y, p, rows, columns);
}

// Whether narrow groups have a weight gradient of their own for this kernel.
template <class T>
bool has_narrow_weight_grad(const ConvShape& p) {
  return grouped_serves<T>(p.groups, p.group_c(), p.group_k()) && grouped_rows_fit<T>(p) &&
         NNARCH_SELECT(grouped_grad_scratch<T>(
             grouped_images<T>(p, nullptr, false, nullptr, false).conv)) > 0;
}

template <class T>
void weight_grad_of_narrow_groups(const Tensor& grad, const Tensor& x_in, const ConvShape& p,
                                  const Tensor& dw) {
  set_algorithm("narrow_groups_weight_grad");
  const Tensor x = is_planar(x_in) ? x_in : as_channels_last(x_in);
  // The kernel reads what it calls y.
  const auto images = grouped_images<T>(p, data<T>(x), is_planar(x), mutable_data<T>(grad), false);
  Scratch<T> sums(images.vectors() * images.weights());
  grouped_weight_grad(images, sums.get());
  grouped_unpack<T>(sums.get(), grouped_weight(mutable_data<T>(dw), dw, p.groups));
}

}  // namespace nnarch
