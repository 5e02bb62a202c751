// 1×1 convolutions by Strassen's product of pairs of pixels (strassen.h): the packed weight, and
// what gather_gemm is to the plain product.
//
// The two pixels of a pair follow each other in an image: what one image holds never meets another
// one's. The last pixel of an odd number has no partner.
#pragma once

#include <cstdint>

#include "cpu/arena.h"
#include "cpu/gather_gemm.h"
#include "cpu/pack_weight.h"
#include "cpu/strassen.h"

namespace nnarch {

// Whether the halves of channels are whole panels and vectors.
bool strassen_serves(int64_t columns, int64_t depth);
// Packed: the scales of channels in and out, then block after block of columns, of each the right
// factors of M1 to M7.
int64_t strassen_packed_size(int64_t columns, int64_t depth);
void strassen_pack(const WeightView<float>& weight, float* packed);

// The pairs of pixels of an image's grid.
inline int64_t pairs_of_image(const GridImage<float>& image) {
  return ceil_div(image.grid_h * image.grid_w, int64_t{2});
}

// The room of one thread.
class StrassenProduct {
 public:
  // `pairs` may go through the weight together, as far as they fit the second-level cache.
  StrassenProduct(const float* packed, int64_t columns, int64_t depth, int64_t pairs,
                  const Epilogue<float>& epilogue);

  // As gather_gemm, of the pairs [first, last) of all images, and of one of `parts` of the columns.
  // `residual` lies as c does, or is null.
  void run(const GridImage<float>& image, float* c, const float* residual, const OutputGrid& out,
           int64_t first, int64_t last, bool stream, int64_t part = 0, int64_t parts = 1);

 private:
  // The first of `pairs_`, and what is read after them.
  struct Block {
    int64_t pairs;
    int64_t from, to;  // columns of a half
    float* c;
    const float* residual;
    bool stream;
    const float* after;
    int64_t after_size;
  };
  void run_block(const Block& block);
  // Product m of a block of columns.
  void multiply(const Block& block, int64_t m, int64_t first, int64_t columns);

  const float* packed_;
  const int64_t columns_, depth_, left_step_, most_pairs_;
  const int64_t activation_;
  const float alpha_;
  const Scratch<PixelPair> pairs_;
  const Scratch<float> left_, products_, scale_, shift_;
};

// c[position] = epilogue(image[position] · weight), in the place of gather_gemm.
void strassen_gemm(const GridImage<float>& image, const float* packed, int64_t columns, float* c,
                   const OutputGrid& out, const Epilogue<float>& epilogue);

}  // namespace nnarch
