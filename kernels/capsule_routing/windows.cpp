// The capsules of every window as the rows that the routing takes, and the gradient of that copy.
#include <algorithm>
#include <cstring>

#include "cpu/dense.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace nnarch {
namespace {

// x [N, H, W, C, D] to rows [N·H'·W', C·KH·KW, D].
struct CapsuleWindows {
  int64_t n, h, w, c, dim;
  int64_t kh, kw, stride_h, stride_w, pad_h, pad_w;
  int64_t oh, ow;

  CapsuleWindows(const IntList& size, const IntList& kernel, const IntList& stride,
                 const IntList& padding) {
    require(size.size() == 5 && kernel.size() == 2 && stride.size() == 2 && padding.size() == 2,
            "capsule_windows: x must be [N, H, W, C, D_in]");
    n = size[0], h = size[1], w = size[2], c = size[3], dim = size[4];
    kh = kernel[0], kw = kernel[1], stride_h = stride[0], stride_w = stride[1];
    pad_h = padding[0], pad_w = padding[1];
    for (const int64_t number : {kh, kw, stride_h, stride_w})
      require(number > 0 && number < int64_t{1} << 31, "capsule_windows: not a window");
    for (const int64_t number : {pad_h, pad_w})
      require(number >= 0 && number < int64_t{1} << 31, "capsule_windows: not a padding");
    require(h + 2 * pad_h >= kh && w + 2 * pad_w >= kw,
            "capsule_windows: the window is larger than the padded image");
    oh = (h + 2 * pad_h - kh) / stride_h + 1, ow = (w + 2 * pad_w - kw) / stride_w + 1;
  }

  int64_t taps() const { return kh * kw; }
  IntList rows() const {
    return {checked_product(n, checked_product(oh, ow)), checked_product(c, taps()), dim};
  }
};

// Calls f(size): the values of a capsule where they are few and usual, known at compile time, or
// `dim`. A call of memcpy for 32 bytes would take longer than the copy.
template <class F>
void with_dim(int64_t dim, const F& f) {
  switch (dim) {
    case 4:
      return f([] { return int64_t{4}; });
    case 8:
      return f([] { return int64_t{8}; });
    case 16:
      return f([] { return int64_t{16}; });
    default:
      return f([dim] { return dim; });
  }
}

// The windows of one image's row of positions.
template <class T, class Dim>
void gather_line(const CapsuleWindows& p, const Dim& dim, const T* image, int64_t y, T* row) {
  const int64_t step = p.taps() * dim();
  for (int64_t x = 0; x < p.ow; ++x, row += p.c * step)
    for (int64_t i = 0; i < p.kh; ++i)
      for (int64_t j = 0; j < p.kw; ++j) {
        const int64_t from_y = y * p.stride_h + i - p.pad_h, from_x = x * p.stride_w + j - p.pad_w;
        const bool inside = from_y >= 0 && from_y < p.h && from_x >= 0 && from_x < p.w;
        const T* from = image + (from_y * p.w + from_x) * p.c * dim();
        T* to = row + (i * p.kw + j) * dim();
        for (int64_t c = 0; c < p.c; ++c, to += step, from += dim())
          for (int64_t d = 0; d < dim(); ++d) to[d] = inside ? from[d] : T{0};
      }
}

// The gradient of one image's row of pixels: every window's, in the order of the taps.
template <class T, class Dim>
void scatter_line(const CapsuleWindows& p, const Dim& dim, const T* rows, int64_t y, T* line) {
  const int64_t step = p.taps() * dim(), pixel = p.c * dim();
  std::fill_n(line, p.w * pixel, T{0});
  for (int64_t i = 0; i < p.kh; ++i) {
    const int64_t from_y = y + p.pad_h - i;
    if (from_y < 0 || from_y % p.stride_h != 0 || from_y / p.stride_h >= p.oh) continue;
    const T* const windows = rows + from_y / p.stride_h * p.ow * p.c * step;
    for (int64_t x = 0; x < p.ow; ++x)
      for (int64_t j = 0; j < p.kw; ++j) {
        const int64_t to_x = x * p.stride_w + j - p.pad_w;
        if (to_x < 0 || to_x >= p.w) continue;
        const T* from = windows + x * p.c * step + (i * p.kw + j) * dim();
        T* to = line + to_x * pixel;
        for (int64_t c = 0; c < p.c; ++c, to += dim(), from += step)
          for (int64_t d = 0; d < dim(); ++d) to[d] += from[d];
      }
  }
}

Tensor capsule_windows(const Tensor& x, const IntList& kernel, const IntList& stride,
                       const IntList& padding) {
  const CapsuleWindows p(sizes_of(x), kernel, stride, padding);
  const Tensor from = as_contiguous(to_compute_type(x));
  const Tensor rows = new_contiguous(p.rows(), from.scalar_type());
  if (rows.numel() > 0)
    with_scalar_type(from.scalar_type(), "capsule_windows", [&](auto scalar) {
      using T = decltype(scalar);
      const T* images = data<T>(from);
      T* to = mutable_data<T>(rows);
      with_dim(p.dim, [&](auto dim) {
        parallel_tasks(p.n * p.oh, [&](int64_t task) {
          gather_line(p, dim, images + task / p.oh * p.h * p.w * p.c * p.dim, task % p.oh,
                      to + task * p.ow * p.c * p.taps() * p.dim);
        });
      });
    });
  return to_type(rows, x.scalar_type());
}

Tensor capsule_windows_grad(const Tensor& grad, const IntList& input_size, const IntList& kernel,
                            const IntList& stride, const IntList& padding) {
  const CapsuleWindows p(input_size, kernel, stride, padding);
  require(sizes_of(grad) == p.rows(), "capsule_windows_grad: grad must have the windows' shape");
  const Tensor from = as_contiguous(to_compute_type(grad));
  const Tensor dx = new_contiguous(input_size, from.scalar_type());
  if (dx.numel() > 0)
    with_scalar_type(from.scalar_type(), "capsule_windows_grad", [&](auto scalar) {
      using T = decltype(scalar);
      const T* rows = data<T>(from);
      T* to = mutable_data<T>(dx);
      with_dim(p.dim, [&](auto dim) {
        parallel_tasks(p.n * p.h, [&](int64_t task) {
          scatter_line(p, dim, rows + task / p.h * p.oh * p.ow * p.c * p.taps() * p.dim, task % p.h,
                       to + task * p.w * p.c * p.dim);
        });
      });
    });
  return to_type(dx, grad.scalar_type());
}

}  // namespace

NNARCH_OPS(capsule_windows, ops) {
  ops.impl("capsule_windows", TORCH_BOX(&capsule_windows));
  ops.impl("capsule_windows_grad", TORCH_BOX(&capsule_windows_grad));
}

}  // namespace nnarch
