// Recurrent layers on the CPU: the forward of layers and cells, and packed weights.
#include <exception>
#include <optional>
#include <tuple>

#include "cpu/registry.h"
#include "recurrent/cpu_forward.h"

namespace nnarch {
namespace {

// --------------------------------------------------------------------------- packed weights

Tensor recurrent_pack(const Tensor& weight_ih, const Tensor& weight_hh, const OptTensor& weight_hr,
                      int64_t kind, bool bfloat16, bool pairs) {
  require(kind >= 0 && kind <= kGru, "recurrent_pack: unknown kind");
  const int64_t gates = gate_count(kind);
  require(weight_ih.dim() == 2 && weight_hh.dim() == 2 && (!weight_hr || weight_hr->dim() == 2),
          "recurrent_pack: weights must be 2-D");
  const ScalarType type = weight_ih.scalar_type();
  require(weight_hh.scalar_type() == type && (!weight_hr || weight_hr->scalar_type() == type),
          "recurrent_pack: dtypes differ");
  const int64_t hidden = weight_ih.size(0) / gates, out = weight_hh.size(1);
  require(
      weight_ih.size(0) % gates == 0 && weight_hh.size(0) == weight_ih.size(0) &&
          (weight_hr ? kind == kLstm && weight_hr->size(0) == out && weight_hr->size(1) == hidden
                     : out == hidden),
      "recurrent_pack: weights do not fit");
  const Tensor ih = with_dense_rows_of(weight_ih), hh = with_dense_rows_of(weight_hh);
  const OptTensor hr = with_dense_rows_of(weight_hr);
  require(!bfloat16 || ih.scalar_type() != ScalarType::Double,
          "recurrent_pack: bfloat16 is for float32 weights");
  require(!(bfloat16 && pairs), "recurrent_pack: pairs have no bfloat16 form");
  return with_scalar_type(ih.scalar_type(), "recurrent_pack", [&](auto scalar) {
    using T = decltype(scalar);
    LayerWeights<T> weights(ih, hh, hr, kind);
    const int64_t size = weights.size(bfloat16), more = pairs ? weights.pairs_size() : 0;
    const Tensor packed = new_packed(checked_sum(size, more), ih.scalar_type());
    T* to = mutable_data<T>(packed);
    pack_all(weights, bfloat16, to);
    if constexpr (sizeof(T) == sizeof(float))
      if (more > 0) weights.read(to, false), pack_pairs(weights.ih, weights.hh, to + size);
    return packed;
  });
}

// ---------------------------------------------------------------------------------- forward

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrent_scan(
    const Tensor& x_in, const OptTensor& h0, const OptTensor& c0, const Tensor& weight_ih,
    const Tensor& weight_hh, const OptTensor& bias_ih, const OptTensor& bias_hh,
    const OptTensor& weight_hr, const OptTensor& peephole, const OptTensor& norm,
    const OptTensor& batch_sizes, const OptTensor& packed, int64_t kind, bool reverse, double eps,
    bool save) {
  const Steps steps(x_in, batch_sizes, reverse);
  const RecurrentArgs args{x_in,    h0,        c0,       weight_ih, weight_hh,   bias_ih,
                           bias_hh, weight_hr, peephole, norm,      batch_sizes, kind};
  const RecurrentSizes size(args, steps);
  const ScalarType given = x_in.scalar_type();
  const Tensor x = with_dense_rows(x_in);
  const ScalarType type = x.scalar_type();
  IntList y_sizes = sizes_of(x_in);
  y_sizes.back() = size.out;
  const int64_t width = save ? reserve_width(kind, norm.has_value()) : 0;
  const Outputs outputs{new_contiguous(y_sizes, type),
                        new_contiguous({steps.batch(), size.out}, type),
                        new_contiguous({steps.batch(), kind == kLstm ? size.hidden : 0}, type),
                        new_contiguous({steps.total(), checked_product(width, size.hidden)}, type)};
  if (steps.batch() > 0 && size.hidden > 0)
    with_scalar_type(type, "recurrent_scan", [&](auto scalar) {
      using T = decltype(scalar);
      forward<T>(args, x, packed, steps, size, static_cast<T>(eps), outputs);
    });
  return {to_type(outputs.y, given), to_type(*outputs.h, given), to_type(outputs.c, given),
          to_type(outputs.reserve, given)};
}

// One step: a short list of arguments and results, which are what a small cell's call costs.
std::tuple<Tensor, Tensor, Tensor> recurrent_cell(const Tensor& x_in, const OptTensor& h,
                                                  const OptTensor& c, const Tensor& weight_ih,
                                                  const Tensor& weight_hh, const OptTensor& bias_ih,
                                                  const OptTensor& bias_hh, const OptTensor& packed,
                                                  int64_t kind, bool save) {
  require(x_in.dim() == 2, "recurrent_cell: x must be 2-D");
  static const OptTensor none;
  const Steps steps(x_in, none, false);
  const RecurrentArgs args{x_in,    h,    c,    weight_ih, weight_hh, bias_ih,
                           bias_hh, none, none, none,      none,      kind};
  const RecurrentSizes size(args, steps);
  const ScalarType given = x_in.scalar_type();
  const Tensor x = with_dense_rows(x_in);
  const ScalarType type = x.scalar_type();
  const int64_t width = save ? reserve_width(kind, false) : 0;
  const Outputs outputs{new_contiguous({steps.batch(), size.hidden}, type), std::nullopt,
                        new_contiguous({steps.batch(), kind == kLstm ? size.hidden : 0}, type),
                        new_contiguous({steps.batch(), checked_product(width, size.hidden)}, type)};
  if (steps.batch() > 0 && size.hidden > 0)
    with_scalar_type(type, "recurrent_cell", [&](auto scalar) {
      using T = decltype(scalar);
      forward<T>(args, x, packed, steps, size, T{0}, outputs);
    });
  return {to_type(outputs.y, given), to_type(outputs.c, given), to_type(outputs.reserve, given)};
}

}  // namespace
}  // namespace nnarch

// Whether steps of so many rows are faster with weights packed for pairs. Not for sizes past int64.
extern "C" __attribute__((visibility("default"))) int nnarch_recurrent_pairs(
    int64_t gates, int64_t hidden, int64_t in, int64_t out, int64_t rows) {
  using namespace nnarch;
  try {
    if (precision() == Precision::highest || !pairs_serve(gates, hidden, in, out)) return false;
    const int64_t bytes = gates * hidden * (in + out) * int64_t{sizeof(float)};
    return rows >= least_pair_rows(bytes) && multiplies_at_once(bytes, true, rows);
  } catch (const std::exception&) {
    return false;
  }
}

NNARCH_OPS(recurrent, ops) {
  ops.impl("recurrent_scan", TORCH_BOX(&nnarch::recurrent_scan));
  ops.impl("recurrent_cell", TORCH_BOX(&nnarch::recurrent_cell));
  ops.impl("recurrent_pack", TORCH_BOX(&nnarch::recurrent_pack));
}
