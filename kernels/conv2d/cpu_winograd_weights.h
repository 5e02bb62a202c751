// Transformed weights: panels of output channels, packed ahead, or a part of a panel right before
// its product.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv2d/winograd.h"
#include "conv2d/winograd_taps.h"
#include "conv2d/winograd_tile.h"
#include "conv2d/winograd_windows.h"
#include "cpu/arena.h"
#include "cpu/pack_weight.h"
#include "cpu/parallel.h"

namespace nnarch {

// A panel of transformed weights, or so much of its depth: [xi][slot][depth][nr].
struct WinogradPanel {
  int64_t slot;  // elements of a slot
  int64_t gap;   // behind the slots of a plane

  explicit WinogradPanel(int64_t depth)
      : slot(depth * winograd().nr), gap(winograd_plane(slot) - slot) {}
  int64_t plane(const WinogradTile& tile, int64_t xi) const { return tile.slots(xi) * slot + gap; }
  int64_t size(const WinogradTile& tile) const {
    return tile.values() * slot + tile.planes() * gap;
  }
};

inline int64_t winograd_packed_size(int64_t columns, int64_t depth, const WinogradTile& tile) {
  return checked_product(ceil_div(columns, winograd().nr), WinogradPanel(depth).size(tile));
}

inline WeightView<float> panel_of(const WeightView<float>& view, int64_t p) {
  return view.columns_from(p * winograd().nr, winograd().nr);
}

// The cache lines of a part of a weight, as offsets from its first element. They lie KBs apart, so
// that no hardware foresees them.
class WeightLines {
 public:
  explicit WeightLines(const WeightView<float>& part) : runs_(part), offsets_(runs_.lines()) {
    int64_t count = 0;
    for (const int64_t tap : runs_.first)
      for (int64_t i = 0; i < runs_.count; ++i)
        for (int64_t j = 0; j < runs_.length; j += kLine)
          offsets_[count++] = tap + i * runs_.step + j;
  }

  // Part `i` of `parts` of the lines of a weight part that lies at `data`; none where that is null.
  Lines share(const float* data, int64_t i, int64_t parts) const {
    if (!data) return {};
    const int64_t first = runs_.lines() * i / parts, end = runs_.lines() * (i + 1) / parts;
    return {data, offsets_.get() + first, end - first};
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(float);

  // Where memory is read in one go: of each of the first, `count` runs that are `step` apart.
  struct Runs {
    std::vector<int64_t> first{0};
    int64_t count = 0, step = 0, length = 0;

    explicit Runs(const WeightView<float>& part) {
      const int64_t span = *std::max_element(part.tap_offset.begin(), part.tap_offset.end()) + 1;
      if (part.column_stride == 1) {
        first = part.tap_offset;
        count = part.depth, step = part.depth_stride, length = part.columns;
      } else if (part.depth_stride == 1) {
        first = part.tap_offset;
        count = part.columns, step = part.column_stride, length = part.depth;
      } else if (part.depth_stride <= 2 * span) {
        count = part.columns, step = part.column_stride;
        length = (part.depth - 1) * part.depth_stride + span;
      } else if (part.column_stride <= 2 * span) {
        count = part.depth, step = part.depth_stride;
        length = (part.columns - 1) * part.column_stride + span;
      }
      if (part.depth <= 0 || part.columns <= 0) count = 0;
    }
    int64_t lines() const {
      return static_cast<int64_t>(first.size()) * count * ceil_div(length, kLine);
    }
  };

  Runs runs_;
  Scratch<int64_t> offsets_;
};

// Transformed weights of a panel, or of a part of one, to dst[xi][slot][channel][nr].
inline void winograd_transform(const WeightView<float>& part, const WinogradTile& tile,
                               const WinogradPanel& panel, int64_t at_once, float* dst) {
  const int64_t nr = winograd().nr, taps = part.taps();
  const auto weights = winograd_transforms(tile).weight;
  const auto transform = [&](const float* data, const int64_t* tap, int64_t step, int64_t d,
                             int64_t some) {
    weights({data, tap, step, some}, dst + d * nr, panel.slot, panel.gap);
  };
  if (part.column_stride == 1 && part.columns == nr)
    return transform(part.data, part.tap_offset.data(), part.depth_stride, 0, part.depth);
  const bool dense_taps = has_dense_taps(part);
  Scratch<float> direct(dense_taps ? 0 : taps * at_once * nr);
  Scratch<int64_t> offsets(taps);
  if (dense_taps) {
    for (int64_t t = 0; t < taps; ++t) offsets[t] = part.tap_offset[t] * nr;
    return for_transposed_taps(part, [&](const float* rows, int64_t d, int64_t some) {
      transform(rows, offsets.get(), part.depth_stride * nr, d, some);
    });
  }
  for (int64_t d = 0; d < part.depth; d += at_once) {
    const int64_t some = std::min(at_once, part.depth - d);
    for (int64_t t = 0; t < taps; ++t) {
      offsets[t] = t * some * nr;
      gemm<float>().pack_panel(part.data + d * part.depth_stride + part.tap_offset[t],
                               part.depth_stride, part.column_stride, some, part.columns,
                               direct.get() + offsets[t]);
    }
    transform(direct.get(), offsets.get(), nr, d, some);
  }
}

// The transformed weights of panel p.
inline void winograd_pack_panel(const WeightView<float>& view, const WinogradTile& tile, int64_t p,
                                float* dst) {
  // Channels at once stay in cache, and are several lines of a weight in channels_last, which the
  // hardware then fetches ahead: one line each took 1.5 times as long (512, 1024 channels).
  constexpr int64_t cache = int64_t{64} << 10;
  const int64_t each = view.taps() * winograd().nr * int64_t{sizeof(float)};
  const int64_t at_once = std::max<int64_t>(16, cache / each / 16 * 16);
  const WinogradPanel panel(view.depth);
  winograd_transform(panel_of(view, p), tile, panel, at_once, dst);
  for (int64_t xi = 0; xi < tile.planes(); ++xi) {  // what lies between the planes
    dst += panel.plane(tile, xi);
    std::fill_n(dst - panel.gap, panel.gap, 0.0f);
  }
}

inline void winograd_pack(const WeightView<float>& view, const WinogradTile& tile, float* dst) {
  const int64_t panel = WinogradPanel(view.depth).size(tile);
  parallel_tasks(ceil_div(view.columns, winograd().nr),
                 [&](int64_t p) { winograd_pack_panel(view, tile, p, dst + p * panel); });
}

}  // namespace nnarch
