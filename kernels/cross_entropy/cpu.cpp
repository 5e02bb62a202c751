// cross_entropy of logits on the CPU: one pass over them, one more for the gradient.
#include "cpu/arena.h"
#include "cpu/first_output.h"
#include "cpu/registry.h"
#include "cross_entropy/cpu_args.h"
#include "cross_entropy/cpu_passes.h"

namespace nnarch {
namespace {

constexpr int64_t kWantLogits = 1, kWantTarget = 2;

// The arguments in the type that is computed in and the order that kernels read, and their views.
template <class T>
struct LogitArguments {
  Order order;
  Tensor x;
  OptTensor q, weight;
  LossOptions options;
  std::optional<Indices> indices;
  Loss<T> loss;
  LogitLoss<T> problem;

  LogitArguments(const char* op, const Tensor& x_in, const Tensor& target_in,
                 const OptTensor& weight_in, const LossOptions& o)
      : order(order_of(x_in)),
        x(in_order(order, to_compute_type(x_in))),
        weight(dense(weight_in)),
        options(o),
        indices(target_in.scalar_type() == ScalarType::Long
                    ? std::optional<Indices>(std::in_place, target_in)
                    : std::nullopt),
        loss(options, targets(op)),
        problem{LogitView<T>(x, order), {}, {}, indices ? indices->get() : nullptr, loss} {
    problem.factors = {weights(), nullptr, 0, T{0}, static_cast<T>(options.rest())};
    if (indices) return;
    q = in_order(order, to_compute_type(target_in));
    problem.q = LogitView<T>(*q, order);
    problem.factors.of_target = static_cast<T>(options.of_target());
  }
  LogitArguments(const LogitArguments&) = delete;

  // Σ a, the same for all positions but where targets are probabilities.
  double total() const {
    double sum = 0;
    for (int64_t c = 0; problem.factors.any() && !q && c < options.classes; ++c)
      sum += options.rest() * (problem.factors.weight ? problem.factors.weight[c] : 1);
    return sum;
  }

