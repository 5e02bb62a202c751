// How a depthwise-separable convolution is cut: by its shape and the size of the caches.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/machine.h"
#include "depthwise_separable/cpu_problem.h"

namespace nnarch {

// Rows of the product in a group, at most: its weights are read again for every group, which is
// nothing beside 100 rows.
inline constexpr int64_t kGroupPixels = 256;
// Groups that a problem should have, so that several threads have work.
inline constexpr int64_t kLeastGroups = 4;
// Output rows of a task at least where the input is expanded: the expanded rows that two tasks
// share are computed twice.
inline constexpr int64_t kExpandedRows = 14;

struct SeparablePlan {
  bool fused;      // depthwise rows go to a buffer, and from there into the product
  bool expanded;   // so do the expanded rows; otherwise the expansion is a product of its own
  int64_t images;  // whole images in a group, or 1
  int64_t rows;    // output rows in a group; all of them where there are several images
  int64_t parts;   // tasks of an image where the input is expanded
};

template <class T>
class SeparablePlanner {
 public:
  explicit SeparablePlanner(const SeparableConv<T>& s)
      : s_(s), pitch_(buffer_pitch<T>(s.p.k)), expanded_pitch_(buffer_pitch<T>(s.p.c)) {}

  SeparablePlan plan() const {
    const int64_t plane = s_.plane();
    SeparablePlan plan{false, false, 1, s_.p.oh, 1};
    plan.expanded = s_.in > 0 && expands_in_cache();
    if (plane <= kGroupPixels / 2 && !plan.expanded) {
      plan.images = std::clamp<int64_t>(fit() / std::max<int64_t>(plane, 1), 1, s_.p.n);
      plan.images = ceil_div(s_.p.n, ceil_div(s_.p.n, plan.images));
    } else {
      plan.rows = group_rows(plan.expanded);
    }
    const int64_t groups = ceil_div(s_.p.n, plan.images) * ceil_div(s_.p.oh, plan.rows);
    const bool row_fits = s_.p.ow * pitch_ * size() <= l2_bytes() / 2;
    plan.fused = plan.expanded || (s_.in == 0 && groups >= kLeastGroups && row_fits);
    if (plan.expanded)
      plan.parts = std::clamp<int64_t>(s_.p.oh / kExpandedRows, 1,
                                       ceil_div(kLeastGroups, std::max<int64_t>(s_.p.n, 1)));
    return plan;
  }

  int64_t pitch() const { return pitch_; }
  int64_t expanded_pitch() const { return expanded_pitch_; }
  // Input rows that `rows` output rows read, one after the other.
  int64_t input_rows(int64_t rows) const {
    return (rows - 1) * s_.p.stride_h + (s_.p.r - 1) * s_.p.dilation_h + 1;
  }

 private:
  static int64_t size() { return sizeof(T); }

  // Output pixels whose depthwise values fill a quarter of the second-level cache.
  int64_t fit() const {
    return std::min(kGroupPixels, std::max<int64_t>(1, l2_bytes() / 4 / (pitch_ * size())));
  }

  int64_t group_rows(bool expanded) const {
    int64_t rows = std::max<int64_t>(kBlockRowsMost, fit() / s_.p.ow);
    while (expanded && rows > kBlockRowsMost && buffer_bytes(rows) > l2_bytes() / 2) --rows;
    rows = ceil_div(s_.p.oh, ceil_div(s_.p.oh, rows));
    return std::min(s_.p.oh, round_up(rows, kBlockRowsMost));
  }

  int64_t buffer_bytes(int64_t rows) const {
    return size() * (input_rows(rows) * s_.p.w * expanded_pitch_ + rows * s_.p.ow * pitch_);
  }

  // Where the expanded image leaves the second-level cache, a few rows of it stay there, and few
  // are computed twice.
  bool expands_in_cache() const {
    const int64_t image = s_.p.h * s_.p.w * s_.p.c * size();
    return image > l2_bytes() / 2 && s_.p.oh >= kExpandedRows &&
           buffer_bytes(kBlockRowsMost) <= l2_bytes() * 3 / 4 && s_.p.r <= 2 * kBlockRowsMost + 1 &&
           s_.p.dilation_h == 1;
  }

  const SeparableConv<T>& s_;
  const int64_t pitch_, expanded_pitch_;
};

}  // namespace nnarch
