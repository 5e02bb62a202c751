// Winograd's algorithm with a stride of 2 (winograd_strided.h): forward, and both gradients, which
// are its transposes with as few products. Some input channels at a time, so that their transformed
// weights and values stay in the last-level cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "conv2d/cpu_views.h"
#include "conv2d/cpu_weight_rows.h"
#include "conv2d/cpu_winograd.h"
#include "conv2d/cpu_winograd_parts.h"
#include "conv2d/winograd_strided.h"
#include "cpu/arena.h"
#include "cpu/layout.h"
#include "cpu/machine.h"
#include "cpu/parallel.h"

namespace nnarch {

// One group of a convolution with stride 2. Outputs and their gradients are channels_last; the
// input and its gradient may be `planar` (NCHW): then some channels are transposed on the way.
class StridedWinograd {
 public:
  StridedWinograd(const ConvShape& p, int64_t group, bool planar)
      : p_(p),
        group_(group),
        planar_(planar),
        transforms_(*strided_transforms(p.r)),
        tile_{transforms_.m, p.r, p.r, 2},
        rows_(ceil_div(p.oh, tile_.m)),
        columns_(ceil_div(p.ow, tile_.m)),
        k_row_(round_up(p.group_k(), winograd().nr) + kGap) {
    const int64_t an_image = rows_ * columns_, all = checked_product(p.n, an_image);
    const int64_t blocks = ceil_div(all, kMostTiles);
    // Whole images, whose tiles overlap, unless they have too many.
    const int64_t unit = an_image <= kMostTiles ? an_image : 1;
    block_ = std::min(round_up(ceil_div(all, blocks), unit), all);
  }

  int64_t tiles() const { return p_.n * rows_ * columns_; }

  // Whether planar images are served: blocks are whole images.
  static bool serves_planar(const ConvShape& p) {
    const int64_t m = strided_transforms(p.r)->m;
    return ceil_div(p.oh, m) * ceil_div(p.ow, m) <= kMostTiles;
  }

  void forward(const float* x, const WeightView<float>& weight, float* y,
               const Epilogue<float>& epilogue) const {
    const OutputGrid out{p_.oh * p_.ow * p_.k, p_.ow * p_.k, p_.k};
    const int64_t unit = chunk(), panels = ceil_div(p_.group_k(), nr());
    const StridedPlanes v(tile_, block_, unit, kGap), u(tile_, panels, unit * nr(), 0);
    const int64_t plane = even_plane();
    LargeBuffer values(v.size()), weights(u.size()), products(tile_.planes() * plane);
    LargeBuffer image(planar_size());
    for (int64_t first = 0; first < tiles(); first += block_) {
      const int64_t count = std::min(block_, tiles() - first);
      for (int64_t c = 0; c < p_.group_c(); c += unit) {
        transform_input(input_pixels(x, c, first, count, image.get()), c, first, count, v,
                        values.get());
        pack(weight, c, u, weights.get());
        parallel_tasks(tile_.planes() * panels, [&](int64_t task) {
          const int64_t xi = task / panels, panel = task % panels;
          const float* const next = values.get() + v.begin(xi + 1);
          multiply({.a = values.get() + v.begin(xi),
                    .a_step = v.row(xi),
                    .b = weights.get() + u.begin(xi) + panel * u.row(xi),
                    .depth = tile_.slots(xi) * unit,
                    .c = products.get() + xi * plane + panel * nr(),
                    .c_step = k_row_,
                    .rows = count,
                    .columns = p_.group_k() - panel * nr(),
                    .chain = 2 * kChain,
                    .add = c > 0},
                   share(next, xi + 1 < tile_.planes() ? v.begin(xi + 2) - v.begin(xi + 1) : 0,
                         panel, panels));
        });
      }
      write_outputs(products.get(), plane, first, count, y, out, epilogue);
    }
  }

