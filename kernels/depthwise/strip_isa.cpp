// The strips that are compiled (see cpu_code.h).
#include "depthwise/cpu_code.h"

namespace nnarch::NNARCH_ISA {
namespace {

// With edges. A strip of one pixel has none: where one pixel is a whole row, its input is copied.
template <class T, int S, int P>
inline constexpr StripCode<T> kEdges = {P, strip_fixed<T, S, 1, P, 0, 0>,
                                        strip_fixed<T, S, 1, P, S / 2, 0>,
                                        strip_fixed<T, S, 1, P, 0, S / 2>};
template <class T, int S, int STRIDE, int P>
inline constexpr StripCode<T> kInside = {P, strip_fixed<T, S, STRIDE, P, 0, 0>, nullptr, nullptr};

template <class T, int S>
inline constexpr StripSet<T> kUnitStride = {
    S / 2, {kEdges<T, S, 8>, kEdges<T, S, 7>, kEdges<T, S, 4>, kInside<T, S, 1, 1>}};
template <class T>
inline constexpr StripSet<T> kUnitStride<T, 7> = {
    3, {kEdges<T, 7, 7>, kEdges<T, 7, 4>, kInside<T, 7, 1, 1>}};

// At stride 2 what reads an image in place is mostly blocks; strips run over tiles, which have no
// edges.
template <class T, int S>
inline constexpr StripSet<T> kStride2 = {
    0, {kInside<T, S, 2, 8>, kInside<T, S, 2, 7>, kInside<T, S, 2, 4>, kInside<T, S, 2, 1>}};
template <class T>
inline constexpr StripSet<T> kStride2<T, 7> = {
    0, {kInside<T, 7, 2, 7>, kInside<T, 7, 2, 4>, kInside<T, 7, 2, 1>}};

template <class T, int P>
inline constexpr StripCode<T> kAnyWidth = {P, strip_general<T, P>, nullptr, nullptr};
template <class T>
inline constexpr StripSet<T> kGeneral = {
    0, {kAnyWidth<T, 8>, kAnyWidth<T, 7>, kAnyWidth<T, 4>, kAnyWidth<T, 1>}};

// The widths with code of their own: 3, 5 and 7, and 1, 2 and 4, into which these fall apart in the
// input gradient at stride 2.
template <class T>
const StripSet<T>& find(int64_t s, int64_t stride) {
  if (stride == 1) {
    if (s == 1) return kUnitStride<T, 1>;
    if (s == 2) return kUnitStride<T, 2>;
    if (s == 3) return kUnitStride<T, 3>;
    if (s == 4) return kUnitStride<T, 4>;
    if (s == 5) return kUnitStride<T, 5>;
    if (s == 7) return kUnitStride<T, 7>;
  }
  if (stride == 2) {
    if (s == 3) return kStride2<T, 3>;
    if (s == 5) return kStride2<T, 5>;
    if (s == 7) return kStride2<T, 7>;
  }
  return kGeneral<T>;
}

}  // namespace

template <>
const StripSet<float>& strip_set<float>(int64_t s, int64_t stride) {
  return find<float>(s, stride);
}
template <>
const StripSet<double>& strip_set<double>(int64_t s, int64_t stride) {
  return find<double>(s, stride);
}

}  // namespace nnarch::NNARCH_ISA
