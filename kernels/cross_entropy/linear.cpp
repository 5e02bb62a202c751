// linear_cross_entropy on the CPU. No more than a chunk of samples has all its logits in memory.
#include "cpu/registry.h"
#include "cross_entropy/cpu_args.h"
#include "cross_entropy/cpu_linear_grad.h"

namespace nnarch {
namespace {

constexpr int64_t kWantX = 1, kWantWeight = 2, kWantBias = 4;

// The arguments in the type that is computed in, and views of them.
template <class T>
struct LinearArguments {
  Tensor x, weight;
  OptTensor bias, class_weight;
  LinearLogits<T> logits;
  LossOptions options;
  Indices indices;
  const int64_t* target;
  Targets<T> targets;
  ClassFactors<T> factors;
  Loss<T> loss;

  LinearArguments(const char* op, const Tensor& x_in, const Tensor& weight_in,
                  const OptTensor& bias_in, const Tensor& target_in,
                  const OptTensor& class_weight_in, const LossOptions& o)
      : x(dense_rows(x_in)),
        weight(dense_rows(weight_in)),
        bias(dense(bias_in)),
        class_weight(dense(class_weight_in)),
        logits{Stored(x),
               0,
               x.stride(0),
               x.size(0),
               x.size(1),
               Stored(weight),
               weight.stride(0),
               weight.size(0),
               bias ? data<T>(*bias) : nullptr},
        options(o),
        indices(target_in),
        target(indices.get()),
        targets(op, target, logits.samples, class_weight ? data<T>(*class_weight) : nullptr,
                options),
        factors{class_weight ? data<T>(*class_weight) : nullptr, nullptr, 0, T{0},
                static_cast<T>(options.rest())},
        loss(options, targets) {}
  LinearArguments(const LinearArguments&) = delete;
};

// Samples whose logits are in memory at a time: 32 MB of them, or a third of the weight, whose
// gradient is in memory anyway, and which every chunk reads twice.
template <class T>
int64_t chunk_of(const LinearLogits<T>& p) {
  const int64_t weight = checked_product(p.classes, p.depth) * int64_t{sizeof(T)};
  const int64_t most = std::max(int64_t{32} << 20, weight / 3);
  const int64_t rows = std::clamp<int64_t>(most / (p.classes * int64_t{sizeof(T)}), 64, 512);
  const int64_t chunks = std::max<int64_t>(1, ceil_div(p.samples, rows));
  return std::min(p.samples, round_up(ceil_div(p.samples, chunks), gemm<T>().nr));
}

// Sees every tile; `keep` holds all the logits, or is null.
template <class T>
void observe_all(const LinearArguments<T>& args, const LinearLogits<T>& p, const int64_t* target,
                 const ClassTiles& tiles, const Statistics<T>& statistics, T* keep, int64_t step) {
  const LogitTiles<T> logits(p);
  parallel_tasks(tiles.groups, [&](int64_t group) {
    Scratch<T> scratch(keep ? 0 : ClassTiles::kTile * step);
    tiles.each(group, [&](int64_t first, int64_t classes) {
      T* z = keep ? keep + first * step : scratch.get();
      logits.compute(first, classes, z, step, [&](const T* block, int64_t n, int64_t columns) {
        statistics.observe(group, block, step, first, classes, n, columns, args.factors,
                           target + n);
      });
    });
  });
}

struct LossSink {
  double sum = 0;
  template <class T>
  void put(const Loss<T>& loss, int64_t i, double value, T* each) {
    if (loss.reduces())
      sum += value;
    else
      each[i] = static_cast<T>(value);
  }
};

template <class T>
void forward_only(const LinearArguments<T>& args, T* loss, double* lse) {
  constexpr int64_t most = 1024;
  const LinearLogits<T>& all = args.logits;
  const ClassTiles tiles(all.classes);
  LossSink sink;
  for (int64_t first = 0; first < all.samples; first += most) {
    const LinearLogits<T> p = all.rows(first, std::min(most, all.samples - first));
    const Statistics<T> statistics(tiles, p.samples, args.factors.any());
    observe_all(args, p, args.target + first, tiles, statistics, static_cast<T*>(nullptr),
                padded_step<T>(p.samples));
    for (int64_t i = 0; i < p.samples; ++i) {
      const Seen seen = statistics.of(i);
      sink.put(args.loss, first + i, args.loss.value(first + i, seen), loss);
      lse[first + i] = seen.lse.value();
    }
  }
  if (args.loss.reduces()) *loss = static_cast<T>(args.loss.reduced(sink.sum));
}

// The loss, and the gradients for a gradient of 1: three products, where a backward that knew
// nothing but the log-sum-exp would make the logits again.
template <class T>
void forward_and_gradients(const LinearArguments<T>& args, T* loss, double* lse,
                           const LinearGradients<T>& to) {
  const LinearLogits<T>& all = args.logits;
  const ClassTiles tiles(all.classes);
  const int64_t chunk = chunk_of(all), step = padded_step<T>(chunk);
  const Tensor memory =
      new_contiguous({checked_product(all.classes, step)}, compute_type(args.x.scalar_type()));
  T* z = mutable_data<T>(memory);
  Scratch<T> slope_memory(SlopeRows<T>::kArrays * chunk);
  const SlopeRows<T> slopes(slope_memory.get(), chunk);
  LossSink sink;
  for (int64_t first = 0; first < all.samples; first += chunk) {
    const LinearLogits<T> p = all.rows(first, std::min(chunk, all.samples - first));
    const int64_t* target = args.target + first;
    {
      const Statistics<T> statistics(tiles, p.samples, args.factors.any());
      observe_all(args, p, target, tiles, statistics, z, step);
      for (int64_t i = 0; i < p.samples; ++i) {
        const Seen seen = statistics.of(i);
        sink.put(args.loss, first + i, args.loss.value(first + i, seen), loss);
        lse[first + i] = seen.lse.value();
        slopes.set(i, seen.lse, args.loss.slopes(first + i, seen, 1.0));
      }
    }
    LinearGradients<T> part = to;
    if (to.dx) part.dx += first * all.depth;
    const TileGradients<T> gradients(p, tiles, part, first > 0, compute_type(args.x.scalar_type()));
    parallel_tasks(tiles.groups, [&](int64_t group) {
      gradients.add(group, step, slopes, args.factors, target,
                    [&](int64_t c, int64_t) { return z + c * step; });
    });
    gradients.finish();
  }
  *loss = static_cast<T>(args.loss.reduced(sink.sum));
}

// From the log-sum-exp, for any gradient: the logits are made again, tile by tile.
template <class T>
void backward(const LinearArguments<T>& args, const T* grad, bool each, const double* lse,
              const LinearGradients<T>& to) {
  constexpr int64_t most = 512;
  const LinearLogits<T>& all = args.logits;
  const ClassTiles tiles(all.classes);
  double total = 0;  // Σ a, the same for all samples
  for (int64_t c = 0; args.factors.any() && c < all.classes; ++c)
    total += args.options.rest() * (args.factors.weight ? args.factors.weight[c] : 1);
  Scratch<T> slope_memory(SlopeRows<T>::kArrays * std::min(most, all.samples));
  for (int64_t first = 0; first < all.samples; first += most) {
    const LinearLogits<T> p = all.rows(first, std::min(most, all.samples - first));
    const int64_t* target = args.target + first;
    const int64_t step = padded_step<T>(p.samples);
    const SlopeRows<T> slopes(slope_memory.get(), p.samples);
    for (int64_t i = 0; i < p.samples; ++i) {
      const Seen seen{LogSum::of_value<T>(lse[first + i]), 0, 0, total};
      slopes.set(i, seen.lse, args.loss.slopes(first + i, seen, grad[each ? first + i : 0]));
    }
    LinearGradients<T> part = to;
    if (to.dx) part.dx += first * all.depth;
    const LogitTiles<T> logits(p);
    const TileGradients<T> gradients(p, tiles, part, first > 0, compute_type(args.x.scalar_type()));
    parallel_tasks(tiles.groups, [&](int64_t group) {
      Scratch<T> z(ClassTiles::kTile * step);
      gradients.add(group, step, slopes, args.factors, target, [&](int64_t c, int64_t classes) {
        logits.compute(c, classes, z.get(), step, [](const T*, int64_t, int64_t) {});
        return z.get();
      });
    });
    gradients.finish();
  }
}

void check_linear(const char* op, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                  const Tensor& target, const OptTensor& class_weight) {
  const ScalarType type = x.scalar_type();
  const bool fits = x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) &&
                    weight.scalar_type() == type && is_vector(bias, weight.size(0), type) &&
                    is_class_weight(class_weight, weight.size(0), type) && weight.size(0) > 0 &&
                    target.scalar_type() == ScalarType::Long && target.dim() == 1 &&
                    target.size(0) == x.size(0);
  if (!fits) throw std::runtime_error(std::string(op) + ": arguments do not fit together");
}

// Gradients that are wanted are tensors like `x`, `weight` and `bias`; the others have no elements.
struct GradientTensors {
  Tensor dx, dw, db;

