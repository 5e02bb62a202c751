// The table of layer and RMS normalization.
#include "layer_norm/backward_isa.h"
#include "layer_norm/forward_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class S>
void forward(const NormForward<S>& a, int64_t first, int64_t count, Compute<S>* scratch) {
  if (a.rms)
    forward_rows<S, true>(a, first, count, scratch);
  else
    forward_rows<S, false>(a, first, count, scratch);
}

template <class S>
constexpr LayerNormTable<S> kTable = {forward<S>, backward_rows<S>, backward_backward_rows<S>,
                                      dropout_rows<S>};

}  // namespace

template <>
const LayerNormTable<float>& layer_norm_table<float>() {
  return kTable<float>;
}
template <>
const LayerNormTable<double>& layer_norm_table<double>() {
  return kTable<double>;
}
template <>
const LayerNormTable<BFloat16>& layer_norm_table<BFloat16>() {
  return kTable<BFloat16>;
}
template <>
const LayerNormTable<Float16>& layer_norm_table<Float16>() {
  return kTable<Float16>;
}

}  // namespace nnarch::NNARCH_ISA
