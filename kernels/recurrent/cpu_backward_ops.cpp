// The operations behind the gradients of layers and cells.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/registry.h"
#include "recurrent/cpu_backward.h"

namespace nnarch {
namespace {

using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Ten =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct LastGrads {
  const OptTensor &y, &h, &c;
};

void check_grads(const LastGrads& grads, const RecurrentArgs& a, const RecurrentSizes& s,
                 const Steps& steps, const Tensor& y, const Tensor& reserve) {
  IntList size = sizes_of(a.x);
  size.back() = s.out;
  const auto fits = [&](const Tensor& t, const IntList& sizes) {
    require(sizes_of(t) == sizes && t.scalar_type() == a.x.scalar_type(),
            "recurrent_scan_backward: a tensor does not fit");
  };
  fits(y, size);
  const int64_t width = checked_product(reserve_width(s.kind, a.norm.has_value()), s.hidden);
  fits(reserve, {steps.total(), width});
  if (grads.y) fits(*grads.y, size);
  if (grads.h) fits(*grads.h, {steps.batch(), s.out});
  if (grads.c) fits(*grads.c, {steps.batch(), s.kind == kLstm ? s.hidden : 0});
}

// The gradients, each in the shape of its argument, in the type of computation; empty where one is
// not wanted.
class Gradients {
 public:
  Gradients(const RecurrentArgs& a, ScalarType type, int64_t wanted, bool cell) {
    const auto add = [&](const Tensor* t) {
      const bool wants = t && wanted >> tensors_.size() & 1;
      tensors_.push_back(new_contiguous(wants ? sizes_of(*t) : IntList{0}, type));
      wanted_.push_back(wants);
    };
    const auto given = [](const OptTensor& t) { return t ? &*t : nullptr; };
    add(&a.x), add(given(a.h0)), add(given(a.c0)), add(&a.weight_ih), add(&a.weight_hh);
    add(given(a.bias_ih)), add(given(a.bias_hh));
    if (cell) return;  // every tensor costs a small cell half a microsecond
    add(given(a.weight_hr)), add(given(a.peephole)), add(given(a.norm));
  }

  template <class T>
  BackwardOutputs<T> pointers() const {
    const auto at = [&](size_t i) {
      return i < wanted_.size() && wanted_[i] ? mutable_data<T>(tensors_[i]) : nullptr;
    };
    return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9)};
  }

  // Where there are no rows: only the states have a gradient, that of the last ones.
  template <class T>
  void fill_without_rows() const {
    for (const Tensor& t : tensors_) std::fill_n(mutable_data<T>(t), t.numel(), T{0});
  }

  Ten take(ScalarType type) const {
    const auto t = [&](size_t i) { return to_type(tensors_[i], type); };
    return {t(0), t(1), t(2), t(3), t(4), t(5), t(6), t(7), t(8), t(9)};
  }
  Seven take_of_cell(ScalarType type) const {
    const auto t = [&](size_t i) { return to_type(tensors_[i], type); };
    return {t(0), t(1), t(2), t(3), t(4), t(5), t(6)};
  }

 private:
  std::vector<Tensor> tensors_;
  std::vector<bool> wanted_;
};

// The gradients of a layer, or of a cell.
Gradients backward(const RecurrentArgs& a, const LastGrads& grads, const Tensor& y,
                   const Tensor& reserve, bool reverse, double eps, int64_t wanted, bool cell) {
  const Steps steps(a.x, a.batch_sizes, reverse);
  const RecurrentSizes sizes(a, steps);
  check_grads(grads, a, sizes, steps, y, reserve);
  set_algorithm("recurrent_backward");
  const Tensor rows = with_dense_rows(a.x), out = *as_dense(y), kept = *as_dense(reserve);
  const Tensor w_ih = *as_dense(a.weight_ih), w_hh = *as_dense(a.weight_hh);
  const OptTensor w_hr = as_dense(a.weight_hr), p = as_dense(a.peephole), n = as_dense(a.norm);
  const OptTensor h = as_dense(a.h0), c = as_dense(a.c0), dy = to_compute_type(grads.y);
  const OptTensor dh = as_dense(grads.h), dc = as_dense(grads.c);
  const Gradients gradients(a, rows.scalar_type(), wanted, cell);
  with_scalar_type(rows.scalar_type(), "recurrent_scan_backward", [&](auto scalar) {
    using T = decltype(scalar);
    const BackwardInputs<T> in{
        sizes,
        InputRows<T>(rows, steps),
        data_or_null<T>(h),
        data_or_null<T>(c),
        data<T>(w_ih),
        data<T>(w_hh),
        data_or_null<T>(w_hr),
        data_or_null<T>(p),
        data_or_null<T>(n),
        data<T>(out),
        {mutable_data<T>(kept), sizes.hidden, reserve_width(a.kind, a.norm.has_value())},
        static_cast<T>(eps)};
    if (steps.total() == 0) gradients.fill_without_rows<T>();
    const BackwardOutputs<T> pointers = gradients.pointers<T>();
    RecurrentBackward<T>(steps, in, OutputGrad<T>(dy, steps), pointers)
        .run(data_or_null<T>(dh), a.kind == kLstm ? data_or_null<T>(dc) : nullptr);
  });
  return gradients;
}

Ten recurrent_scan_backward(const OptTensor& grad_y, const OptTensor& grad_h,
                            const OptTensor& grad_c, const Tensor& x, const OptTensor& h0,
                            const OptTensor& c0, const Tensor& weight_ih, const Tensor& weight_hh,
                            const OptTensor& bias_ih, const OptTensor& bias_hh,
                            const OptTensor& weight_hr, const OptTensor& peephole,
                            const OptTensor& norm, const OptTensor& batch_sizes, const Tensor& y,
                            const Tensor& reserve, int64_t kind, bool reverse, double eps,
                            int64_t wanted) {
  const RecurrentArgs args{x,       h0,        c0,       weight_ih, weight_hh,   bias_ih,
                           bias_hh, weight_hr, peephole, norm,      batch_sizes, kind};
  return backward(args, {grad_y, grad_h, grad_c}, y, reserve, reverse, eps, wanted, false)
      .take(x.scalar_type());
}

Seven recurrent_cell_backward(const OptTensor& grad_h, const OptTensor& grad_c, const Tensor& x,
                              const OptTensor& h, const OptTensor& c, const Tensor& weight_ih,
                              const Tensor& weight_hh, const OptTensor& bias_ih,
                              const OptTensor& bias_hh, const Tensor& after, const Tensor& reserve,
                              int64_t kind, int64_t wanted) {
  require(x.dim() == 2, "recurrent_cell_backward: x must be 2-D");
  static const OptTensor none;
  const RecurrentArgs args{x,       h,    c,    weight_ih, weight_hh, bias_ih,
                           bias_hh, none, none, none,      none,      kind};
  return backward(args, {grad_h, none, grad_c}, after, reserve, false, 0, wanted, true)
      .take_of_cell(x.scalar_type());
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(recurrent_backward, ops) {
  ops.impl("recurrent_scan_backward", TORCH_BOX(&nnarch::recurrent_scan_backward));
  ops.impl("recurrent_cell_backward", TORCH_BOX(&nnarch::recurrent_cell_backward));
}
