// Winograd convolution's SIMD parts: the transforms of a tile and the product between them.
#pragma once

#include <cstdint>

#include "cpu/epilogue.h"
#include "cpu/isa.h"

namespace nnarch {

// Where a tile of outputs goes: row i, column j < rows, columns to y + i * row_step + j *
// column_step; the residual has the same offsets.
struct OutputTile {
  int64_t offset, row_step, column_step;
  int64_t rows, columns;  // of the m × m that lie in the output
};

// Weights of some channels and a panel of columns: those of tap t and channel c at data + taps[t] +
// c · step.
struct TapWeights {
  const float* data;
  const int64_t* taps;
  int64_t step, channels;
};

// The transforms of a tile (winograd_tile.h). Transformed values are planes, `plane` elements
// apart, and in these the phases' slots, `slot` elements apart, where there are several.
struct WinogradTransforms {
  // planes[xi][slot][c] of one tile; pixels: of its window, row by row, pointers to `channels`
  // values each.
  void (*input)(const float* const* pixels, int64_t channels, float* planes, int64_t plane,
                int64_t slot);
  // A panel's weights to values [xi][slot][channel][nr]: slots are `slot` elements long and planes
  // as long as their slots and `gap` more.
  void (*weight)(const TapWeights& weights, float* values, int64_t slot, int64_t gap);
  // y of one tile, two vectors of channels wide or `channels`, whichever is less.
  void (*output)(const float* planes, int64_t plane, int64_t channels,
                 const Epilogue<float>& epilogue, const OutputTile& tile, float* y, bool stream);
  // The weight gradient's counterparts: a tile of m × m gradients to planes, and summed planes to
  // the gradients of `channels` weights, `tap` elements from one tap to the next. `stream`: past
  // the caches, where channels are whole vectors.
  void (*grad)(const float* const* pixels, int64_t channels, float* planes, int64_t plane,
               int64_t slot);
  void (*weight_grad)(const float* planes, int64_t plane, int64_t slot, int64_t channels, float* dw,
                      int64_t tap, bool stream);
};

// The transforms of tiles of 4 × 4 outputs and 3 × 3 taps at the ends of lines, where they have
// fewer outputs, which fewer points give: by kind (winograd_tile.h) less one.
struct WinogradEnds {
  decltype(WinogradTransforms::input) input[3];
  decltype(WinogradTransforms::output) output[3];
  decltype(WinogradTransforms::grad) grad[3];
};

// Cache lines, offsets from `data`.
struct Lines {
  const float* data = nullptr;
  const int64_t* offsets = nullptr;
  int64_t count = 0;
};

// c[i][j] = Σ_k a[i][k] · b[k][j] for i < rows, j < columns. b is a dense panel of nr columns; the
// one that follows it comes into cache meanwhile, as a whole or in part.
struct PanelProduct {
  const float* a;
  int64_t a_step;
  const float* b;
  int64_t depth;
  float* c;
  int64_t c_step;
  int64_t rows, columns;
  int64_t chain = 128;  // terms that are added up in one go: longer sums lose accuracy
  bool add = false;
  int64_t share = 0, shares = 1;  // which part of the panel that follows is fetched meanwhile
  bool far = false;               // the last-level cache is far (cpu/machine.h)
  const float* a_next = nullptr;  // rows that will be read next, fetched meanwhile; or null
  Lines lines = {};               // fetched in place of the panel that follows, if there are any
};

// c[i][j] = or += Σ_k a[k][i] · b[k][j] for i < rows, j < columns: the sum over tiles of a weight
// gradient. Columns are padded to whole vectors.
struct OuterProduct {
  const float* a;
  int64_t a_step;
  const float* b;
  int64_t b_step;
  int64_t depth;
  float* c;
  int64_t c_step;
  int64_t rows, columns;
  bool add;
  int64_t chain = int64_t{1} << 40;
};

struct WinogradTable {
  int64_t nr;       // columns of a panel
  int64_t mr;       // rows of the register tile
  int64_t readers;  // so few rows read a panel as fast as memory gives it
  WinogradTransforms of_2, of_4, of_5, of_6;
  void (*panel_product)(const PanelProduct& p);
  void (*outer_product)(const OuterProduct& p);

  const WinogradTransforms& transforms(int64_t m) const {
    return m == 2 ? of_2 : m == 4 ? of_4 : m == 5 ? of_5 : of_6;
  }
};

NNARCH_PER_ISA(const WinogradTable& winograd_table();
               const WinogradEnds& winograd_ends_table(int64_t outputs);)

inline const WinogradTable& winograd() { return NNARCH_SELECT(winograd_table()); }
// Of ends with 1, 2 or 3 outputs.
inline const WinogradEnds& winograd_ends(int64_t outputs) {
  return NNARCH_SELECT(winograd_ends_table(outputs));
}

}  // namespace nnarch
