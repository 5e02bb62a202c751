// affine, batch_norm_eval, channel_sum and channel_dot on the CPU.
#include <cmath>

#include "cpu/epilogue.h"
#include "cpu/registry.h"
#include "normalization/cpu_channels.h"
#include "normalization/cpu_sum.h"

namespace nnarch {
namespace {

// act(x·scale + shift + residual); `set_factors(scalar, run)` calls run(scale, shift), [C] each.
template <class SetFactors>
Tensor scaled(const Tensor& x, const OptTensor& residual, int64_t activation, double alpha,
              const SetFactors& set_factors) {
  check_channels(x);
  require(activation >= 0 && activation < kActivationCount, "affine: unknown activation");
  if (residual) check_like(x, *residual);
  const Channels shape(x);
  const Tensor input = in_order_of(x, x);
  const OptTensor added = residual ? OptTensor(in_order_of(x, *residual)) : OptTensor();
  const Tensor y = new_like(x, x.scalar_type());
  with_scalar_type(x.scalar_type(), "affine", [&](auto scalar) {
    using T = decltype(scalar);
    NormTensors<T> tensors;
    tensors.x = Stored(input), tensors.residual = Stored(added);
    tensors.activation = activation, tensors.alpha = static_cast<T>(alpha);
    const auto& table = NNARCH_SELECT(norm_table<T>());
    set_factors(scalar, [&](const T* scale, const T* shift) {
      NormFactors<T> f;
      f.scale = scale;
      f.shift = shift;
      for_each_block<T>(
          shape, tensors, y,
          [&](const NormOperands<T>& o, int64_t first, int64_t pixels, T* out) {
            table.affine_rows(o, f, out, first, pixels, shape.channels);
          },
          [&](const NormOperands<T>& o, int64_t first, int64_t count, int64_t channel, T* out) {
            table.affine_plane(o, f, out, first, count, channel);
          });
    });
  });
  return y;
}

Tensor affine(const Tensor& x, const OptTensor& scale, const OptTensor& shift,
              const OptTensor& residual, int64_t activation, double alpha) {
  return scaled(x, residual, activation, alpha, [&](auto scalar, const auto& run) {
    using T = decltype(scalar);
    const ChannelVector<T> a(scale, x, T{1}), b(shift, x, T{0});
    run(a.get(), b.get());
  });
}

// By running statistics. As four calls of torch, to make scale and shift, this took 6 µs more.
Tensor batch_norm_eval(const Tensor& x, const Tensor& mean, const Tensor& var,
                       const OptTensor& weight, const OptTensor& bias, const OptTensor& residual,
                       double eps, int64_t activation, double alpha) {
  return scaled(x, residual, activation, alpha, [&](auto scalar, const auto& run) {
    using T = decltype(scalar);
    const ChannelVector<T> m(mean, x, T{}), v(var, x, T{}), w(weight, x, T{1}), b(bias, x, T{0});
    const int64_t channels = x.size(1);
    Scratch<T> scale(channels), shift(channels);
    for (int64_t c = 0; c < channels; ++c) {
      scale[c] = static_cast<T>(w[c] / std::sqrt(v[c] + eps));
      shift[c] = static_cast<T>(b[c] - static_cast<double>(m[c]) * scale[c]);
    }
    run(scale.get(), shift.get());
  });
}

// The sum of a, or of a·b, over all dimensions but 1.
Tensor channel_total(const Tensor& a, const Tensor* b) {
  check_channels(a);
  if (b) check_like(a, *b);
  const Channels shape(a);
  const Tensor left = in_order_of(a, a), right = b ? in_order_of(a, *b) : left;
  const ScalarType compute = compute_type(a.scalar_type());
  const Tensor sum = new_contiguous({shape.channels}, compute);
  with_scalar_type(compute, "channel_sum", [&](auto scalar) {
    using T = decltype(scalar);
    NormTensors<T> o;
    o.x = Stored(left);
    if (b) o.grad = Stored(right);
    const auto totals = channel_sums<T>(b ? Reduction::dot : Reduction::sum, o, shape);
    std::copy(totals.begin(), totals.end(), mutable_data<T>(sum));
  });
  return to_type(sum, a.scalar_type());
}

Tensor channel_dot(const Tensor& a, const Tensor& b) { return channel_total(a, &b); }

}  // namespace

Tensor channel_sum(const Tensor& x) { return channel_total(x, nullptr); }

NNARCH_OPS(affine, ops) {
  ops.impl("affine", TORCH_BOX(&affine));
  ops.impl("batch_norm_eval", TORCH_BOX(&batch_norm_eval));
  ops.impl("channel_sum", TORCH_BOX(&channel_sum));
  ops.impl("channel_dot", TORCH_BOX(&channel_dot));
}

}  // namespace nnarch