 private:
  const T* weights() const { return weight ? data<T>(*weight) : nullptr; }
  Targets<T> targets(const char* op) const {
    const int64_t positions = x.numel() / x.size(1);
    return indices ? Targets<T>(op, indices->get(), positions, weights(), options)
                   : Targets<T>(positions, options);
  }
};

void check_logits(const char* op, const Tensor& x, const Tensor& target, const OptTensor& weight) {
  const ScalarType type = x.scalar_type();
  bool fits =
      (x.dim() == 2 || x.dim() == 3) && x.size(1) > 0 && is_class_weight(weight, x.size(1), type);
  if (fits && target.scalar_type() == ScalarType::Long)
    fits = target.dim() == 1 && target.size(0) == x.numel() / x.size(1);
  else if (fits)
    fits = target.scalar_type() == type && sizes_of(target) == sizes_of(x);
  if (!fits) throw std::runtime_error(std::string(op) + ": arguments do not fit together");
}

Tensor nothing(ScalarType type) { return new_contiguous({0}, type); }

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& x, const Tensor& target,
                                                 const OptTensor& weight, int64_t ignore_index,
                                                 double smoothing, double z_loss, int64_t reduction,
                                                 int64_t wanted) {
  const bool alone = takes_first_output_alone() && wanted == 0;
  const char* op = "cross_entropy";
  check_logits(op, x, target, weight);
  const LossOptions o = loss_options(op, ignore_index, smoothing, z_loss, reduction, x.size(1));
  require(wanted == 0 || (o.reduction != Reduction::none && wanted == kWantLogits),
          "cross_entropy: such gradients are backward's");
  const ScalarType type = x.scalar_type();
  return with_scalar_type(type, op, [&](auto scalar) {
    using T = decltype(scalar);
    const LogitArguments<T> args(op, x, target, weight, o);
    const ScalarType compute = args.x.scalar_type();
    const int64_t positions = args.problem.x.positions();
    const Tensor loss =
        new_contiguous(args.loss.reduces() ? IntList{} : IntList{positions}, compute);
    const Tensor lse = alone ? loss : new_contiguous({positions}, ScalarType::Double);
    const Scratch<double> unseen(alone ? positions : 0);
    const Tensor dx = alone ? loss : wanted ? new_in(args.order, x, compute) : nothing(compute);
    const LogitResults<T> to{mutable_data<T>(loss),
                             alone ? unseen.get() : mutable_data<double>(lse),
                             wanted ? LogitView<T>(dx, args.order) : LogitView<T>(),
                             {},
                             nullptr,
                             false};
    const double sum = RowPass<T>::suits(args.problem)
                           ? run_forward(args.problem, RowPass<T>(args.problem, to))
                           : run_forward(args.problem, TilePass<T>(args.problem, to));
    if (args.loss.reduces()) *to.loss = static_cast<T>(args.loss.reduced(sum));
    const Tensor result = to_type(loss, type);
    return std::make_tuple(result, lse, alone ? result : to_type(dx, type));
  });
}

std::tuple<Tensor, Tensor> cross_entropy_backward(const Tensor& grad, const Tensor& x,
                                                  const Tensor& target, const OptTensor& weight,
                                                  const Tensor& lse, int64_t ignore_index,
                                                  double smoothing, double z_loss,
                                                  int64_t reduction, int64_t wanted) {
  const char* op = "cross_entropy_backward";
  check_logits(op, x, target, weight);
  const LossOptions o = loss_options(op, ignore_index, smoothing, z_loss, reduction, x.size(1));
  const ScalarType type = x.scalar_type();
  const bool each = o.reduction == Reduction::none;
  const int64_t positions = x.numel() / x.size(1);
  require(grad.scalar_type() == type && lse.dim() == 1 && lse.size(0) == positions &&
              lse.scalar_type() == ScalarType::Double && grad.dim() == (each ? 1 : 0) &&
              (!each || grad.size(0) == positions) &&
              (!(wanted & kWantTarget) || target.scalar_type() == type),
          "cross_entropy_backward: grad and lse do not belong to this loss");
  return with_scalar_type(type, op, [&](auto scalar) {
    using T = decltype(scalar);
    const LogitArguments<T> args(op, x, target, weight, o);
    const ScalarType compute = args.x.scalar_type();
    const Tensor upstream = as_contiguous(to_compute_type(grad)), sums = as_contiguous(lse);
    const auto result = [&](int64_t bit) {
      return wanted & bit ? new_in(args.order, x, compute) : nothing(compute);
    };
    const auto view = [&](int64_t bit, const Tensor& t) {
      return wanted & bit ? LogitView<T>(t, args.order) : LogitView<T>();
    };
    const Tensor dx = result(kWantLogits), dq = result(kWantTarget);
    const LogitResults<T> to{nullptr,
                             mutable_data<double>(sums),
                             view(kWantLogits, dx),
                             view(kWantTarget, dq),
                             data<T>(upstream),
                             each};
    if (RowPass<T>::suits(args.problem))
      run_backward(args.problem, RowPass<T>(args.problem, to), args.total());
    else
      run_backward(args.problem, TilePass<T>(args.problem, to), args.total());
    return std::make_tuple(to_type(dx, type), to_type(dq, type));
  });
}

// x[i] * factor for tensors that lie dense.
void scale_all(const Tensor& from, double factor, const Tensor& to) {
  with_scalar_type(from.scalar_type(), "cross_entropy_scale", [&](auto scalar) {
    using T = decltype(scalar);
    const T* x = data<T>(from);
    T* y = mutable_data<T>(to);
    const int64_t n = from.numel();
    constexpr int64_t run = 1 << 16;
    parallel_tasks(ceil_div(n, run), [&](int64_t task) {
      const int64_t i = task * run;
      softmax<T>().scale(x + i, static_cast<T>(factor), y + i, std::min(run, n - i));
    });
  });
}

// Gradients that are ready, times the gradient of the loss. `like` is what they belong to.
Tensor cross_entropy_scale(const Tensor& grad, const Tensor& ready, const OptTensor&) {
  require(grad.dim() == 0, "cross_entropy_scale: grad must be a scalar");
  const Tensor x = as_contiguous(to_compute_type(ready));
  const Tensor g = torch::stable::to(grad, ScalarType::Double);
  const Tensor y = new_contiguous(sizes_of(x), x.scalar_type());
  scale_all(x, *data<double>(g), y);
  return to_type(y, ready.scalar_type());
}

// The same in place. `x` lies dense, in any order.
void cross_entropy_scale_(Tensor x, double factor) {
  if (!is_half(x.scalar_type())) return scale_all(x, factor, x);
  const Tensor wide = to_compute_type(x);
  scale_all(wide, factor, wide);
  torch::stable::copy_(x, wide);
}

// What a node of autograd calls: in place, and the same tensor, unless `keep`.
Tensor cross_entropy_ready(const Tensor& grad, const Tensor& ready, bool keep) {
  require(grad.dim() == 0, "cross_entropy_ready: grad must be a scalar");
  const ScalarType type = grad.scalar_type();
  double factor;
  if (type == ScalarType::Float)
    factor = *data<float>(grad);
  else if (type == ScalarType::Double)
    factor = *data<double>(grad);
  else
    factor = *data<double>(torch::stable::to(grad, ScalarType::Double));
  if (keep) return cross_entropy_scale(grad, ready, std::nullopt);
  if (factor != 1) cross_entropy_scale_(ready, factor);
  return ready;
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(cross_entropy, ops) {
  ops.impl("cross_entropy_ready", TORCH_BOX(&nnarch::cross_entropy_ready));
  ops.impl("cross_entropy", TORCH_BOX(&nnarch::cross_entropy));
  ops.impl("cross_entropy_backward", TORCH_BOX(&nnarch::cross_entropy_backward));
  ops.impl("cross_entropy_scale", TORCH_BOX(&nnarch::cross_entropy_scale));
  ops.impl("cross_entropy_scale_", TORCH_BOX(&nnarch::cross_entropy_scale_));
}
