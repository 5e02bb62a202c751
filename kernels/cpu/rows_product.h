// Rows of x against a weight that comes unpacked, as a training step has it: linear, and 1×1
// convolutions, whose pixels are rows.
#pragma once

#include <cstdint>

#include "cpu/epilogue.h"
#include "cpu/pack_weight.h"

namespace nnarch {

// Up to this many rows go past the weights in place at the bandwidth of reading them; twice as many
// where the weights aren't packed.
inline constexpr int64_t kFewRows = 4, kFewUnpackedRows = 8;
// Up to this many may be packed in the place of unpacked weights; up to that many go against
// weights that each task packs for itself; more are worth a packed copy in memory.
inline constexpr int64_t kTurnedRows = 96, kManyRows = 512;

// y[i][j] = epilogue(Σ_k x[i][k] · w[j][k]) for i < m. Rows are dense, `x_step` and `y_step` apart;
// a residual lies as y does. The weight has one tap.
template <class T>
struct RowsProduct {
  const T* x;
  int64_t x_step, m;
  const WeightView<T>& weight;
  T* y;
  int64_t y_step;
  const Epilogue<T>& epilogue;

  int64_t columns() const { return weight.columns; }
  int64_t depth() const { return weight.depth; }
  const T* weights() const { return weight.data + weight.tap_offset[0]; }
};

template <class T>
bool is_identity(const Epilogue<T>& e) {
  return !e.scale && !e.shift && !e.residual && e.activation == kNone;
}

// Computes it and returns the algorithm's name; or null, and nothing is computed, where a packed
// copy of the weight in memory serves better.
template <class T>
const char* multiply_rows(const RowsProduct<T>& p);

}  // namespace nnarch
