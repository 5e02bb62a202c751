// The running statistics of batch normalization, updated in place. As four calls of torch this took
// 21 µs, as long as normalizing 256 channels of 14×14.
#include <algorithm>

#include "cpu/registry.h"
#include "cpu/tensor.h"

namespace nnarch {
namespace {

// running = (1 - momentum)·running + momentum·new_value(channel); any stride.
template <class T, class F>
void mix(const Tensor& running, double momentum, const F& new_value) {
  T* r = mutable_data<T>(running);
  const int64_t channels = running.size(0), stride = running.stride(0);
  for (int64_t c = 0; c < channels; ++c, r += stride)
    *r = static_cast<T>((1 - momentum) * static_cast<double>(*r) + momentum * new_value(c));
}

void check_statistic(const Tensor& t, const Tensor& mean) {
  require(t.dim() == 1 && t.size(0) == mean.size(0) && t.scalar_type() == mean.scalar_type(),
          "batch_norm_update: statistics must be [C] and of one dtype");
}

// `mean` and `invstd` are what batch_norm_train returned for a batch of `count` values a channel.
// The running variance takes the unbiased one, as torch's.
void batch_norm_update(const OptTensor& running_mean, const OptTensor& running_var,
                       const Tensor& mean, const Tensor& invstd, double momentum, double eps,
                       int64_t count) {
  require(mean.dim() == 1 && mean.is_contiguous() && invstd.is_contiguous() && count > 1,
          "batch_norm_update: mean and invstd must be dense, of more than one value");
  check_statistic(invstd, mean);
  if (running_mean) check_statistic(*running_mean, mean);
  if (running_var) check_statistic(*running_var, mean);
  with_scalar_type(mean.scalar_type(), "batch_norm_update", [&](auto scalar) {
    using T = decltype(scalar);
    const T *m = data<T>(mean), *inverse = data<T>(invstd);
    if (running_mean)
      mix<T>(*running_mean, momentum, [&](int64_t c) { return static_cast<double>(m[c]); });
    const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
    if (running_var)
      mix<T>(*running_var, momentum, [&](int64_t c) {
        const double i = inverse[c];
        return std::max(1 / (i * i) - eps, 0.0) * unbiased;
      });
  });
}

}  // namespace

NNARCH_OPS(batch_norm_running, ops) {
  ops.impl("batch_norm_update", TORCH_BOX(&batch_norm_update));
}

}  // namespace nnarch
