// linear on the CPU: y = act((x·wᵀ + bias)·scale + shift + residual).
#include <algorithm>
#include <tuple>

#include "cpu/epilogue_fold.h"
#include "cpu/gather_gemm.h"
#include "cpu/pack_weight.h"
#include "cpu/registry.h"
#include "cpu/tensor.h"
#include "linear/cpu_combine.h"
#include "linear/cpu_rows.h"
#include "normalization/cpu_sum.h"

namespace nnarch {
namespace {

// Few rows: every weight is read once, in place.
template <class T>
void few_rows(const Rows& x, const Tensor& w, T* y, const Epilogue<T>& epilogue) {
  set_algorithm("gemv");
  constexpr int64_t run = 64;
  const int64_t n = w.size(0);
  parallel_tasks(ceil_div(n, run), [&](int64_t task) {
    const int64_t first = task * run;
    gemm<T>().few_rows(data<T>(x.tensor), x.stride, x.m, data<T>(w) + first * w.stride(0),
                       w.stride(0), x.depth, std::min(run, n - first), y + first, n,
                       epilogue.from_channel(first));
  });
}

// Few rows, or a short sum, where the weights' columns are dense: transposed ones, which a gradient
// multiplies with. Packing them took as long as the product three times.
template <class T>
void rows_of_weights(const Rows& x, const Tensor& w, T* y) {
  set_algorithm("rows");
  const CombineRows<T> combine = NNARCH_SELECT(combine_rows<T>());
  const int64_t n = w.size(0);
  if (x.m <= kFewRows) {
    constexpr int64_t run = 4096 / static_cast<int64_t>(sizeof(T));
    parallel_tasks(ceil_div(n, run), [&](int64_t task) {
      const int64_t first = task * run;
      combine(data<T>(x.tensor), x.stride, 1, x.m, x.depth, data<T>(w) + first, w.stride(1),
              std::min(run, n - first), y + first, n);
    });
    return;
  }
  constexpr int64_t run = 32;
  parallel_tasks(ceil_div(x.m, run), [&](int64_t task) {
    const int64_t first = task * run;
    combine(data<T>(x.tensor) + first * x.stride, x.stride, 1, std::min(run, x.m - first), x.depth,
            data<T>(w), w.stride(1), n, y + first * n, n);
  });
}

template <class T>
bool is_identity(const Epilogue<T>& e) {
  return !e.scale && !e.shift && !e.residual && e.activation == kNone;
}

template <class T>
GridImage<T> row_image(const Rows& x) {
  return {data<T>(x.tensor), 1, x.m, x.stride, 1, 1, x.m, 0, 1, {{0, 0}}, x.depth};
}

template <class T>
void packed_gemm(const Rows& x, const T* packed, int64_t n, T* y, const Epilogue<T>& epilogue) {
  set_algorithm("gemm_packed");
  gather_gemm<T>(row_image<T>(x), packed, n, y, {0, 0, n}, epilogue);
}

// Unpacked weights, used for too few rows to pay for a packed copy in memory: each task packs a few
// panels into cache and takes all rows past them.
template <class T>
void pack_and_multiply(const Rows& x, const Tensor& w, T* y, const Epilogue<T>& epilogue) {
  set_algorithm("gemm");
  const GemmTable<T>& table = gemm<T>();
  const WeightView<T> view = weight_view<T>(w);
  constexpr int64_t cache = int64_t{192} << 10;
  const int64_t panel_bytes = std::max<int64_t>(1, view.depth * table.nr * int64_t{sizeof(T)});
  const int64_t columns = table.nr * std::clamp<int64_t>(cache / panel_bytes, 1, 8);
  const bool stream = outgrows_caches<T>(y, x.m, view.columns);
  parallel_tasks(ceil_div(view.columns, columns), [&](int64_t task) {
    const int64_t first = task * columns, n = std::min(columns, view.columns - first);
    Scratch<T> packed(packed_size<T>(n, 1, view.depth));
    pack_columns<T>(view, first, n, packed.get());
    const Strip<T> rows{data<T>(x.tensor), 0, x.m};
    table.run({.depth = view.depth,
               .b = packed.get(),
               .c = y + first,
               .n = n,
               .epilogue = epilogue.from_channel(first),
               .stream = stream,
               .strips = &rows,
               .strip_count = 1,
               .a_step = x.stride,
               .c_step = view.columns});
  });
}

Tensor linear_pack(const Tensor& weight_in) {
  const Tensor weight = to_compute_type(weight_in);
  require(weight.dim() == 2, "linear_pack: weight must be 2-D");
  return with_scalar_type(weight.scalar_type(), "linear_pack", [&](auto scalar) {
    using T = decltype(scalar);
    const WeightView<T> view = weight_view<T>(weight);
    Tensor packed =
        new_contiguous({packed_size<T>(view.columns, 1, view.depth)}, weight.scalar_type());
    pack_weight(view, mutable_data<T>(packed));
    return packed;
  });
}

template <class T>
void run_linear(const Rows& x, const Tensor& weight, const OptTensor& packed, T* y,
                const Epilogue<T>& epilogue) {
  const int64_t n = weight.size(0);
  if (x.m == 0 || n == 0) return;
  if (x.m <= kFewRows && weight.stride(1) == 1 && x.depth > 0)
    return few_rows<T>(x, weight, y, epilogue);
  if ((x.m <= kFewRows || x.depth <= kFewRows) && x.depth > 0 && weight.stride(0) == 1 &&
      is_identity(epilogue))
    return rows_of_weights<T>(x, weight, y);
  if (packed) {
    require(packed->numel() == packed_size<T>(n, 1, x.depth) && packed->is_contiguous() &&
                packed->scalar_type() == weight.scalar_type(),
            "linear: packed does not belong to this weight");
    return packed_gemm<T>(x, data<T>(*packed), n, y, epilogue);
  }
  if (x.m > kManyRows) return packed_gemm<T>(x, data<T>(linear_pack(weight)), n, y, epilogue);
  pack_and_multiply<T>(x, weight, y, epilogue);
}

Tensor linear(const Tensor& x_in, const Tensor& weight_in, const OptTensor& bias,
              const OptTensor& scale, const OptTensor& shift, const OptTensor& residual,
              const OptTensor& packed, int64_t activation, double alpha) {
  const ScalarType type = x_in.scalar_type();
  require(x_in.dim() >= 1 && weight_in.dim() == 2, "linear: x must have a dimension, weight two");
  require(weight_in.scalar_type() == type, "linear: x and weight must have one dtype");
  require(x_in.size(x_in.dim() - 1) == weight_in.size(1), "linear: sizes do not match");
  IntList out = sizes_of(x_in);
  out.back() = weight_in.size(0);
  if (residual)
    require(sizes_of(*residual) == out && residual->scalar_type() == type,
            "linear: residual must have the shape and dtype of the output");
  check_epilogue({bias, scale, shift, residual, activation, alpha}, out.back(), type);
  const Tensor weight = to_compute_type(weight_in);
  const Rows x = as_rows(to_compute_type(x_in));
  const OptTensor b = to_compute_type(bias), sc = to_compute_type(scale),
                  sh = to_compute_type(shift);
  const OptTensor res =
      residual ? OptTensor(as_contiguous(to_compute_type(*residual))) : std::nullopt;
  const Tensor y = new_contiguous(out, weight.scalar_type());
  with_scalar_type(weight.scalar_type(), "linear", [&](auto scalar) {
    using T = decltype(scalar);
    const FoldedEpilogue<T> epilogue({b, sc, sh, res, activation, alpha}, out.back());
    run_linear<T>(x, weight, packed, mutable_data<T>(y), epilogue.get());
  });
  return to_type(y, type);
}

// A view of two dimensions on the rows, or with both exchanged.
Tensor two_dimensions(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride,
                      int64_t column_stride) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {row_stride, column_stride};
  AtenTensorHandle view;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &view));
  return Tensor(view);
}
Tensor transposed(const Rows& x) { return two_dimensions(x.tensor, x.depth, x.m, 1, x.stride); }

