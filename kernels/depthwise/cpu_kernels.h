// What the depthwise kernels compute, and the table of those compiled for this CPU.
//
// A task copies the input rows that it needs, a block of channels wide, into a small tile: pixels
// follow each other there, columns in the padding are zero, the last vector of channels is full,
// and every output channel has its input channel beside it. The arithmetic then runs on the tile
// alone, in the first-level cache, with no border, tail, layout or multiplier to look after. In
// the image itself the pixels of a block would be C·4 bytes apart: with C = 512 they all fall into
// two sets of that cache and push each other out.
#pragma once

#include <cstdint>

#include "cpu/epilogue.h"
#include "cpu/isa.h"

namespace nnarch {

// Packed weights are [ceil(channels / 16)][taps][16]: a row is a cache line of floats and the
// widest vector of any instruction set; the taps of a vector of channels follow each other.
inline constexpr int64_t kDepthwiseBlock = 16;

// The lengths of strips (see cpu_strip.h) that there is code for. Kernels of width 7 have none of
// 8: seven weights, seven sums and a pixel fill the sixteen registers of AVX2.
inline constexpr int64_t kStripLengths[] = {8, 7, 4, 1};

// The length that covers n pixels with the least work: the last strip is moved back to end with
// the row, and computes some pixels twice.
static inline __attribute__((always_inline)) int64_t strip_pixels(int64_t s, int64_t n) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t p : kStripLengths) {
    const int64_t work = (n + p - 1) / p * (p + 1);  // 1: what a strip costs besides its pixels
    if (p <= n && !(p == 8 && s == 7) && work < least) least = work, best = p;
  }
  return best;
}

// Pixels of grad that the weight gradient holds in registers (see cpu_grad_block.h).
inline constexpr int64_t kGradPixels = 4;

// Output rows and pixels of a block (see cpu_block.h), at most.
inline constexpr int64_t kBlockRowsMost = 2, kBlockPixelsMost = 8;

// With a dilation, so many neighbouring output columns share no input column. Every so many-th
// column is a phase: a convolution without dilation over every dilation_w-th input column.
static inline __attribute__((always_inline)) int64_t column_phases(int64_t dilation_w,
                                                                   int64_t stride_w) {
  int64_t a = dilation_w, b = stride_w;
  while (b != 0) {
    const int64_t rest = a % b;
    a = b, b = rest;
  }
  return dilation_w / a;
}

// One set of taps and the outputs that it produces. The forward pass has one; the input gradient
// of a strided convolution has one for every remainder of the position by the stride.
template <class T>
struct DepthwisePass {
  const T* weight;  // packed
  int64_t r, s;
  int64_t row, column;  // the input position of the first tap of output (0, 0); may be negative
  int64_t oh, ow;
  int64_t y_offset;  // of output (0, 0)
};

// One image. Strides are in elements.
//   y[oy, ox, k] = epilogue(Σ_r,s w[k, r, s] · x[oy·stride_h + row + r·dilation_h,
//                                              ox·stride_w + column + s·dilation_w, source(k)])
// where taps outside the image count as zero.
template <class T>
struct DepthwiseConv {
  const T* x;
  int64_t h, w, x_channels;
  int64_t x_row, x_pixel, x_channel;
  // The input channel of every output channel, relative to that of the first of its vector, and
  // the latter. Null: each channel reads its own.
  const int32_t* lane_source;
  const int32_t* vector_source;
  T* y;
  int64_t channels;
  int64_t y_row, y_pixel, y_channel;
  int64_t group;  // so many successive channels are summed into one channel of y
  int64_t stride_h, stride_w, dilation_h, dilation_w;
  const DepthwisePass<T>* passes;
  int64_t pass_count;
  Epilogue<T> epilogue;  // the residual is laid out as y
};

// How the work is cut, by shape only.
struct DepthwisePlan {
  int64_t block;                    // channels of a task: a multiple of kDepthwiseBlock, or all
  int64_t columns;                  // output columns of a tile
  int64_t rows;                     // output rows of a task
  int64_t first_row, first_column;  // the least of all passes
  int64_t tile_rows, tile_columns;  // input rows and columns that a tile holds
  int64_t kernel_rows;              // of the tallest pass
  int64_t reach;                    // input rows from the first to the last of an output row
  bool blocks;          // two output rows at a time (cpu_block.h), where there is code for it
  bool stream;          // the output is written past the caches
  int64_t pair_pixels;  // of a block of the weight gradient in pairs (cpu_grad_pair.h), or 0
  bool direct;          // strips read the image itself; the tile is for those at other edges
  bool far;             // the same, where input and output are too large for the caches
  bool ring;            // the tile keeps input rows from one output row to the next

  int64_t tile_size() const { return tile_rows * tile_columns * block; }
  int64_t stage_size() const { return (blocks ? kBlockRowsMost : 1) * columns * block; }
  int64_t lines_size() const { return kBlockRowsMost * kBlockPixelsMost * block; }
};

struct DepthwiseTask {
  int64_t channel, channels;  // first and number
  int64_t first, last;        // output rows, of all passes
};

