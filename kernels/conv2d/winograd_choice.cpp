#include "conv2d/winograd_choice.h"

#include <algorithm>

#include "conv2d/cpu_winograd.h"
#include "cpu/machine.h"
#include "cpu/strassen_product.h"

namespace nnarch {
namespace {

// Costs are in the time of one FMA on vectors, which is the yardstick on every instruction set. The
// constants were fitted to 86 shapes under AVX2 and AVX-512; README.md says how well.
constexpr double kDirect = 1.06;       // of an FMA in the direct product, with its overheads
constexpr double kProduct = 1.08;      // of an FMA in the products between the transforms
constexpr double kLeastRowTile = 4.5;  // of a step of the register tile, however few its rows are
constexpr double kTransform = 8;       // of a value transformed
constexpr double kPackDirect = 2;      // of a vector of packed weights
constexpr double kCall = 25000, kStages = 3000;  // of a call, and of its parts in Winograd

// Values of a transformed weight: memory has an end.
constexpr int64_t kMostPacked = int64_t{64} << 20;

// Of Strassen's product: a vector of a left factor, written to the second-level cache, and of a
// product, which is written there and read again.
constexpr double kLeftFactor = 5, kProductRead = 9;
// It must gain this much: what it costs moves by as much from machine to machine.
constexpr double kWorthwhile = 0.97;

// Of the weight gradient: an FMA of either product, a vector of sums put in order, transformed
// back.
constexpr double kGradProduct = 1.15, kGradOrder = 8;

// Of a vector that is transformed once: of weights that come unpacked, beside what packing them for
// the direct product takes, and of sums that become a weight's gradient. Fitted on Zen 3 and 4 and,
// where the last-level cache is far, on Intel Emerald Rapids, whose FMAs take half the time.
double pack_transformed() { return far_l3() ? 18 : 9; }
double grad_back() {
  const bool spills = winograd().nr == 16;  // AVX2, whose 16 registers do not hold a transform
  return far_l3() ? 16 : spills ? 20 : 6;
}

double vectors(int64_t channels) { return double(ceil_div(channels, winograd().nr / 2)); }

double direct_cost(const ConvWork& w) {
  const double positions = double(w.n) * double(w.grid_h) * double(w.grid_w);
  const double weights = double(w.kernel.taps()) * double(w.depth) * vectors(w.columns);
  return positions * weights * kDirect + (w.packed ? 0 : weights * kPackDirect) + kCall;
}

GridImage<float> image_of(const ConvWork& w) {
  GridImage<float> image{};
  image.n = w.n, image.grid_h = w.grid_h, image.grid_w = w.grid_w, image.depth = w.depth;
  return image;
}

// With stride 2 weights grow 2.8 to 9 times, and what is fetched ahead of products has left L2. V
// counts where it comes in groups, unless the last-level cache is far: then it is asked for ahead.
double strided_reads(const WinogradTiles& tiles, const ConvWork& w) {
  const WinogradReads reads = winograd_reads(tiles, ceil_div(w.columns, winograd().nr), w.packed);
  const double lanes = double(winograd().nr / 2);
  double live = double(reads.weights), bytes = live * double(reads.passes);
  if (reads.passes > 1 && !far_l3()) live += double(reads.v_at_once), bytes += double(reads.v);
  return live > 0 ? read_cost(live, lanes) * bytes / live : 0;
}

// Products whose weights are read meanwhile. A far last-level cache brings them early, and rows so
// few that they read as they multiply wait for the longer of both; on a machine with AVX-512 (Zen
// 4) at 30 GB/s, a fifth faster than `read` has it. Of more rows half of the reading shows.
double with_reading(double products, double read, double rows) {
  if (far_l3()) return std::max(products, read);
  if (rows > double(winograd().readers)) return products + read / 2;
  return std::max(products, winograd().nr == 32 ? read * 0.8 : read);
}

double winograd_cost(const ConvWork& w, const WinogradTile& tile) {
  const GridImage<float> image = image_of(w);
  const WinogradTiles tiles{image, tile};
  const double inputs = double(tiles.values());
  const double outputs = inputs * double(tile.planes()) / double(tile.values());
  const double pairs = double(w.depth) * vectors(w.columns),
               weights = double(tile.values()) * pairs;
  const double rows = winograd_height(tiles, w.columns, w.packed);
  const double step = std::max(1.0, kLeastRowTile / (2 * rows));
  const double products = inputs * pairs * kProduct * step;
  const double values = inputs * vectors(w.depth) + outputs * vectors(w.columns);
  const double lanes = double(winograd().nr / 2), bytes = weights * lanes * sizeof(float);
  const double read = w.packed ? read_cost(bytes, lanes) : 0;
  const double by_reads =
      tile.stride == 2 ? products + strided_reads(tiles, w) : with_reading(products, read, rows);
  return by_reads + values * kTransform + (w.packed ? 0 : weights * pack_transformed()) + kCall +
         kStages;
}

double strassen_cost(const ConvWork& w) {
  const double pairs = double(w.n) * double(ceil_div(w.grid_h * w.grid_w, int64_t{2}));
  const double left = vectors(w.depth) / 2, products = vectors(w.columns) / 2;
  const double each =
      double(w.depth) / 2 * products * kDirect + left * kLeftFactor + products * kProductRead;
  const double lanes = double(winograd().nr / 2);
  const double bytes = double(w.columns) * double(w.depth) * sizeof(float);
  const double more_to_read = read_cost(bytes * 7 / 4, lanes) - read_cost(bytes, lanes);
  return kStrassenProducts * pairs * each + more_to_read + kCall + kStages;
}

double direct_weight_grad_cost(const ConvWork& w) {
  const double positions = double(w.n) * double(w.grid_h) * double(w.grid_w);
  const int64_t taps = w.kernel.taps();
  const double width = w.windows ? vectors(taps * w.depth) : double(taps) * vectors(w.depth);
  return double(w.columns) * width * (positions * kGradProduct + kGradOrder) + kCall;
}

double winograd_weight_grad_cost(const ConvWork& w, const WinogradTile& tile) {
  const GridImage<float> image = image_of(w);
  const WinogradTiles tiles{image, tile};
  const double inputs = double(tiles.values());
  const double outputs = inputs * double(tile.planes()) / double(tile.values());
  const double pairs = double(w.columns) * vectors(w.depth);
  const double values = inputs * vectors(w.depth) + outputs * vectors(w.columns);
  return pairs * (inputs * kGradProduct + double(tile.values()) * grad_back()) +
         values * kTransform + kCall;
}

// The tile of least cost, or 0 for the direct product.
template <class Cost>
WinogradTile cheapest(const ConvWork& work, double direct, const Cost& cost_of) {
  // With stride 2 they are up to nine times the weight's, for less of a gain.
  const int64_t most = work.kernel.stride == 2 ? kMostPacked / 8 : kMostPacked;
  WinogradTile best = work.kernel, tile = work.kernel;
  best.m = 0;
  if (precision() == Precision::highest || work.n == 0) return best;
  double least = direct;
  for (tile.m = 2; tile.m <= 6; ++tile.m) {
    if (tile.m > 4 && precision() != Precision::medium) break;
    if (!winograd_serves(tile, work.depth)) continue;
    if (tile.values() * work.depth * work.columns > most) break;
    const double cost = cost_of(work, tile);
    if (cost < least) best = tile, least = cost;
  }
  return best;
}

// Pairs of pixels of a 1×1 kernel, where Strassen's product costs less; only packed, for the sums
// of weights take as long as many pixels.
WinogradTile choose_pair(const ConvWork& w) {
  WinogradTile tile = w.kernel;
  const bool serves = w.packed && strassen_serves(w.columns, w.depth) &&
                      strassen_packed_size(w.columns, w.depth) <= kMostPacked;
  if (precision() == Precision::highest || !serves) return tile;
  if (strassen_cost(w) < direct_cost(w) * kWorthwhile) tile.m = 2;
  return tile;
}

}  // namespace

bool winograd_serves(const WinogradTile& tile, int64_t depth) {
  const int64_t m = tile.m, least = std::min(tile.rows, tile.columns);
  if (std::max(tile.rows, tile.columns) != 3)
    return tile.rows == 5 && tile.columns == 5 && tile.stride == 1 && m == 2;
  if (least == 2) return false;
  if (tile.stride == 2) return m >= 2 && m <= 4 && depth % 16 == 0;
  if (tile.stride != 1 || m == 3) return false;
  return m >= 2 && m <= (least == 1 ? 4 : 6);
}

bool tile_serves(const WinogradTile& tile, int64_t columns, int64_t depth) {
  if (tile.taps() > 1) return winograd_serves(tile, depth);
  return tile.m == 2 && tile.stride == 1 && strassen_serves(columns, depth);
}

WinogradTile choose_tile(const ConvWork& work) {
  if (work.kernel.taps() == 1) return choose_pair(work);
  return cheapest(work, direct_cost(work), winograd_cost);
}

WinogradTile choose_weight_grad_tile(const ConvWork& work) {
  return cheapest(work, direct_weight_grad_cost(work), winograd_weight_grad_cost);
}

}  // namespace nnarch
