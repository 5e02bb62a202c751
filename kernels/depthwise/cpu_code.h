// The tables of strips and blocks that are compiled: widths, strides, lengths, edges. They are in
// strip_isa.cpp and block_isa.cpp, apart from the code that walks over an image (forward_isa.cpp),
// because each instance is an unrolled kernel: together they took over a minute to compile.
#pragma once

#include "depthwise/cpu_strip.h"

namespace nnarch::NNARCH_ISA {

template <class T>
using StripFn = void (*)(const Strip<T>&);

// Strips of one length: within the image, and reaching half a kernel beyond its left or its right
// edge, as strips under 'same' padding do. Null: no such code.
template <class T>
struct StripCode {
  int64_t pixels;
  StripFn<T> inside, left, right;
};
template <class T>
struct StripSet {
  int64_t reach;  // how far beyond an edge `left` and `right` go
  StripCode<T> lengths[4];
};

// Blocks likewise; `both` reaches beyond both edges.
template <class T>
struct BlockCode {
  int64_t rows, pixels;
  StripFn<T> inside, left, right, both;
};

template <class Code>
NNARCH_INLINE auto code_at(const Code& code, int64_t s, int64_t left, int64_t right)
    -> decltype(code.inside) {
  if (left == 0 && right == 0) return code.inside;
  if (left == s && right == 0) return code.left;
  if (left == 0 && right == s) return code.right;
  return nullptr;
}

// For kernels of width s; any width and stride is served.
template <class T>
const StripSet<T>& strip_set(int64_t s, int64_t stride);
// For rows of n pixels. Null where blocks do not serve this width and stride.
template <class T>
const BlockCode<T>* block_code(int64_t s, int64_t stride, int64_t n);

}  // namespace nnarch::NNARCH_ISA