template <class T>
struct DepthwiseWork {
  T* tile;         // plan.tile_size()
  T* stage;        // plan.stage_size(), for outputs that are not channels_last, or null
  T* residual;     // the same, for such a residual, or null
  const T** rows;  // 2 · plan.kernel_rows
  // plan.lines_size(), where lines are gathered that are written past the caches, or null
  T* lines = nullptr;
};

// The weight gradient: partial[k, r, s] += Σ_oy,ox g[oy, ox, k] · x[...], in packed order, for the
// channels and output rows of a task. `conv.passes` has one pass, whose `weight` is not used.
template <class T>
struct DepthwiseWeightGrad {
  DepthwiseConv<T> conv;
  const T* g;  // laid out as conv.y
  T* partial;
  double* bias;  // bias[k] += Σ g[oy, ox, k] likewise, or null
};

// The input gradient at stride 2, of one image in channels_last order: a square kernel of width 3,
// 5 or 7, no dilation, an output channel for every input channel. See cpu_quad.h.
template <class T>
struct DepthwiseQuads {
  const T* g;
  int64_t gh, gw;
  T* dx;
  int64_t h, w, channels;
  const T* weight;  // packed, in forward order
  int64_t s, top, left;
  bool stream;  // dx is written past the caches
  bool far;     // grad comes from memory
};

// A plane as one long row: tap t of output i is x[i + shift[t]] in those of the lanes of a vector
// whose bit is set in lanes[vector · taps + t].
struct FlatTaps {
  const uint16_t* lanes;
  const int64_t* shift;
};

// One plane of an image that lies channel by channel (NCHW): a square kernel of width 3, 5 or 7,
// stride 1 or 2, no dilation. Rows are dense.
template <class T>
struct DepthwisePlane {
  const T* x;
  int64_t h, w;
  T* y;
  int64_t oh, ow;
  const T* weight;  // tap i is weight[i · kDepthwiseBlock]
  int64_t s, stride;
  int64_t row, column;   // as in DepthwisePass; in quads, of y's first pixel from the padded one
  Epilogue<T> epilogue;  // of this channel
  FlatTaps flat;         // of depthwise_plane_flat_run
};

// The weight gradient of one channel, over all images: dw[s · s], dense.
template <class T>
struct DepthwisePlaneGrad {
  const T* x;
  const T* g;
  int64_t images, x_image, g_image;  // and the distance of their planes of this channel
  int64_t h, w, oh, ow;
  T* dw;
  T* db;  // the sum of g, or null
  int64_t s, stride;
  int64_t row, column;  // as in DepthwisePass
  FlatTaps flat;        // of depthwise_plane_flat_grad_run
};

// Rows [first, last) of quads; row A of them is rows 2A and 2A + 1 of the padded image.
template <class T>
using DepthwiseQuadsRun = void (*)(const DepthwiseQuads<T>&, int64_t first, int64_t last);
template <class T>
using DepthwisePlaneGradRun = void (*)(const DepthwisePlaneGrad<T>&);
template <class T>
using DepthwisePlaneRun = void (*)(const DepthwisePlane<T>&);
template <class T>
using DepthwiseRun = void (*)(const DepthwiseConv<T>&, const DepthwisePlan&, const DepthwiseTask&,
                              const DepthwiseWork<T>&);
// `work.stage` takes a row of g.
template <class T>
using DepthwiseWeightGradRun = void (*)(const DepthwiseWeightGrad<T>&, const DepthwisePlan&,
                                        const DepthwiseTask&, const DepthwiseWork<T>&);

// 7×7 kernels by Winograd's algorithm along the rows (cpu_row_winograd.h).
inline constexpr int64_t kRowWinogradPoints = 7, kRowWinogradRows = 4;

// A vector of channels of some output rows, and of quads of four columns.
struct RowWinogradTask {
  int64_t channel, first, last, from, to;
};

// `points`: room for ten rows of a quad more than the task has.
using RowWinogradRun = void (*)(const DepthwiseConv<float>& conv, const RowWinogradTask& task,
                                float* points);

// Blocks of channels that are no multiple of depthwise_lanes are read in place.
NNARCH_PER_ISA(template <class T> int64_t depthwise_lanes();
               template <class T> bool depthwise_masked_tails();
               template <class T> DepthwiseRun<T> depthwise_run();
               template <class T> DepthwiseQuadsRun<T> depthwise_quads_run();
               template <class T> DepthwisePlaneRun<T> depthwise_plane_run();
               template <class T> DepthwisePlaneRun<T> depthwise_plane_quads_run();
               template <class T> DepthwisePlaneRun<T> depthwise_plane_flat_run();
               template <class T> DepthwisePlaneGradRun<T> depthwise_plane_flat_grad_run();
               template <class T> DepthwisePlaneGradRun<T> depthwise_plane_grad_run();
               template <class T> int64_t depthwise_pair_pixels(int64_t s, int64_t ow);
               template <class T> DepthwiseWeightGradRun<T> depthwise_pair_run();
               template <class T> DepthwiseWeightGradRun<T> depthwise_weight_grad_run();
               RowWinogradRun row_winograd_run();)  // or null

}  // namespace nnarch
