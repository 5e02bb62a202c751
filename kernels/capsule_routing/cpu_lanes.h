// Capsule routing with samples side by side: votes are computed again in every iteration and never
// leave the first cache.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "capsule_routing/cpu_routing.h"
#include "cpu/machine.h"

namespace nnarch {

// What an order of the routing does: passes that compute votes again, those of them that have dots
// and weighted sums, and how often votes that were stored instead go to memory or come from it.
struct VotePasses {
  int64_t again, iterations, stored;
};
inline VotePasses forward_passes(int64_t iterations) {
  return {iterations, iterations - 1, iterations};
}
// The last iteration has its stored votes from the second cache.
inline VotePasses backward_passes(int64_t iterations) {
  return {iterations - 1, iterations - 1, iterations - 1};
}

// Whether computing votes in every iteration costs less than storing them once and reading them
// back in all others. Counted in multiply-adds of vectors for each vector of votes; those of a
// group of samples must be too many for the second cache, and sums and outputs few enough for it.
template <class T>
bool votes_in_lanes(const Routing<T>& r, int64_t lanes, const VotePasses& passes) {
  const double vector_floats = static_cast<double>(lanes) * sizeof(T) / 4;
  const double bytes = static_cast<double>(r.group * r.votes_step) * sizeof(T);
  const double read = read_cost(bytes, vector_floats) / (bytes / (vector_floats * 4));
  const auto in = static_cast<double>(r.shape.in);
  // Beside the products: dots, weighted sums, and the votes' way to the first cache.
  const double again =
      static_cast<double>(passes.again) * in + static_cast<double>(passes.iterations) * 3;
  const double stored = in + static_cast<double>(passes.stored) * read;
  if (4 * r.outputs * lanes * int64_t{sizeof(T)} > l2_bytes() / 2) return false;
  const int64_t padded_samples = ceil_div(r.samples, lanes) * lanes;
  return again * static_cast<double>(padded_samples) < stored * static_cast<double>(r.samples);
}

// Block i of the input capsules for `count` samples from `first` on, of which `to` takes x.
template <class T>
LaneCapsules<T> lane_capsules(const Routing<T>& r, const RoutingTable<T>& table, const T* weight,
                              const T* x, int64_t i, int64_t first, int64_t count, T* to) {
  const int64_t in = r.shape.in, inside = r.inside(i), begin = i * kCapsuleBlock<T>;
  table.to_lanes(x + (first * r.inputs + begin) * in, r.inputs * in, count, inside * in, to);
  return {weight + begin * r.shape.dim * in, r.inputs * r.shape.dim * in, to, inside};
}

// f(begin, end) for runs of groups whose state, of so many elements each, is in the second cache.
// Groups do not depend on the threads, nor their arithmetic on which groups share a run.
template <class T, class F>
void over_lane_groups(int64_t groups, int64_t state, const F& f) {
  const int64_t bytes = state * static_cast<int64_t>(sizeof(T));
  const int64_t most = std::max<int64_t>(1, l2_bytes() / 4 / bytes);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    FlushDenormals guard;
    for (int64_t g = begin; g < end; g += most) f(g, std::min(g + most, end));
  });
}

// Blocks of input capsules whose sums are one chain of additions, which must not grow with them.
inline constexpr int64_t kChainBlocks = 16;

// At the end of a chain, which block i of so many may be: its sums to those of all, and from zero.
template <class T>
void end_chain(int64_t i, int64_t blocks, T* chain, int64_t count, T* all) {
  if ((i + 1) % kChainBlocks != 0 && i + 1 < blocks) return;
  for (int64_t j = 0; j < count; ++j) all[j] += chain[j], chain[j] = T{0};
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
    const Scratch<T> memory(3 * count * state()), x_block(r.x_block * lanes()),
        scratch(table.lane_capsules * (r.outputs + r.shape.out) * lanes());
    T *const all_sums = memory.get(), *const chain = all_sums + count * state(),
             *const outputs = chain + count * state();
    std::fill_n(chain, 2 * count * state(), T{0});
    for (int64_t n = 0; n < iterations; ++n) {
      std::fill_n(all_sums, count * state(), T{0});
      for (int64_t i = 0; i < r.shape.blocks; ++i) {
        for (int64_t g = 0; g < count; ++g) {
          const LaneCapsules<T> c = lane_capsules(r, table, weight, x, i, (begin + g) * lanes(),
                                                  samples_of(begin + g), x_block.get());
          T* const mine = chain + g * state();
          if (n == 0)
            table.lane_sums(r.shape, c, mine);
          else
            table.lane_iteration(r.shape, c, outputs + g * state(), scratch.get(), mine);
        }
        end_chain(i, r.shape.blocks, chain, count * state(), all_sums);
      }
      for (int64_t g = 0; g < count; ++g)
        finish(begin + g, n, all_sums + g * state(), scratch.get(), outputs + g * state());
    }
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

template <class T>
void route_in_lanes(const LaneRouting<T>& routing) {
  over_lane_groups<T>(routing.groups(), 3 * routing.state(),
                      [&](int64_t begin, int64_t end) { routing.run(begin, end); });
}

}  // namespace nnarch
