// The table of the kernels of upsampling.
#include "upsample/planes_isa.h"
#include "upsample/rows_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
constexpr UpsampleTable<T> kTable = {kLanes<T>,       nearest_rows<T>,   bilinear_rows<T>,
                                     spread_rows<T>,  nearest_planes<T>, bilinear_planes<T>,
                                     spread_planes<T>};

}  // namespace

template <>
const UpsampleTable<float>& upsample_table<float>() {
  return kTable<float>;
}
template <>
const UpsampleTable<double>& upsample_table<double>() {
  return kTable<double>;
}

}  // namespace nnarch::NNARCH_ISA
