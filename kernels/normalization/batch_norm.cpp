// Batch normalization by the statistics of the batch, on the CPU: forward, backward and the
// backward of the backward.
#include <cmath>
#include <tuple>

#include "cpu/epilogue.h"
#include "cpu/registry.h"
#include "normalization/cpu_channels.h"

namespace nnarch {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

struct Statistics {
  std::vector<double> mean, sum_of_squares;  // of the deviations from the mean
};

// Mean and M2 of every part by two passes over cached memory, then combined pairwise (Chan, Golub
// and LeVeque, 1979) in the order of the parts.
template <class T>
Statistics statistics(const Stored& x, const Channels& shape) {
  const int64_t channels = shape.channels;
  const auto& table = NNARCH_SELECT(norm_table<T>());
  const Parts parts(shape);
  Scratch<double> partial(checked_product(parts.count(), 2 * channels));
  parts.for_each([&](int64_t part, int64_t from, int64_t to) {
    double* mean = partial.get() + part * 2 * channels;
    double* m2 = mean + channels;
    Scratch<T> rounded(channels);
    NormTensors<T> o;
    o.x = x;
    std::fill(mean + from, mean + to, 0.0);
    parts.reduce(table, Reduction::sum, o, part, from, to, mean);
    const double n = static_cast<double>(parts.positions(part));
    for (int64_t c = from; c < to; ++c) rounded[c] = static_cast<T>(mean[c] / n);
    o.mean = rounded.get();
    std::fill(mean + from, mean + to, 0.0);
    std::fill(m2 + from, m2 + to, 0.0);
    parts.reduce(table, Reduction::centered, o, part, from, to, mean);
    for (int64_t c = from; c < to; ++c) {
      m2[c] -= mean[c] * mean[c] / n;
      mean[c] = static_cast<double>(rounded[c]) + mean[c] / n;
    }
  });

  Statistics s{std::vector<double>(channels, 0.0), std::vector<double>(channels, 0.0)};
  double before = 0;
  for (int64_t part = 0; part < parts.count(); ++part) {
    const double* mean = partial.get() + part * 2 * channels;
    const double n = static_cast<double>(parts.positions(part)), all = before + n;
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = mean[c] - s.mean[c];
      s.mean[c] += delta * (n / all);
      s.sum_of_squares[c] += mean[channels + c] + delta * delta * (before * n / all);
    }
    before = all;
  }
  return s;
}

Three batch_norm_train(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                       const OptTensor& residual, double eps, int64_t activation, double alpha) {
  check_channels(x);
  require(activation >= 0 && activation < kActivationCount, "batch_norm: unknown activation");
  if (residual) check_like(x, *residual);
  const Channels shape(x);
  require(shape.positions() > 0, "batch_norm: no values to take statistics of");
  const Tensor input = in_order_of(x, x);
  const OptTensor added = residual ? OptTensor(in_order_of(x, *residual)) : OptTensor();
  const ScalarType type = compute_type(x.scalar_type());
  const int64_t channels = shape.channels;
  const Tensor y = new_like(x, x.scalar_type());
  const Tensor mean = new_contiguous({channels}, type), invstd = new_contiguous({channels}, type);
  with_scalar_type(type, "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    const ChannelVector<T> w(weight, x, T{1}), b(bias, x, T{0});
    const Statistics s = statistics<T>(Stored(input), shape);
    Scratch<T> scale(channels), shift(channels);
    T *means = mutable_data<T>(mean), *inverses = mutable_data<T>(invstd);
    for (int64_t c = 0; c < channels; ++c) {
      const double inverse =
          1.0 / std::sqrt(s.sum_of_squares[c] / static_cast<double>(shape.positions()) + eps);
      means[c] = static_cast<T>(s.mean[c]);
      inverses[c] = static_cast<T>(inverse);
      scale[c] = static_cast<T>(w[c] * inverse);
      shift[c] = static_cast<T>(b[c] - s.mean[c] * scale[c]);
    }
    NormTensors<T> tensors;
    tensors.x = Stored(input), tensors.residual = Stored(added);
    tensors.activation = activation, tensors.alpha = static_cast<T>(alpha);
    NormFactors<T> f;
    f.scale = scale.get();
    f.shift = shift.get();
    const auto& table = NNARCH_SELECT(norm_table<T>());
    for_each_block<T>(
        shape, tensors, y,
        [&](const NormOperands<T>& o, int64_t first, int64_t pixels, T* out) {
          table.affine_rows(o, f, out, first, pixels, channels);
        },
        [&](const NormOperands<T>& o, int64_t first, int64_t count, int64_t channel, T* out) {
          table.affine_plane(o, f, out, first, count, channel);
        });
  });
  return {y, mean, invstd};
}

// Per-channel factors of the linear combinations that gradients are.
template <class T>
struct Combination {
  Scratch<T> of_gradgrad, of_grad, of_x, constant;
  explicit Combination(int64_t channels)
      : of_gradgrad(channels), of_grad(channels), of_x(channels), constant(channels) {}

  void run(const NormTensors<T>& tensors, const Channels& shape, const Tensor& out) const {
    NormFactors<T> f;
    f.of_gradgrad = of_gradgrad.get();
    f.of_grad = of_grad.get();
    f.of_x = of_x.get();
    f.constant = constant.get();
    const auto& table = NNARCH_SELECT(norm_table<T>());
    for_each_block<T>(
        shape, tensors, out,
        [&](const NormOperands<T>& o, int64_t first, int64_t pixels, T* to) {
          table.combine_rows(o, f, to, first, pixels, shape.channels);
        },
        [&](const NormOperands<T>& o, int64_t first, int64_t count, int64_t channel, T* to) {
          table.combine_plane(o, f, to, first, count, channel);
        });
  }
};

