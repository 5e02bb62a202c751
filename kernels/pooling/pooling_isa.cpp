// The table of the pooling kernels.
#include "pooling/cpu_kernels.h"
#include "pooling/mean_isa.h"
#include "pooling/plane_indices_isa.h"
#include "pooling/plane_isa.h"
#include "pooling/rows_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
constexpr PoolTable<T> kTable = {max_rows<T>,       average_rows<T>, max_planes<T>,
                                 average_planes<T>, sum_pixels<T>,   mean_planes<T>};

}  // namespace

template <>
const PoolTable<float>& pool_table<float>() {
  return kTable<float>;
}
template <>
const PoolTable<double>& pool_table<double>() {
  return kTable<double>;
}

}  // namespace nnarch::NNARCH_ISA
