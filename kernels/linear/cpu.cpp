// linear on the CPU: y = act((x·wᵀ + bias)·scale + shift + residual).
#include <algorithm>
#include <tuple>
#include <type_traits>

#include "cpu/epilogue_fold.h"
#include "cpu/gather_gemm.h"
#include "cpu/pack_weight.h"
#include "cpu/registry.h"
#include "cpu/tensor.h"
#include "cpu/weight_grad.h"
#include "linear/cpu_half.h"
#include "linear/cpu_rows.h"
#include "normalization/cpu_sum.h"

namespace nnarch {
namespace {

template <class T>
GridImage<T> row_image(const Rows& x) {
  return {data<T>(x.tensor), 1, x.m, x.stride, 1, 1, x.m, 0, 1, {{0, 0}}, x.depth};
}

template <class T>
void packed_gemm(const Rows& x, const T* packed, int64_t n, T* y, const Epilogue<T>& epilogue) {
  set_algorithm("gemm_packed");
  gather_gemm<T>(row_image<T>(x), packed, n, y, {0, 0, n}, epilogue);
}

// Whether rows of a matrix lie across memory: the transposed view of a dense one.
bool is_transposed(const Tensor& t) {
  return t.dim() == 2 && t.stride(0) == 1 && t.stride(1) >= t.size(0) && t.size(0) > kFewRows &&
         t.size(1) > kFewRows;
}

// The product of two transposed matrices: what a weight's gradient is, x being the gradient of the
// output. A transposed copy of x in memory took a seventh of the time.
Tensor transposed_product(const Tensor& x, const Tensor& w) {
  set_algorithm("weight_grad");
  const int64_t positions = x.size(1), depth = w.size(0);
  const Tensor y = new_contiguous({x.size(0), depth}, x.scalar_type());
  with_scalar_type(x.scalar_type(), "linear", [&](auto scalar) {
    using T = decltype(scalar);
    const GridImage<T> image{data<T>(w), 1, positions, w.stride(1), 1,    1,
                             positions,  0, 1,         {{0, 0}},    depth};
    weight_grad<T>(
        GradView<T>{data<T>(x), x.stride(1), positions, x.size(0)}, 1, depth,
        [&] { return TapRows<T>(image, WeightGradPlan::positions); }, mutable_data<T>(y));
  });
  return y;
}

// A half-type weight, packed in parallel panels as `pack(view, column, columns, to)` does.
template <class E, class F>
Tensor half_packed(const Tensor& weight, int64_t size, int64_t panel, int64_t nr, ScalarType type,
                   const F& pack) {
  const Tensor packed = new_packed(size, type);
  E* to = mutable_data<E>(packed);
  const Tensor dense = dense_weight(weight);
  const HalfMatrix view = half_view(dense);
  const int64_t n = weight.size(0);
  parallel_tasks(ceil_div(n, nr),
                 [&](int64_t p) { pack(view, p * nr, std::min(nr, n - p * nr), to + p * panel); });
  return packed;
}

Tensor linear_pack(const Tensor& weight) {
  require(weight.dim() == 2, "linear_pack: weight must be 2-D");
  const ScalarType type = weight.scalar_type();
  const int64_t n = weight.size(0), depth = weight.size(1);
  if (takes_pairs(type))
    return half_packed<uint16_t>(weight, pairs_packed_size(n, depth),
                                 pairs()->nr * round_up(depth, 2), pairs()->nr, type, pack_pairs);
  return with_scalar_type(type, "linear_pack", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t size = packed_size<T>(n, 1, depth), nr = gemm<T>().nr;
    if constexpr (std::is_same_v<T, float>)
      if (is_half(type))
        return half_packed<float>(weight, size, nr * depth, nr, ScalarType::Float,
                                  pack_half_columns);
    const Tensor packed = new_packed(size, type);
    pack_weight(weight_view<T>(weight), mutable_data<T>(packed));
    return packed;
  });
}

constexpr const char* kForeign = "linear: packed does not belong to this weight";

template <class T>
void require_packed(const Tensor& packed, int64_t n, int64_t depth) {
  constexpr auto type = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
  require(packed.numel() == packed_size<T>(n, 1, depth) && packed.is_contiguous() &&
              packed.scalar_type() == type,
          kForeign);
}

template <class T>
void run_linear(const Rows& x, const Tensor& weight, const OptTensor& packed, T* y,
                const Epilogue<T>& epilogue) {
  const int64_t n = weight.size(0);
  if (x.m == 0 || n == 0) return;
  const WeightView<T> view = weight_view<T>(weight);
  // Few rows read a weight that lies dense in place, packed or not.
  const bool dense = weight.stride(1) == 1 || (weight.stride(0) == 1 && is_identity(epilogue));
  if (packed && (x.m > kFewRows || !dense)) {
    require_packed<T>(*packed, n, x.depth);
    return packed_gemm<T>(x, data<T>(*packed), n, y, epilogue);
  }
  if (const char* name = multiply_rows<T>({data<T>(x.tensor), x.stride, x.m, view, y, n, epilogue}))
    return set_algorithm(name);
  packed_gemm<T>(x, data<T>(linear_pack(weight)), n, y, epilogue);
}

void run_half_linear(const HalfProduct& p, const Tensor& weight, const OptTensor& packed) {
  if (p.m == 0 || p.n == 0) return;
  if (p.m <= kFewRows && weight.stride(1) == 1 && p.depth > 0) return few_half_rows(p, weight);
  // A weight that was packed before autocast rounded it is float32.
  const bool wide = packed && packed->scalar_type() == ScalarType::Float;
  if (takes_pairs(weight.scalar_type()) && !wide) {
    if (!packed) return pack_and_multiply_pairs(p, dense_weight(weight));
    require(packed->numel() == pairs_packed_size(p.n, p.depth) && packed->is_contiguous() &&
                packed->scalar_type() == weight.scalar_type(),
            kForeign);
    return packed_pairs(p, data<uint16_t>(*packed));
  }
  if (packed) {
    require_packed<float>(*packed, p.n, p.depth);
    return packed_half_gemm(p, data<float>(*packed));
  }
  pack_and_multiply_half(p, dense_weight(weight));
}

Tensor linear(const Tensor& x_in, const Tensor& weight, const OptTensor& bias,
              const OptTensor& scale, const OptTensor& shift, const OptTensor& residual,
              const OptTensor& packed, int64_t activation, double alpha) {
  const ScalarType type = x_in.scalar_type();
  require(x_in.dim() >= 1 && weight.dim() == 2, "linear: x must have a dimension, weight two");
  require(weight.scalar_type() == type, "linear: x and weight must have one dtype");
  require(x_in.size(x_in.dim() - 1) == weight.size(1), "linear: sizes do not match");
  IntList out = sizes_of(x_in);
  const int64_t n = out.back() = weight.size(0);
  if (residual)
    require(sizes_of(*residual) == out && residual->scalar_type() == type,
            "linear: residual must have the shape and dtype of the output");
  check_epilogue({bias, scale, shift, residual, activation, alpha}, n, type);
  const bool plain = !packed && !bias && !scale && !shift && !residual && activation == kNone;
  if (plain && !is_half(type) && is_transposed(x_in) && is_transposed(weight))
    return transposed_product(x_in, weight);
  const Rows x = as_rows(x_in);
  const OptTensor b = to_compute_type(bias), sc = to_compute_type(scale),
                  sh = to_compute_type(shift);
  const OptTensor res = residual ? OptTensor(as_contiguous(*residual)) : std::nullopt;
  const Tensor y = new_contiguous(out, type);
  with_scalar_type(type, "linear", [&](auto scalar) {
    using T = decltype(scalar);
    if constexpr (std::is_same_v<T, float>)
      if (is_half(type)) {
        const FoldedEpilogue<float> epilogue({b, sc, sh, std::nullopt, activation, alpha}, n);
        return run_half_linear(
            {Stored(x.tensor), Stored(res), Stored(y), x.m, x.depth, x.stride, n, epilogue.get()},
            weight, packed);
      }
    const FoldedEpilogue<T> epilogue({b, sc, sh, res, activation, alpha}, n);
    run_linear<T>(x, weight, packed, mutable_data<T>(y), epilogue.get());
  });
  return y;
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
Tensor product(const Tensor& a, const Tensor& b, const IntList& size) {
  const auto none = std::nullopt;
  return torch::stable::view(linear(a, b, none, none, none, none, none, kNone, 0.0), size);
}

// The gradients of x, weight and bias where there is no more of an epilogue; those that `wanted`
// (bits 1, 2 and 4) leaves out are empty. Both products are linear's own on transposed views.
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_in, const Tensor& x_in,
                                                   const Tensor& weight, int64_t wanted) {
  const ScalarType type = x_in.scalar_type();
  require(x_in.dim() >= 1 && weight.dim() == 2 && grad_in.dim() == x_in.dim(),
          "linear_backward: grad and x must have as many dimensions, weight two");
  require(weight.scalar_type() == type && grad_in.scalar_type() == type,
          "linear_backward: grad, x and weight must have one dtype");
  IntList out = sizes_of(x_in);
  require(out.back() == weight.size(1), "linear_backward: sizes of x and weight do not match");
  out.back() = weight.size(0);
  require(sizes_of(grad_in) == out, "linear_backward: grad must have the size of the output");
  const Rows grad = as_rows(grad_in), x = as_rows(x_in);
  const int64_t n = grad.depth, depth = x.depth;
  const Tensor g = two_dimensions(grad.tensor, grad.m, n, grad.stride, 1);
  const auto empty = [&] { return new_contiguous({0}, type); };
  return std::make_tuple(
      wanted & 1 ? product(g, two_dimensions(weight, depth, n, weight.stride(1), weight.stride(0)),
                           sizes_of(x_in))
                 : empty(),
      wanted & 2 ? product(transposed(grad), transposed(x), {n, depth}) : empty(),
      wanted & 4 ? channel_sum(g) : empty());
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(linear, ops) {
  ops.impl("linear_backward", TORCH_BOX(&nnarch::linear_backward));
  ops.impl("linear", TORCH_BOX(&nnarch::linear));
  ops.impl("linear_pack", TORCH_BOX(&nnarch::linear_pack));
}
