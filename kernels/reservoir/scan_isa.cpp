// Sparse reservoirs over whole sequences.
#include "reservoir/block_isa.h"
#include "reservoir/row_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
void row(const Scan<T>& a, int64_t b, T* scratch) {
  with_response(a.activation, [&](auto code) {
    if (a.matrix.narrow)
      scan_row<T, decltype(code)::code>(a, a.matrix.narrow, b, scratch);
    else
      scan_row<T, decltype(code)::code>(a, a.matrix.wide, b, scratch);
  });
}

template <class T>
void block(const Scan<T>& a, int64_t b, int64_t count, T* scratch) {
  with_response(a.activation, [&](auto code) {
    if (a.matrix.narrow)
      scan_block<T, decltype(code)::code>(a, a.matrix.narrow, b, count, scratch);
    else
      scan_block<T, decltype(code)::code>(a, a.matrix.wide, b, count, scratch);
  });
}

template <class T>
constexpr ScanTable<T> kTable = {kBlockLanes<T>, row<T>, block<T>};

}  // namespace

template <>
const ScanTable<float>& scan_table<float>() {
  return kTable<float>;
}
template <>
const ScanTable<double>& scan_table<double>() {
  return kTable<double>;
}

}  // namespace nnarch::NNARCH_ISA