  // dx of the group's channels, all of them written.
  void input_grad(const float* grad, const WeightView<float>& weight, float* dx) const {
    const int64_t unit = chunk(), panels = unit / nr(), k = p_.group_k();
    const StridedPlanes q(tile_, block_, unit, kGap), u(tile_, 1, unit * k, 0);
    const int64_t plane = even_plane();
    LargeBuffer products(q.size()), weights(u.size()), grads(tile_.planes() * plane);
    LargeBuffer image(planar_size());
    for (int64_t first = 0; first < tiles(); first += block_) {
      const int64_t count = std::min(block_, tiles() - first);
      transform_grad(grad, first, count, plane, grads.get());
      for (int64_t c = 0; c < p_.group_c(); c += unit) {
        pack_transposed(weight, c, u, weights.get());
        parallel_tasks(tile_.planes() * panels, [&](int64_t task) {
          const int64_t xi = task / panels, slots = tile_.slots(xi);
          for (int64_t slot = 0; slot < slots; ++slot) {
            const int64_t column = slot * unit + task % panels * nr();
            multiply({.a = grads.get() + xi * plane,
                      .a_step = k_row_,
                      .b = weights.get() + u.begin(xi) + column * k,
                      .depth = k,
                      .c = products.get() + q.begin(xi) + column,
                      .c_step = q.row(xi),
                      .rows = count,
                      .columns = nr(),
                      .chain = 2 * kChain},
                     share(grads.get() + (xi + 1) * plane, xi + 1 < tile_.planes() ? plane : 0,
                           slot * panels + task % panels, slots * panels));
          }
        });
        add_input_grad(products.get(), q, c, first, count, image.get(), dx);
      }
    }
  }

  // dw of the group, [k][c][tap] or, channels_last, [k][tap][c].
  void weight_grad(const float* x, const float* grad, bool channels_last, float* dw) const {
    const int64_t unit = chunk(), k = p_.group_k();
    const WeightRows<float> rows(dw, k, p_.taps(), p_.group_c(), channels_last);
    const StridedPlanes v(tile_, block_, unit, kGap), s(tile_, k, unit, kGap);
    const int64_t plane = even_plane();
    LargeBuffer values(v.size()), sums(s.size()), grads(tile_.planes() * plane);
    LargeBuffer image(planar_size());
    const bool one_block = block_ >= tiles();
    if (one_block) transform_grad(grad, 0, tiles(), plane, grads.get());
    for (int64_t c = 0; c < p_.group_c(); c += unit) {
      for (int64_t first = 0; first < tiles(); first += block_) {
        const int64_t count = std::min(block_, tiles() - first);
        if (!one_block) transform_grad(grad, first, count, plane, grads.get());
        transform_input(input_pixels(x, c, first, count, image.get()), c, first, count, v,
                        values.get());
        parallel_tasks(tile_.planes(), [&](int64_t xi) {
          const int64_t panels = tile_.slots(xi) * unit / nr();
          const bool last = xi + 1 == tile_.planes();
          for (int64_t panel = 0; panel < panels; ++panel)
            multiply_outer({.a = grads.get() + xi * plane,
                            .a_step = k_row_,
                            .b = values.get() + v.begin(xi) + panel * nr(),
                            .b_step = v.row(xi),
                            .depth = count,
                            .c = sums.get() + s.begin(xi) + panel * nr(),
                            .c_step = s.row(xi),
                            .rows = k,
                            .columns = nr(),
                            .add = first > 0,
                            .chain = kChain},
                           share(grads.get() + (xi + 1) * plane, last ? 0 : plane, panel, panels),
                           share(values.get() + v.begin(xi + 1),
                                 last ? 0 : v.begin(xi + 2) - v.begin(xi + 1), panel, panels));
        });
      }
      parallel_tasks(k, [&](int64_t row) {
        Scratch<int64_t> at(tile_.values()), next(tile_.values());
        s.locate(row, at.get()), s.locate(std::min(row + 1, k - 1), next.get());
        Scratch<float> lines(p_.taps() * unit);
        transforms_.weight_grad(sums.get(), at.get(), next.get(), channels_from(c), lines.get(),
                                unit);
        rows.put(lines.get(), unit, row, c, channels_from(c));
      });
    }
  }

