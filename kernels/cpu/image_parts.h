// Parts of float images in another memory order, so that no whole image is copied.
#pragma once

#include "cpu/half.h"
#include "cpu/tensor.h"

namespace nnarch {

// A part of x, of any strides, dense and channels_last. A copy. (layout.cpp)
Tensor part_channels_last(const Tensor& x, const ImagePart& part);

// `from`, dense and channels_last, into a part of the planar tensor y. (layout.cpp)
void put_planar(const Tensor& y, const ImagePart& part, const Tensor& from);

// Floats of images above which they are copied in parts, and those of a part: what is in memory at
// once, and still tasks for many threads.
inline constexpr int64_t kWholeImageBytes = int64_t{32} << 20;
inline constexpr int64_t kFloatPartBytes = int64_t{8} << 20;

// Whether planar images with so many bytes of floats, input and output, are to go in parts.
inline bool goes_in_parts(const Tensor& x, int64_t bytes) {
  return bytes > kWholeImageBytes && !StayChannelsLast::holds() && !follows_channels_last(x);
}

}  // namespace nnarch