  GradientTensors(int64_t wanted, int64_t samples, int64_t depth, int64_t classes, ScalarType type)
      : dx(new_contiguous(wanted & kWantX ? IntList{samples, depth} : IntList{0}, type)),
        dw(new_contiguous(wanted & kWantWeight ? IntList{classes, depth} : IntList{0}, type)),
        db(new_contiguous(wanted & kWantBias ? IntList{classes} : IntList{0}, type)) {
    if (samples == 0) zero(dw), zero(db);
  }
  template <class T>
  LinearGradients<T> get(int64_t wanted) const {
    return {wanted & kWantX ? mutable_data<T>(dx) : nullptr,
            wanted & kWantWeight ? mutable_data<T>(dw) : nullptr,
            wanted & kWantBias ? mutable_data<T>(db) : nullptr};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& target,
    const OptTensor& class_weight, int64_t ignore_index, double smoothing, double z_loss,
    int64_t reduction, int64_t wanted) {
  const char* op = "linear_cross_entropy";
  check_linear(op, x, weight, bias, target, class_weight);
  const LossOptions options =
      loss_options(op, ignore_index, smoothing, z_loss, reduction, weight.size(0));
  require(wanted == 0 || options.reduction != Reduction::none,
          "linear_cross_entropy: gradients of unreduced losses are backward's");
  const ScalarType type = x.scalar_type();
  const ScalarType compute = compute_type(type);
  const int64_t n = x.size(0);
  return with_scalar_type(type, op, [&](auto scalar) {
    using T = decltype(scalar);
    const LinearArguments<T> args(op, x, weight, bias, target, class_weight, options);
    const Tensor loss = new_contiguous(args.loss.reduces() ? IntList{} : IntList{n}, compute);
    const Tensor lse = new_contiguous({n}, ScalarType::Double);
    const GradientTensors gradients(wanted, n, x.size(1), weight.size(0), compute);
    if (wanted)
      forward_and_gradients(args, mutable_data<T>(loss), mutable_data<double>(lse),
                            gradients.get<T>(wanted));
    else
      forward_only(args, mutable_data<T>(loss), mutable_data<double>(lse));
    return std::make_tuple(loss, lse, to_type(gradients.dx, type), to_type(gradients.dw, type),
                           to_type(gradients.db, type));
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const OptTensor& bias,
    const Tensor& target, const OptTensor& class_weight, const Tensor& lse, int64_t ignore_index,
    double smoothing, double z_loss, int64_t reduction, int64_t wanted) {
  const char* op = "linear_cross_entropy_backward";
  check_linear(op, x, weight, bias, target, class_weight);
  const LossOptions options =
      loss_options(op, ignore_index, smoothing, z_loss, reduction, weight.size(0));
  const ScalarType type = x.scalar_type();
  const ScalarType compute = compute_type(type);
  const int64_t n = x.size(0);
  const bool each = options.reduction == Reduction::none;
  require(grad.scalar_type() == compute && lse.scalar_type() == ScalarType::Double &&
              lse.dim() == 1 && lse.size(0) == n && grad.dim() == (each ? 1 : 0) &&
              (!each || grad.size(0) == n),
          "linear_cross_entropy_backward: grad and lse do not belong to this loss");
  return with_scalar_type(type, op, [&](auto scalar) {
    using T = decltype(scalar);
    const LinearArguments<T> args(op, x, weight, bias, target, class_weight, options);
    const Tensor upstream = as_contiguous(grad), sums = as_contiguous(lse);
    const GradientTensors gradients(wanted, n, x.size(1), weight.size(0), compute);
    backward(args, data<T>(upstream), each, data<double>(sums), gradients.get<T>(wanted));
    return std::make_tuple(to_type(gradients.dx, type), to_type(gradients.dw, type),
                           to_type(gradients.db, type));
  });
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(linear_cross_entropy, ops) {
  ops.impl("linear_cross_entropy", TORCH_BOX(&nnarch::linear_cross_entropy));
  ops.impl("linear_cross_entropy_backward", TORCH_BOX(&nnarch::linear_cross_entropy_backward));
}