Three batch_norm_backward(const Tensor& grad, const Tensor& x, const OptTensor& weight,
                          const Tensor& mean, const Tensor& invstd, const OptTensor& y,
                          int64_t activation, double alpha) {
  check_channels(x);
  check_like(x, grad);
  if (y) check_like(x, *y);
  require(activation >= 0 && activation < kActivationCount, "batch_norm: unknown activation");
  require(activation == kNone || (y && follows_from_output(activation)),
          "batch_norm_backward: an activation needs y, from which its derivative must follow");
  const Channels shape(x);
  const int64_t channels = shape.channels;
  const Tensor input = in_order_of(x, x), incoming = in_order_of(x, grad);
  const OptTensor output = y ? OptTensor(in_order_of(x, *y)) : OptTensor();
  const ScalarType type = compute_type(x.scalar_type());
  const Tensor dx = new_like(x, x.scalar_type());
  const Tensor dweight = new_contiguous({channels}, type), dbias = new_contiguous({channels}, type);
  with_scalar_type(type, "batch_norm_backward", [&](auto scalar) {
    using T = decltype(scalar);
    const ChannelVector<T> w(weight, x, T{1}), m(mean, x, T{}), sigma(invstd, x, T{});
    NormTensors<T> o;
    o.x = Stored(input), o.grad = Stored(incoming), o.y = Stored(output);
    o.mean = m.get();
    o.activation = activation;
    o.alpha = static_cast<T>(alpha);
    const auto sums = channel_sums<T>(Reduction::backward, o, shape);
    const double n = static_cast<double>(shape.positions());
    Combination<T> factors(channels);
    T *to_weight = mutable_data<T>(dweight), *to_bias = mutable_data<T>(dbias);
    for (int64_t c = 0; c < channels; ++c) {
      const double s = sigma[c], slope = w[c] * s, g = sums[c], gd = sums[channels + c];
      to_bias[c] = static_cast<T>(g);
      to_weight[c] = static_cast<T>(gd * s);
      factors.of_grad[c] = static_cast<T>(slope);
      factors.of_x[c] = static_cast<T>(-slope * s * s * gd / n);
      factors.constant[c] = static_cast<T>(-slope * g / n);
    }
    factors.run(o, shape, dx);
  });
  return {dx, dweight, dbias};
}

// With a = gg_x, g = grad, x̂ = (x - mean)·σ, P(v) = v - E[v] - x̂·E[v·x̂]: the gradients of
// <a, w·σ·P(g)> + gg_weight·Σ g·x̂ + gg_bias·Σ g, where mean and σ are functions of x.
Three batch_norm_backward_backward(const Tensor& gg_x, const Tensor& gg_weight,
                                   const Tensor& gg_bias, const Tensor& grad, const Tensor& x,
                                   const OptTensor& weight, const Tensor& mean,
                                   const Tensor& invstd) {
  check_channels(x);
  check_like(x, grad);
  check_like(x, gg_x);
  const Channels shape(x);
  const int64_t channels = shape.channels;
  const Tensor input = in_order_of(x, x), incoming = in_order_of(x, grad),
               second = in_order_of(x, gg_x);
  const ScalarType type = compute_type(x.scalar_type());
  const Tensor d_grad = new_like(x, x.scalar_type()), d_x = new_like(x, x.scalar_type());
  const Tensor d_weight = new_contiguous({channels}, type);
  with_scalar_type(type, "batch_norm_backward_backward", [&](auto scalar) {
    using T = decltype(scalar);
    const ChannelVector<T> w(weight, x, T{1}), m(mean, x, T{}), sigma(invstd, x, T{}),
        ggw(gg_weight, x, T{}), ggb(gg_bias, x, T{});
    NormTensors<T> o;
    o.x = Stored(input), o.grad = Stored(incoming), o.gradgrad = Stored(second);
    o.mean = m.get();
    const auto sums = channel_sums<T>(Reduction::double_backward, o, shape);
    const double n = static_cast<double>(shape.positions());
    Combination<T> to_grad(channels), to_x(channels);
    T* to_weight = mutable_data<T>(d_weight);
    for (int64_t c = 0; c < channels; ++c) {
      const double s = sigma[c], ws = w[c] * s;
      const double a = sums[c] / n, g = sums[channels + c] / n;
      const double ax = sums[2 * channels + c] * s / n, gx = sums[3 * channels + c] * s / n;
      const double q = sums[4 * channels + c] / n - a * g - ax * gx;
      const double of_pa = -ws * s * gx, of_pg = s * (ggw[c] - ws * ax);
      to_weight[c] = static_cast<T>(s * n * q);
      to_grad.of_gradgrad[c] = static_cast<T>(ws);
      to_grad.of_grad[c] = T{0};
      to_grad.of_x[c] = static_cast<T>(s * (ggw[c] - ws * ax));
      to_grad.constant[c] = static_cast<T>(ggb[c] - ws * a);
      to_x.of_gradgrad[c] = static_cast<T>(of_pa);
      to_x.of_grad[c] = static_cast<T>(of_pg);
      to_x.of_x[c] = static_cast<T>(-s * (ws * s * q + of_pa * ax + of_pg * gx));
      to_x.constant[c] = static_cast<T>(-of_pa * a - of_pg * g);
    }
    to_x.run(o, shape, d_x);
    o.grad = Stored();
    to_grad.run(o, shape, d_grad);
  });
  return {d_grad, d_x, d_weight};
}

}  // namespace

NNARCH_OPS(batch_norm, ops) {
  ops.impl("batch_norm_train", TORCH_BOX(&batch_norm_train));
  ops.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
  ops.impl("batch_norm_backward_backward", TORCH_BOX(&batch_norm_backward_backward));
}

}  // namespace nnarch
