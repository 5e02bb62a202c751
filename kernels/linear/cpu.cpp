// linear on the CPU: y = act((x·wᵀ + bias)·scale + shift + residual).
#include <algorithm>
#include <tuple>
#include <type_traits>

#include "cpu/epilogue_fold.h"
#include "cpu/gather_gemm.h"
#include "cpu/machine.h"
#include "cpu/pack_weight.h"
#include "cpu/registry.h"
#include "cpu/tensor.h"
#include "cpu/weight_grad.h"
#include "linear/cpu_combine.h"
#include "linear/cpu_half.h"
#include "linear/cpu_rows.h"
#include "linear/cpu_turned.h"
#include "linear/cpu_unpacked.h"
#include "normalization/cpu_sum.h"

namespace nnarch {
namespace {

// Few rows: every weight is read once, in place.
template <class T>
void few_rows(const Rows& x, const Tensor& w, T* y, const Epilogue<T>& epilogue) {
  set_algorithm("gemv");
  // Four rows of x go past a task's weights at a time; the next four find them in cache.
  constexpr int64_t cache = int64_t{256} << 10;
  const int64_t n = w.size(0), in_cache = cache / (x.depth * int64_t{sizeof(T)});
  const int64_t run = x.m <= kFewRows ? std::clamp<int64_t>(in_cache, 64, 256)
                                      : std::clamp<int64_t>(in_cache, 8, 64);
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

// Threads share the columns in ranges of any width: an output's sum is cut by its depth only.
template <class T>
void multiply_unpacked(const Rows& x, const Tensor& w, T* y) {
  set_algorithm("unpacked");
  constexpr int64_t unit = 64;
  const int64_t n = w.size(0);
  const UnpackedColumns<T> columns(data<T>(x.tensor), x.stride, x.m, x.depth, data<T>(w),
                                   w.stride(1), y, n);
  parallel_ranges(ceil_div(n, unit), [&](int64_t begin, int64_t end) {
    columns.run(begin * unit, std::min(end * unit, n));
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

// How a task packs unpacked weights for itself: so many columns of so deep a part of the sum stay
// in cache, and so many rows go past them at a time. A large second-level cache holds enough for
// any number of rows; with a small one many rows are worth a packed copy in memory.
struct PackedInCache {
  int64_t columns, rows, parts;

  static bool serves(int64_t m) { return m <= kManyRows || roomy(); }

  PackedInCache(int64_t depth, int64_t nr, int64_t mr, int64_t element) {
    const int64_t longest = 4096 / element;
    parts = roomy() && depth > longest * 3 / 2 ? ceil_div(depth, longest) : 1;
    const int64_t row_bytes = std::max<int64_t>(1, ceil_div(depth, parts) * element);
    const int64_t panels = (roomy() ? kRoomyBytes : kBytes) / (row_bytes * nr);
    columns = nr * std::clamp<int64_t>(panels, 1, 8);
    rows = std::max(round_up(kBytes / row_bytes, mr), 4 * mr);
  }

 private:
  static constexpr int64_t kBytes = int64_t{192} << 10, kRoomyBytes = int64_t{1} << 20;
  static bool roomy() { return l2_bytes() >= int64_t{2} << 20; }
};

// Columns [first, first + n) of the product, all rows past `packed`, which has a part of their sum.
template <class T>
struct PackedColumns {
  const T* packed;
  int64_t first, n, from, depth;
  bool begins, ends;  // the sum
};

template <class T>
void multiply_columns(const Rows& x, const PackedColumns<T>& b, int64_t block_rows, T* y,
                      int64_t y_step, const Epilogue<T>& epilogue, bool stream) {
  const bool copies = copies_rows<T>(x.stride, b.n, b.depth);
  Scratch<T> room(copies ? room_for<T>(std::min(block_rows, x.m), b.depth) : 0);
  for (int64_t row = 0; row < x.m; row += block_rows) {
    const Strip<T> rows{data<T>(x.tensor) + row * x.stride + b.from, row * y_step,
                        std::min(block_rows, x.m - row)};
    gemm<T>().run({.depth = b.depth,
                   .b = b.packed,
                   .c = y + b.first,
                   .n = b.n,
                   .accumulate = !b.begins,
                   .epilogue = b.ends ? epilogue.from_channel(b.first) : Epilogue<T>{},
                   .stream = stream && b.begins && b.ends,
                   .strips = &rows,
                   .strip_count = 1,
                   .a_step = x.stride,
                   .c_step = y_step,
                   .room = copies ? room.get() : nullptr});
  }
}

// Unpacked weights: each task packs a few panels into cache and takes all rows past them.
template <class T>
void pack_and_multiply(const Rows& x, const Tensor& w, T* y, const Epilogue<T>& epilogue) {
  set_algorithm("gemm");
  const GemmTable<T>& table = gemm<T>();
  const WeightView<T> whole = weight_view<T>(w);
  const PackedInCache block(whole.depth, table.nr, table.mr, sizeof(T));
  const bool stream = outgrows_caches<T>(y, x.m, whole.columns);
  parallel_tasks(ceil_div(whole.columns, block.columns), [&](int64_t task) {
    const int64_t first = task * block.columns, n = std::min(block.columns, whole.columns - first);
    Scratch<T> packed(packed_size<T>(n, 1, ceil_div(whole.depth, block.parts)));
    for (int64_t part = 0; part < block.parts; ++part) {
      WeightView<T> view = whole;
      const int64_t from = whole.depth * part / block.parts;
      view.data += from * view.depth_stride;
      view.depth = whole.depth * (part + 1) / block.parts - from;
      pack_columns<T>(view, first, n, packed.get());
      multiply_columns<T>(
          x, {packed.get(), first, n, from, view.depth, part == 0, part + 1 == block.parts},
          block.rows, y, whole.columns, epilogue, stream);
    }
  });
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
  const bool dense_rows = weight.stride(1) == 1 && x.depth > 0;
  const bool dense_columns = weight.stride(0) == 1 && x.depth > 0 && is_identity(epilogue);
  if (x.m <= (packed ? kFewRows : kFewUnpackedRows) && dense_rows)
    return few_rows<T>(x, weight, y, epilogue);
  if ((x.m <= kFewRows || x.depth <= kFewRows) && dense_columns)
    return rows_of_weights<T>(x, weight, y);
  if (packed) {
    require_packed<T>(*packed, n, x.depth);
    return packed_gemm<T>(x, data<T>(*packed), n, y, epilogue);
  }
  if (x.m <= kTurnedRows && dense_rows) return multiply_turned<T>(x, weight, y, epilogue);
  if (serves_unpacked(x.m, n, x.depth) && dense_columns) return multiply_unpacked<T>(x, weight, y);
  if (PackedInCache::serves(x.m)) return pack_and_multiply<T>(x, weight, y, epilogue);
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
