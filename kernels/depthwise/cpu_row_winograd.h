// 7×7 kernels by Winograd's algorithm along the rows, F(4, 4) twice, with the points 0, ±1, ±2 and
// ±1/2. A row of the kernel is two polynomials, its first four taps and the other three, of each of
// which there is a value at every point. Seven pixels are transformed to what these values meet,
// and serve as the second half's, too, of the quad of pixels before them. All kernel rows are added
// up at the points; then four outputs are made.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/machine.h"
#include "cpu/streaming.h"
#include "depthwise/cpu_image.h"
#include "depthwise/cpu_kernels.h"

namespace nnarch {

// Whether it serves: in caches, because four rows of a vector of channels at a time are no order
// for memory.
inline bool row_winograd_serves(const DepthwiseConv<float>& c, int64_t images) {
  const DepthwisePass<float>& p = *c.passes;
  if (!NNARCH_SELECT(row_winograd_run()) || precision() == Precision::highest) return false;
  if (c.pass_count != 1 || p.r != 7 || p.s != 7 || c.stride_h != 1 || c.stride_w != 1 ||
      c.dilation_h != 1 || c.dilation_w != 1 || c.lane_source || c.group != 1 || c.x_channel != 1 ||
      c.y_channel != 1 || c.channels % kDepthwiseBlock != 0)
    return false;
  const int64_t out = p.oh * p.ow, bytes = images * c.channels * (c.h * c.w + out) * 4;
  return p.oh > 7 && p.ow > 7 && bytes < kFarBytes &&
         !outgrows_caches(c.y, images * out, c.channels);
}

// As run_images.
inline void run_row_winograd(const DepthwiseConv<float>& conv, int64_t images, int64_t x_image,
                             int64_t y_image) {
  constexpr int64_t most_quads = 14, least_rows = 28, wanted = 6;
  const DepthwisePass<float>& pass = *conv.passes;
  const int64_t vectors = conv.channels / kDepthwiseBlock;
  const int64_t quads = ceil_div(pass.ow, int64_t{4}), strips = ceil_div(quads, most_quads);
  const int64_t bands = std::max<int64_t>(
      1, std::min(pass.oh / least_rows, ceil_div(wanted, std::max<int64_t>(1, images * vectors))));
  const auto run = NNARCH_SELECT(row_winograd_run());
  parallel_tasks(images * vectors * bands, [&](int64_t i) {
    const int64_t image = i / (vectors * bands), vector = i / bands % vectors, band = i % bands;
    const Scratch<float> points((kRowWinogradRows + 6) * (most_quads + 1) * kRowWinogradPoints *
                                kDepthwiseBlock);
    DepthwiseConv<float> mine = conv;
    mine.x += image * x_image;
    mine.y += image * y_image;
    if (mine.epilogue.residual) mine.epilogue.residual += image * y_image;
    for (int64_t strip = 0; strip < strips; ++strip)
      run(mine,
          {vector * kDepthwiseBlock, pass.oh * band / bands, pass.oh * (band + 1) / bands,
           quads * strip / strips, quads * (strip + 1) / strips},
          points.get());
  });
}

}  // namespace nnarch
