// Convolution with narrow groups: so few channels each that several groups share a vector.
//
// A matrix product per group would fill a fraction of its vectors: 4 of 32 columns for the first
// stage of a ResNeXt. Here a vector holds the output channels of several groups. A permutation of
// the vector of their input channels puts input channel c of its own group into every lane; what
// is left is depthwise convolution, summed over c.
#pragma once

#include <cstdint>

#include "cpu/epilogue.h"
#include "cpu/isa.h"

namespace nnarch {

// Output rows [first, last) of one image, for one vector of output channels.
template <class T>
struct GroupedConv {
  const T* x;  // the image, at the first input channel of the vector's groups
  int64_t h, w;
  int64_t x_row, x_pixel, x_channel;
  int64_t inputs;          // channels that the vector's groups read: no more than its lanes
  int64_t depth, outputs;  // input and output channels of a group
  const int32_t* lane;     // [depth][lanes]: the input channel, of `inputs`, behind every lane
  const T* weight;         // [r][depth][s][lanes]
  int64_t r, s;
  int64_t stride_h, stride_w, dilation_h, dilation_w;
  int64_t row, column;  // the input position of the first tap of output (0, 0); may be negative
  T* y;                 // output (0, 0)
  int64_t y_row, y_pixel, y_channel;
  int64_t channels;  // of y, from the vector's first on: lanes beyond are not stored
  int64_t ow, first, last;
  Epilogue<T>
      epilogue;  // from the vector's first channel on; the residual is laid out as y: channels_last
  bool stream;   // y is written past the caches
  T* scratch;    // grouped_scratch_bytes
};

// grouped_grad_run adds the weight gradient of its rows to dw, in the order of a packed weight;
// y is grad there. It wants grouped_grad_scratch elements; 0: there is no code for this kernel.
NNARCH_PER_ISA(template <class T> int64_t grouped_lanes();
               template <class T> int64_t grouped_scratch_bytes(const GroupedConv<T>& conv);
               template <class T> void grouped_run(const GroupedConv<T>& conv);
               template <class T> int64_t grouped_grad_scratch(const GroupedConv<T>& conv);
               template <class T> void grouped_grad_run(const GroupedConv<T>& conv, T* dw);)

}  // namespace nnarch