 private:
  // Input channels at a time: 1024 products' terms of 4 phases would be 44 MB of weights for 256.
  static constexpr int64_t kChannels = 64;
  static constexpr int64_t kMostTiles = 160, kChain = 32, kPacked = 16;
  static constexpr int64_t kGap = 16;  // rows a multiple of 4 KB apart would share a set of L1

  static int64_t nr() { return winograd().nr; }
  int64_t chunk() const { return std::min(round_up(p_.group_c(), nr()), kChannels); }
  int64_t even_plane() const { return winograd_plane(block_ * k_row_); }

  struct Place {
    int64_t image, y, x;  // of the tile's first output
  };
  Place place(int64_t tile) const {
    return {tile / (rows_ * columns_), tile / columns_ % rows_ * tile_.m,
            tile % columns_ * tile_.m};
  }

  // Some channels of images: `data` is pixel (0, 0) of image `first`.
  template <class F>
  struct Pixels {
    F* data;
    int64_t pixel, first;
  };
  int64_t channels_from(int64_t c) const { return std::min(chunk(), p_.group_c() - c); }
  int64_t plane() const { return p_.h * p_.w; }
  int64_t images_a_block() const { return block_ / (rows_ * columns_); }
  int64_t planar_size() const { return planar_ ? images_a_block() * plane() * chunk() : 0; }
  template <class F>
  F* planes_of(F* images, int64_t image, int64_t c) const {
    return images + (image * p_.c + group_ * p_.group_c() + c) * plane();
  }
  template <class F>
  Pixels<F> pixels_of(F* images, int64_t c) const {
    return {images + group_ * p_.group_c() + c, p_.c, 0};
  }

  // Input channels from c on of the images of some tiles; planar ones are transposed to `space`.
  Pixels<const float> input_pixels(const float* x, int64_t c, int64_t first, int64_t count,
                                   float* space) const {
    if (!planar_) return pixels_of(x, c);
    const int64_t an_image = rows_ * columns_, from = first / an_image;
    parallel_tasks(count / an_image, [&](int64_t i) {
      transpose_fn<float>()(planes_of(x, from + i, c), plane(), space + i * plane() * chunk(),
                            chunk(), channels_from(c), plane());
    });
    return {space, chunk(), from};
  }

  // The pixels that a tile's values are made of, with `outside` in place of those in the padding.
  template <class F>
  void find_pixels(const Place& at, const Pixels<F>& image, F* outside, F** pixels) const {
    F* const base = image.data + (at.image - image.first) * plane() * image.pixel;
    for (int64_t py = 0; py < 2; ++py)
      for (int64_t px = 0; px < 2; ++px)
        for (int64_t i = 0; i < tile_.points(tile_.rows, py); ++i)
          for (int64_t j = 0; j < tile_.points(tile_.columns, px); ++j) {
            const int64_t y = 2 * (at.y + i) + py - p_.top, x = 2 * (at.x + j) + px - p_.left;
            const bool inside = y >= 0 && y < p_.h && x >= 0 && x < p_.w;
            *pixels++ = inside ? base + (y * p_.w + x) * image.pixel : outside;
          }
  }

  // Input channels from c on of some tiles; channels that do not exist are zero.
  void transform_input(const Pixels<const float>& image, int64_t c, int64_t first, int64_t count,
                       const StridedPlanes& v, float* values) const {
    const int64_t unit = chunk();
    parallel_tasks(count, [&](int64_t t) {
      Scratch<float> zeros(unit);
      std::fill_n(zeros.get(), unit, 0.0f);
      Scratch<const float*> pixels(tile_.values());
      Scratch<int64_t> at(tile_.values()), next(tile_.values());
      find_pixels(place(first + t), image, static_cast<const float*>(zeros.get()), pixels.get());
      v.locate(t, at.get()), v.locate(std::min(t + 1, count - 1), next.get());
      transforms_.input(pixels.get(), channels_from(c), unit, values, at.get(), next.get());
    });
  }

