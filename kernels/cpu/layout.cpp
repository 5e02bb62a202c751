// Tensors of any strides copied into dense order.
#include "cpu/layout.h"

#include <algorithm>
#include <cstring>

#include "cpu/image_parts.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace nnarch {
namespace {

using torch::headeronly::MemoryFormat;

// dst[h][w][c] = src, in tasks of image rows or, where the image is dense, of pixel ranges.
template <class T>
void pack_channels_last(const Tensor& t, const ImagePart& part, T* dst) {
  const int64_t c = t.size(1), h = part.rows, w = t.size(3);
  const int64_t sn = t.stride(0), sc = t.stride(1), sh = t.stride(2), sw = t.stride(3);
  const T* src = data<T>(t) + part.image * sn + part.row * sh;
  const auto transpose = transpose_fn<T>();
  const bool dense_image = sw == 1 && (sh == w || h == 1);
  // A task takes whole rows, or a run of pixels where rows follow each other.
  const int64_t run = dense_image ? 256 : w;
  const int64_t runs = dense_image ? ceil_div(h * w, run) : h;
  parallel_tasks(part.images * runs, [&](int64_t task) {
    const int64_t image = task / runs, first = task % runs * run;
    const int64_t pixels = std::min(run, h * w - first);
    const T* from = src + image * sn + (dense_image ? first : task % runs * sh);
    T* to = dst + (image * h * w + first) * c;
    if (sw == 1) {
      transpose(from, sc, to, c, c, pixels);
    } else {
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t k = 0; k < c; ++k) to[p * c + k] = from[p * sw + k * sc];
    }
  });
}

// Images of `pixels` into planes that are `plane` apart.
template <class T>
void unpack_channels_last(const T* src, T* dst, int64_t n, int64_t c, int64_t pixels,
                          int64_t plane) {
  const auto transpose = transpose_fn<T>();
  const int64_t run = 64, runs = ceil_div(c, run);
  parallel_tasks(n * runs, [&](int64_t task) {
    const int64_t image = task / runs, first = task % runs * run;
    transpose(src + image * pixels * c + first, c, dst + (image * c + first) * plane, plane, pixels,
              std::min(run, c - first));
  });
}

// Copies dimension by dimension; the innermost is vectorised where both sides are dense.
template <class T>
void copy_strided(const T* src, const int64_t* strides, T*& dst, const IntList& sizes, size_t d) {
  if (d == sizes.size()) {
    *dst++ = *src;
    return;
  }
  if (d + 1 == sizes.size()) {
    // The gradient of a sum arrives with strides of 0: 8 times as fast filled.
    if (strides[d] == 0)
      std::fill(dst, dst + sizes[d], *src);
    else if (strides[d] == 1)
      std::copy(src, src + sizes[d], dst);
    else
      for (int64_t i = 0; i < sizes[d]; ++i) dst[i] = src[i * strides[d]];
    dst += sizes[d];
    return;
  }
  for (int64_t i = 0; i < sizes[d]; ++i)
    copy_strided(src + i * strides[d], strides, dst, sizes, d + 1);
}

thread_local int stay_channels_last = 0;

// Half types are moved by torch: they come here as views only that are dense in neither order.
Tensor half_in(MemoryFormat format, const Tensor& t) {
  return torch::stable::contiguous(t, format);
}

}  // namespace

Tensor as_channels_last(const Tensor& t) {
  if (is_channels_last(t)) return t;
  if (is_half(t.scalar_type())) return half_in(MemoryFormat::ChannelsLast, t);
  Tensor result = new_channels_last(sizes_of(t), t.scalar_type());
  if (t.numel() == 0) return result;
  with_scalar_type(t.scalar_type(), "as_channels_last", [&](auto scalar) {
    using T = decltype(scalar);
    pack_channels_last<T>(t, {0, t.size(0), 0, t.size(2)}, mutable_data<T>(result));
  });
  return result;
}

Tensor part_channels_last(const Tensor& x, const ImagePart& part) {
  const Tensor result =
      new_channels_last({part.images, x.size(1), part.rows, x.size(3)}, x.scalar_type());
  if (result.numel() == 0) return result;
  with_scalar_type(x.scalar_type(), "part_channels_last", [&](auto scalar) {
    using T = decltype(scalar);
    pack_channels_last<T>(x, part, mutable_data<T>(result));
  });
  return result;
}

void put_planar(const Tensor& y, const ImagePart& part, const Tensor& from) {
  if (from.numel() == 0) return;
  const int64_t c = y.size(1), w = y.size(3), plane = y.size(2) * w;
  with_scalar_type(y.scalar_type(), "put_planar", [&](auto scalar) {
    using T = decltype(scalar);
    T* to = mutable_data<T>(y) + part.image * c * plane + part.row * w;
    unpack_channels_last<T>(data<T>(from), to, part.images, c, part.rows * w, plane);
  });
}

Tensor as_contiguous(const Tensor& t) {
  if (t.is_contiguous()) return t;
  if (is_half(t.scalar_type())) return half_in(MemoryFormat::Contiguous, t);
  const IntList sizes = sizes_of(t);
  Tensor result = new_contiguous(sizes, t.scalar_type());
  if (t.numel() == 0) return result;
  with_scalar_type(t.scalar_type(), "as_contiguous", [&](auto scalar) {
    using T = decltype(scalar);
    T* dst = mutable_data<T>(result);
    if (t.dim() == 4 && is_channels_last(t)) {
      const int64_t pixels = sizes[2] * sizes[3];
      unpack_channels_last<T>(data<T>(t), dst, sizes[0], sizes[1], pixels, pixels);
    } else if (t.dim() == 2 && t.stride(0) == 1 && t.stride(1) >= sizes[0]) {
      const auto transpose = transpose_fn<T>();
      const int64_t run = 64;
      parallel_tasks(ceil_div(sizes[0], run), [&](int64_t task) {
        const int64_t first = task * run;
        transpose(data<T>(t) + first, t.stride(1), dst + first * sizes[1], sizes[1], sizes[1],
                  std::min(run, sizes[0] - first));
      });
    } else {
      const auto strides = t.strides();
      copy_strided<T>(data<T>(t), strides.data(), dst, sizes, 0);
    }
  });
  return result;
}

Tensor in_format_of(const Tensor& result, const Tensor& like) {
  return StayChannelsLast::holds() || follows_channels_last(like) ? result : as_contiguous(result);
}

StayChannelsLast::StayChannelsLast() { ++stay_channels_last; }
StayChannelsLast::~StayChannelsLast() { --stay_channels_last; }
bool StayChannelsLast::holds() { return stay_channels_last > 0; }

}  // namespace nnarch