// a·bᵀ, of `size`.
template <class T>
Tensor product(const Tensor& a, const Tensor& b, const IntList& size) {
  const Tensor y = new_contiguous(size, a.scalar_type());
  run_linear<T>(as_rows(a), b, std::nullopt, mutable_data<T>(y), Epilogue<T>{});
  return y;
}

// The gradients of x, weight and bias where there is no more of an epilogue; those that `wanted`
// (bits 1, 2 and 4) leaves out are empty. Both products are linear's own on transposed views.
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_in, const Tensor& x_in,
                                                   const Tensor& weight_in, int64_t wanted) {
  const ScalarType type = x_in.scalar_type();
  require(x_in.dim() >= 1 && weight_in.dim() == 2 && grad_in.dim() == x_in.dim(),
          "linear_backward: grad and x must have as many dimensions, weight two");
  require(weight_in.scalar_type() == type && grad_in.scalar_type() == type,
          "linear_backward: grad, x and weight must have one dtype");
  IntList out = sizes_of(x_in);
  require(out.back() == weight_in.size(1), "linear_backward: sizes of x and weight do not match");
  out.back() = weight_in.size(0);
  require(sizes_of(grad_in) == out, "linear_backward: grad must have the size of the output");
  const Rows grad = as_rows(to_compute_type(grad_in)), x = as_rows(to_compute_type(x_in));
  const Tensor weight = to_compute_type(weight_in);
  return with_scalar_type(weight.scalar_type(), "linear_backward", [&](auto scalar) {
    using T = decltype(scalar);
    const Tensor g = two_dimensions(grad.tensor, grad.m, grad.depth, grad.stride, 1);
    const auto empty = [&] { return new_contiguous({0}, type); };
    const int64_t n = grad.depth, depth = x.depth;
    return std::make_tuple(
        wanted & 1
            ? to_type(product<T>(
                          g, two_dimensions(weight, depth, n, weight.stride(1), weight.stride(0)),
                          sizes_of(x_in)),
                      type)
            : empty(),
        wanted & 2 ? to_type(product<T>(transposed(grad), transposed(x), {n, depth}), type)
                   : empty(),
        wanted & 4 ? to_type(channel_sum(g), type) : empty());
  });
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(linear, ops) {
  ops.impl("linear_backward", TORCH_BOX(&nnarch::linear_backward));
  ops.impl("linear", TORCH_BOX(&nnarch::linear));
  ops.impl("linear_pack", TORCH_BOX(&nnarch::linear_pack));
}