  // Image by image, whose tiles overlap. Planar images are added up in `space`.
  void add_input_grad(const float* products, const StridedPlanes& q, int64_t c, int64_t first,
                      int64_t count, float* space, float* dx) const {
    const int64_t an_image = rows_ * columns_, from = first / an_image, some = channels_from(c);
    const Pixels<float> to = planar_ ? Pixels<float>{space, chunk(), from} : pixels_of(dx, c);
    parallel_tasks(ceil_div(first + count, an_image) - from, [&](int64_t task) {
      const int64_t image = from + task, begin = std::max(first, image * an_image);
      const int64_t end = std::min(first + count, (image + 1) * an_image);
      Scratch<float> outside(some);
      std::fill_n(outside.get(), some, 0.0f);
      Scratch<float*> pixels(tile_.values());
      Scratch<int64_t> at(tile_.values()), next(tile_.values());
      float* const own = to.data + (image - to.first) * plane() * to.pixel;
      for (int64_t i = 0; begin == image * an_image && i < plane(); ++i)
        std::fill_n(own + i * to.pixel, some, 0.0f);
      for (int64_t t = begin; t < end; ++t) {
        find_pixels(place(t), to, outside.get(), pixels.get());
        q.locate(t - first, at.get()), q.locate(std::min(t + 1 - first, count - 1), next.get());
        transforms_.input_grad(products, at.get(), next.get(), some, pixels.get());
      }
      if (planar_)
        transpose_fn<float>()(own, chunk(), planes_of(dx, image, c), plane(), plane(), some);
    });
  }

  void transform_grad(const float* grad, int64_t first, int64_t count, int64_t plane,
                      float* planes) const {
    parallel_tasks(count, [&](int64_t t) {
      Scratch<float> zeros(p_.group_k());
      std::fill_n(zeros.get(), p_.group_k(), 0.0f);
      Scratch<const float*> pixels(tile_.m * tile_.m);
      const Place at = place(first + t);
      const float** next = pixels.get();
      for (int64_t y = at.y; y < at.y + tile_.m; ++y)
        for (int64_t x = at.x; x < at.x + tile_.m; ++x)
          *next++ = y < p_.oh && x < p_.ow
                        ? grad + ((at.image * p_.oh + y) * p_.ow + x) * p_.k + group_ * p_.group_k()
                        : zeros.get();
      transforms_.grad(pixels.get(), p_.group_k(), planes + t * k_row_, plane, 0);
    });
  }

  void write_outputs(const float* products, int64_t plane, int64_t first, int64_t count, float* y,
                     const OutputGrid& out, const Epilogue<float>& epilogue) const {
    parallel_tasks(count, [&](int64_t t) {
      const Place at = place(first + t);
      const OutputTile tile{
          .offset = at.image * out.image_step + at.y * out.row_step + at.x * out.column_step,
          .row_step = out.row_step,
          .column_step = out.column_step,
          .rows = std::min(tile_.m, p_.oh - at.y),
          .columns = std::min(tile_.m, p_.ow - at.x)};
      for (int64_t k = 0; k < p_.group_k(); k += nr())
        transforms_.output(products + t * k_row_ + k, plane, p_.group_k() - k,
                           epilogue.from_channel(k), tile, y + k, false);
    });
  }

  // Transformed weights of input channels [c, c + unit), [panel of k][slot][c][nr] in a plane.
  void pack(const WeightView<float>& weight, int64_t c, const StridedPlanes& u,
            float* weights) const {
    const int64_t parts = ceil_div(chunk(), kPacked), end = p_.group_c();
    const int64_t tasks = ceil_div(p_.group_k(), nr()) * parts;
    const auto part_of = [&](int64_t task) {
      const int64_t panel = task / parts, d = task % parts * kPacked;
      WeightView<float> part = weight;
      part.data += panel * nr() * part.column_stride + (c + d) * part.depth_stride;
      part.columns = std::min(nr(), p_.group_k() - panel * nr());
      part.depth = std::clamp<int64_t>(end - c - d, 0, std::min(kPacked, chunk() - d));
      return part;
    };
    parallel_tasks(tasks, [&](int64_t task) {
      const int64_t panel = task / parts, d = task % parts * kPacked;
      pack_part(part_of(task), part_of(std::min(task + 1, tasks - 1)),
                std::min(kPacked, chunk() - d), panel, d * nr(), u, weights);
    });
  }

