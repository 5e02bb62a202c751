#include "conv_transpose2d/layout_choice.h"

#include <algorithm>

#include "conv2d/cpu_winograd.h"
#include "conv2d/winograd_choice.h"
#include "cpu/gemm.h"
#include "cpu/machine.h"

namespace nnarch {
namespace {

// Costs are in the time of one FMA on vectors, as in conv2d/winograd_choice.cpp.
constexpr double kDirect = 1.06, kProduct = 1.08;
constexpr double kLeastRowTile = 4.5;
constexpr double kTransform = 8;
constexpr double kPackDirect = 5, kPackTransformed = 9;  // of a vector, beside reading it
constexpr double kStages = 3000;
constexpr int64_t kMostWeights = int64_t{64} << 20;  // transformed values: memory has an end

double lanes() { return double(winograd().nr / 2); }
double vectors(int64_t channels) { return double(ceil_div(channels, winograd().nr / 2)); }

// Products of one axis of a phase: pairs of a position and a tap that lies inside the image.
double pairs_inside(const TransposedPhase& phase, int64_t image) {
  int64_t pairs = 0;
  for (const int64_t offset : phase.offset)
    pairs +=
        std::max<int64_t>(0, std::min(phase.count, image - offset) - std::max<int64_t>(0, -offset));
  return double(pairs);
}

struct Cost {
  double products = 0, rest = 0, bytes = 0;
};

Cost direct_cost(const TransposedShape& p, const TransposedPhase& rows,
                 const TransposedPhase& columns) {
  const double weights = double(p.group_c()) * vectors(p.group_k());
  const double all = weights * double(rows.taps.size() * columns.taps.size());
  return {double(p.n) * pairs_inside(rows, p.h) * pairs_inside(columns, p.w) * weights * kDirect,
          all * kPackDirect, all * lanes() * sizeof(float)};
}

Cost winograd_cost(const TransposedShape& p, const TransposedPhase& rows,
                   const TransposedPhase& columns, const WinogradTile& tile) {
  GridImage<float> image{};
  image.n = p.n, image.grid_h = rows.count, image.grid_w = columns.count;
  image.depth = p.group_c();
  const WinogradTiles tiles{image, tile};
  const double inputs = double(tiles.values()), height = winograd_height(tiles, p.group_k(), true);
  const double pairs = double(p.group_c()) * vectors(p.group_k());
  const double weights = double(tile.values()) * pairs;
  const double step = std::max(1.0, kLeastRowTile / (2 * height));
  const double values = inputs * (vectors(p.group_c()) + vectors(p.group_k()));
  return {inputs * pairs * kProduct * step + values * kTransform + kStages,
          weights * kPackTransformed, weights * lanes() * sizeof(float)};
}

// Of all phases of a group, with the tiles of `layout`.
double phases_cost(const TransposedShape& p, int64_t layout, bool packed) {
  const TransposedAxis row_axis = TransposedAxis::rows(p), column_axis = TransposedAxis::columns(p);
  Cost sum;
  for (const TransposedPhase& rows : phases_of(row_axis))
    for (const TransposedPhase& columns : phases_of(column_axis)) {
      const WinogradTile tile =
          phase_tile(row_axis, rows.residue, column_axis, columns.residue, layout);
      const Cost cost =
          tile.m > 0 ? winograd_cost(p, rows, columns, tile) : direct_cost(p, rows, columns);
      sum.products += cost.products, sum.rest += cost.rest, sum.bytes += cost.bytes;
    }
  const double read = read_cost(sum.bytes, lanes());
  return packed ? std::max(sum.products, read) : sum.products + sum.rest + read;
}

// Whether any phase has a tile, and the transformed weights are of a sensible size.
bool tiles_serve(const TransposedShape& p, int64_t layout) {
  const TransposedAxis rows = TransposedAxis::rows(p), columns = TransposedAxis::columns(p);
  int64_t planes = 0;
  for (const int64_t i : rows.residues())
    for (const int64_t j : columns.residues())
      if (const WinogradTile tile = phase_tile(rows, i, columns, j, layout); tile.m > 0)
        planes += tile.planes();
  return planes > 0 && p.c <= kMostWeights / planes / p.group_k();
}

}  // namespace

bool taps_serve(const TransposedShape& p, bool is_float) {
  if (p.groups != 1 || p.taps() < 2 || p.k > 16) return false;
  // Sums of a row lie at full width in cache: neither gaps between taps nor a long padding.
  const int64_t reach = (p.s - 1) * p.dilation_w;
  if (p.stride_h > p.r || p.stride_w > p.s || p.dilation_h > 8 || p.dilation_w > 8) return false;
  if (p.left > reach) return false;
  const int64_t width = is_float ? gemm<float>().nr / 2 : gemm<double>().nr / 2;
  const int64_t by_phases = p.taps() * ceil_div(p.k, width),
                together = ceil_div(p.taps() * p.k, width);
  return 2 * by_phases >= 3 * together;
}

int64_t choose_layout(const TransposedShape& p, bool is_float, bool packed) {
  if (taps_serve(p, is_float)) return kTaps;
  if (p.h == 1 && p.w == 1 && p.top == 0 && p.left == 0 && p.oh == p.r && p.ow == p.s)
    return kPixel;
  if (!is_float || precision() == Precision::highest || p.n == 0) return kPhases;
  const int64_t steps = p.stride_h * p.stride_w * p.dilation_h * p.dilation_w;
  if (steps == 1 && std::max(p.r, p.s) == 3 && std::min(p.r, p.s) != 2)
    return choose_tile(
               {p.n, p.oh, p.ow, p.group_c(), p.group_k(), packed, {.rows = p.r, .columns = p.s}})
        .m;  // a convolution with mirrored weights
  int64_t best = kPhases;
  double least = -1;
  for (const int64_t layout :
       {kPhases, int64_t{2}, int64_t{3}, int64_t{4}, int64_t{5}, int64_t{6}}) {
    if (layout > 4 && precision() != Precision::medium) break;
    if (layout != kPhases && !tiles_serve(p, layout)) continue;
    const double cost = phases_cost(p, layout, packed);
    if (least < 0 || cost < least) best = layout, least = cost;
  }
  return best;
}

}  // namespace nnarch
