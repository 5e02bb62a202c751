// Capsule routing with samples side by side: votes are computed again in every iteration and never
// leave the first cache.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "capsule_routing/cpu_routing.h"
#include "cpu/machine.h"

namespace nnarch {

// Whether computing votes in every iteration costs less than storing them once and reading them
// back in all others. Counted in multiply-adds of vectors for each vector of votes; those of a
// group of samples must be too many for the second cache, and sums and outputs few enough for it.
template <class T>
bool votes_in_lanes(const Routing<T>& r, int64_t iterations, int64_t lanes) {
  const double vector_floats = static_cast<double>(lanes) * sizeof(T) / 4;
  const double bytes = static_cast<double>(r.group * r.votes_step) * sizeof(T);
  const double read = read_cost(bytes, vector_floats) / (bytes / (vector_floats * 4));
  const auto in = static_cast<double>(r.shape.in), n = static_cast<double>(iterations);
  // Beside the products: dots, weighted sums, and the votes' way to the first cache.
  const double again = n * in + (n - 1) * 3, stored = in + n * read;
  if (4 * r.outputs * lanes * int64_t{sizeof(T)} > l2_bytes() / 2) return false;
  const int64_t padded_samples = ceil_div(r.samples, lanes) * lanes;
  return again * static_cast<double>(padded_samples) < stored * static_cast<double>(r.samples);
}

template <class T>
struct LaneRouting {
  const Routing<T>& r;
  const RoutingTable<T>& table;
  const T *x, *weight, *bias;  // the weight [O, I, D_out, D_in]
  int64_t iterations;
  T *sums, *v;

  int64_t lanes() const { return table.lanes; }
  int64_t groups() const { return ceil_div(r.samples, lanes()); }
  int64_t samples_of(int64_t group) const { return std::min(lanes(), r.samples - group * lanes()); }
  int64_t state() const { return r.outputs * lanes(); }

  // Groups [begin, end). A block of the weight comes from memory once for all of them.
  void run(int64_t begin, int64_t end) const {
    const int64_t count = end - begin;
    const Scratch<T> memory(2 * count * state()), x_block(r.x_block * lanes()),
        scratch(table.lane_capsules * (r.outputs + r.shape.out) * lanes());
    T *const all_sums = memory.get(), *const outputs = all_sums + count * state();
    std::fill_n(outputs, count * state(), T{0});
    for (int64_t n = 0; n < iterations; ++n) {
      std::fill_n(all_sums, count * state(), T{0});
      for (int64_t i = 0; i < r.shape.blocks; ++i)
        for (int64_t g = 0; g < count; ++g) {
          const LaneCapsules<T> c = capsules(begin + g, i, x_block.get());
          T* const mine = all_sums + g * state();
          if (n == 0)
            table.lane_sums(r.shape, c, mine);
          else
            table.lane_iteration(r.shape, c, outputs + g * state(), scratch.get(), mine);
        }
      for (int64_t g = 0; g < count; ++g)
        finish(begin + g, n, all_sums + g * state(), scratch.get(), outputs + g * state());
    }
  }

  // Block i of the input capsules for a group's samples.
  LaneCapsules<T> capsules(int64_t group, int64_t i, T* to) const {
    const int64_t in = r.shape.in, inside = r.inside(i), rows = samples_of(group);
    table.to_lanes(x + (group * lanes() * r.inputs + i * kCapsuleBlock<T>)*in, r.inputs * in, rows,
                   inside * in, to);
    return {weight + i * kCapsuleBlock<T> * r.shape.dim * in, r.inputs * r.shape.dim * in, to,
            inside};
  }

  // The end of iteration n: its sums, and after the last one the outputs, to every sample.
  void finish(int64_t group, int64_t n, T* mine, T* values, T* outputs) const {
    // Without logits every softmax is 1/O.
    const T scale = n > 0 ? T{1} : T{1} / static_cast<T>(r.shape.out);
    table.lane_outputs(r.shape, scale, bias, mine, values, outputs);
    const int64_t first = group * lanes(), step = iterations * r.outputs;
    table.transpose(mine, lanes(), sums + first * step + n * r.outputs, step, r.outputs,
                    samples_of(group));
    if (n == iterations - 1)
      table.transpose(values, lanes(), v + first * r.outputs, r.outputs, r.outputs,
                      samples_of(group));
  }
};

// Threads take runs of groups. Groups do not depend on the threads, nor their arithmetic on which
// groups share a run.
template <class T>
void route_in_lanes(const LaneRouting<T>& routing) {
  const int64_t state_bytes = 2 * routing.state() * static_cast<int64_t>(sizeof(T));
  const int64_t most = std::max<int64_t>(1, l2_bytes() / 4 / state_bytes);
  torch::stable::parallel_for(0, routing.groups(), 1, [&](int64_t begin, int64_t end) {
    FlushDenormals guard;
    for (int64_t g = begin; g < end; g += most) routing.run(g, std::min(g + most, end));
  });
}

}  // namespace nnarch