  // The same for the gradient of the input: [slot][panel of c][k][nr] in a plane.
  void pack_transposed(const WeightView<float>& weight, int64_t c, const StridedPlanes& u,
                       float* weights) const {
    const int64_t k = p_.group_k(), parts = ceil_div(k, kPacked), tasks = chunk() / nr() * parts;
    const auto part_of = [&](int64_t task) {
      const int64_t d = task % parts * kPacked, from = c + task / parts * nr();
      WeightView<float> part = weight;
      std::swap(part.column_stride, part.depth_stride);
      part.data += from * part.column_stride + d * part.depth_stride;
      part.columns = std::clamp<int64_t>(p_.group_c() - from, 0, nr());
      part.depth = part.columns > 0 ? std::min(kPacked, k - d) : 0;
      return part;
    };
    parallel_tasks(tasks, [&](int64_t task) {
      const int64_t panel = task / parts, d = task % parts * kPacked;
      pack_part(part_of(task), part_of(std::min(task + 1, tasks - 1)), std::min(kPacked, k - d), 0,
                (panel * k + d) * nr(), u, weights);
    });
  }

  // A panel of at most kPacked rows, `depth` with those that do not exist. The next one's part of
  // the weight comes into cache during the transform: its lines are KBs apart.
  void pack_part(const WeightView<float>& part, const WeightView<float>& after, int64_t depth,
                 int64_t row, int64_t offset, const StridedPlanes& u, float* weights) const {
    Scratch<int64_t> at(tile_.values());
    u.locate(row, at.get());
    Scratch<float> direct(p_.taps() * kPacked * nr());
    Scratch<int64_t> taps(p_.taps());
    const WeightLines ahead(after);
    if (part.depth > 0) pack_weight(part, direct.get());
    for (int64_t t = 0; t < p_.taps(); ++t) taps[t] = t * part.depth * nr();
    transforms_.weight({direct.get(), taps.get(), nr(), part.depth}, weights + offset, at.get(),
                       ahead.share(after.data, 0, 1));
    for (int64_t i = 0; i < tile_.values(); ++i)
      std::fill_n(weights + offset + at[i] + part.depth * nr(), (depth - part.depth) * nr(), 0.0f);
  }

  const ConvShape& p_;
  int64_t group_;
  bool planar_;
  const StridedTransforms& transforms_;
  WinogradTile tile_;
  int64_t rows_, columns_, k_row_, block_;
};

// Whether it is the fastest algorithm that the precision allows, for any of the three. Costs are in
// the time of an FMA on vectors, as in winograd_choice.cpp.
template <class T>
bool strided_winograd_serves(const ConvShape& p) {
  if (sizeof(T) != sizeof(float) || precision() == Precision::highest) return false;
  if (p.r != p.s || !strided_transforms(p.r) || p.stride_h != 2 || p.stride_w != 2) return false;
  if (p.dilation_h != 1 || p.dilation_w != 1 || p.group_c() < 16 || p.group_k() < 16) return false;
  const int64_t m = strided_transforms(p.r)->m;
  const WinogradTile tile{m, p.r, p.r, 2};
  const double tiles = double(p.n * ceil_div(p.oh, m) * ceil_div(p.ow, m));
  const double lanes = double(winograd().nr / 2), c = double(p.group_c()), k = double(p.group_k());
  const double values = double(tile.values()), planes = double(tile.planes());
  const double direct = double(p.n * p.oh * p.ow) * double(p.taps()) * c * k / lanes * 1.06;
  const double products = (tiles * 1.15 + 14) * values * c * k / lanes;
  const double transforms = tiles * (values * c + planes * k) / lanes * 12;
  return products + transforms < direct;
}

}  // namespace nnarch
