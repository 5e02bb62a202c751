// The table of the kernels of maximum pooling for training.
#include "pooling/taps_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
constexpr TapTable<T> kTable = {tap_rows<T>, tap_plane<T>, tap_grad_rows<T>, tap_grad_plane<T>};

}  // namespace

template <>
const TapTable<float>& tap_table<float>() {
  return kTable<float>;
}
template <>
const TapTable<double>& tap_table<double>() {
  return kTable<double>;
}

}  // namespace nnarch::NNARCH_ISA
