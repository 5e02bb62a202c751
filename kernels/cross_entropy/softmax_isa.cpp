// The table of softmax kernels.
#include "cross_entropy/log_isa.h"
#include "cross_entropy/rows_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
constexpr SoftmaxTable<T> kTable = {
    add_bias<T>,    observe<T>,   log_sums<T>,     weigh<T>,   gradient<T>,  target_gradient<T>,
    row_observe<T>, row_weigh<T>, row_gradient<T>, row_sum<T>, add_parts<T>, scale_by<T>};

}  // namespace

template <>
const SoftmaxTable<float>& softmax_table<float>() {
  return kTable<float>;
}
template <>
const SoftmaxTable<double>& softmax_table<double>() {
  return kTable<double>;
}

}  // namespace nnarch::NNARCH_ISA
