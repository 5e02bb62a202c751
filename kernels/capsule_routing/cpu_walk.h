// The iterations of capsule routing backwards, which leave the terms of the votes' gradients.
#pragma once

#include "capsule_routing/cpu_lanes.h"
#include "capsule_routing/cpu_routing.h"

namespace nnarch {

// The rank-1 terms of a sample's votes' gradients. Full: for every iteration r past the first c_r
// with ds_r, and db_r with the outputs so far; without logits, c_0 is 1/O. Detached: the last c.
struct Terms {
  int64_t iterations, count;
  bool detached, constant;

  Terms(int64_t iterations_, bool detach)
      : iterations(iterations_),
        count(iterations_ == 1 ? 0 : (detach ? 1 : 2 * (iterations_ - 1))),
        detached(detach),
        constant(!detach || iterations_ == 1) {}
};

// The walk back of the samples of a chunk, which begins at sample `base`.
template <class T>
struct WalkBack {
  const Routing<T>& r;
  const RoutingTable<T>& table;
  const Terms terms;
  const T *x, *grad, *sums;
  const T* packed;   // the weight
  const T* natural;  // the same [O, I, D_out, D_in] for votes in lanes, or null for votes in cache
  T* bias_grads = nullptr;  // [B][O·D_out]

  // Of the chunk, sample by sample.
  int64_t base = 0, count = 0;
  T *packed_x = nullptr, *coefficients = nullptr, *constants = nullptr, *factors = nullptr;

  int64_t coefficient_block() const { return terms.count * r.shape.out * kCapsuleBlock<T>; }
  int64_t coefficient_step() const { return padded<T>(r.shape.blocks * coefficient_block()); }
  int64_t factor_step() const { return terms.count * r.outputs; }
  // Samples that walk together.
  int64_t together() const { return natural ? table.lanes : r.group; }
  int64_t last() const { return terms.iterations - 1; }

  static void clear(T* p, int64_t count) {
    std::memset(p, 0, static_cast<size_t>(count) * sizeof(T));
  }

  // What a sample's walk needs, and the sums of its present iteration.
  struct Sample {
    T* before;   // outputs' running sums, which an iteration's logits agree with: [iterations + 1]
    T* dv;       // gradients of the outputs: [iterations]
    T* ds;       // of the present iteration's sums
    T* partial;  // Σ db·votes, a vector wide
  };
  int64_t sample_size() const { return r.outputs * (2 * terms.iterations + 2 + table.lanes); }
  Sample sample_at(const Scratch<T>& memory, int64_t index) const {
    const int64_t size = r.outputs, n = terms.iterations;
    T* const at = memory.get() + index * sample_size();
    return {at, at + (n + 1) * size, at + (2 * n + 1) * size, at + (2 * n + 2) * size};
  }

  void run() const {
    if (natural && last() > 0)
      return over_lane_groups<T>(ceil_div(count, table.lanes), 4 * r.outputs * table.lanes,
                                 [&](int64_t begin, int64_t end) {
                                   const int64_t first = begin * table.lanes;
                                   walk_in_lanes(first, std::min(end * table.lanes, count) - first);
                                 });
    parallel_tasks(ceil_div(count, r.group), [&](int64_t task) {
      const int64_t first = task * r.group;
      walk_in_cache(first, std::min(r.group, count - first));
    });
  }

  // Samples [first, first + some) of the chunk. The last iteration's gradient is known beforehand:
  // a block's votes go through it while they are in the second cache.
  void walk_in_cache(int64_t first, int64_t some) const {
    const int64_t block = r.outputs * kCapsuleBlock<T>;
    const Scratch<T> memory(some * sample_size());
    const Scratch<T> scratch(std::max(r.shape.out * kCapsuleBlock<T>, r.outputs));
    begin_samples(first, some, memory);
    if (last() == 0) return;
    const Scratch<T> votes(some * r.votes_step);
    CapsuleShape one = r.shape;
    one.blocks = 1;
    for (int64_t i = 0; i < r.shape.blocks; ++i) {
      table.votes(r.shape, packed + i * r.weight_block,
                  {packed_x + first * r.x_sample + i * r.x_block, r.x_sample}, some,
                  {votes.get() + i * block, r.votes_step}, {nullptr, 0});
      for (int64_t n = 0; n < some; ++n)
        walk_iteration(one, first + n, last(), votes.get() + n * r.votes_step + i * block, i,
                       sample_at(memory, n), scratch.get());
    }
    for (int64_t n = 0; n < some && !terms.detached; ++n)
      walk_rest(first + n, votes.get() + n * r.votes_step, sample_at(memory, n), scratch.get());
  }

  // The same side by side, with votes computed again in every iteration: a block of the weight
  // comes from memory once an iteration for all samples.
  void walk_in_lanes(int64_t first, int64_t some) const {
    const int64_t lanes = table.lanes, state = r.outputs * lanes, groups = ceil_div(some, lanes);
    const Scratch<T> memory(some * sample_size()), states(4 * groups * state);
    const Scratch<T> x_block(r.x_block * lanes), votes(table.lane_capsules * state);
    const int64_t block_terms = kCapsuleBlock<T> * 2 * r.shape.out * lanes;
    const Scratch<T> lane_terms(block_terms);
    clear(lane_terms.get(), block_terms);
    T *const outputs = states.get(), *const sum_grads = outputs + groups * state,
             *const totals = sum_grads + groups * state, *const chain = totals + groups * state;
    const auto size_of = [&](int64_t g) { return std::min(lanes, some - g * lanes); };
    begin_samples(first, some, memory);
    for (int64_t n = last(); n > 0; --n) {
      for (int64_t g = 0; g < groups; ++g) {
        const Sample w = sample_at(memory, g * lanes);
        table.to_lanes(w.before + n * r.outputs, sample_size(), size_of(g), r.outputs,
                       outputs + g * state);
        table.to_lanes(w.ds, sample_size(), size_of(g), r.outputs, sum_grads + g * state);
      }
      clear(totals, 2 * groups * state);
      for (int64_t i = 0; i < r.shape.blocks; ++i) {
        for (int64_t g = 0; g < groups; ++g) {
          const LaneCapsules<T> c = lane_capsules(r, table, natural, x, i, base + first + g * lanes,
                                                  size_of(g), x_block.get());
          table.lane_iteration_grad(r.shape, c, outputs + g * state, sum_grads + g * state,
                                    lane_terms.get(), votes.get(), chain + g * state);
          store_terms(first + g * lanes, size_of(g), i, n, lane_terms.get());
        }
        end_chain(i, r.shape.blocks, chain, groups * state, totals);
      }
      for (int64_t g = 0; g < groups; ++g)
        table.transpose(totals + g * state, lanes, sample_at(memory, g * lanes).partial,
                        sample_size(), r.outputs, size_of(g));
      for (int64_t b = 0; b < some; ++b) {
        const Sample w = sample_at(memory, b);
        end_iteration(n, w.partial, w);
        begin_iteration(first + b, n - 1, w);
      }
    }
  }

  // A block's two terms of iteration n, [kBlock][2][O][lanes], to every sample's coefficients.
  void store_terms(int64_t first, int64_t some, int64_t i, int64_t n, const T* lane_terms) const {
    constexpr int64_t block = kCapsuleBlock<T>;
    const int64_t rows = 2 * r.shape.out;
    T* const to = coefficients + first * coefficient_step() + i * coefficient_block() +
                  (n - 1) * rows * block;
    for (int64_t row = 0; row < rows; ++row)
      transpose_fn<T>()(lane_terms + row * table.lanes, rows * table.lanes, to + row * block,
                        coefficient_step(), block, some);
  }

  void begin_samples(int64_t first, int64_t some, const Scratch<T>& memory) const {
    for (int64_t b = 0; b < some; ++b) {
      pack_sample(r, x + (base + first + b) * r.inputs * r.shape.in,
                  packed_x + (first + b) * r.x_sample);
      begin_sample(base + first + b, sample_at(memory, b));
      begin_iteration(first + b, last(), sample_at(memory, b));
    }
  }

  void begin_sample(int64_t sample, const Sample& w) const {
    const int64_t size = r.outputs;
    const T* s = sums + sample * terms.iterations * size;
    clear(w.before, size);
    for (int64_t n = 0; n < last(); ++n) {
      T* next = w.before + (n + 1) * size;
      squash_capsules(r.shape, s + n * size, next);
      for (int64_t j = 0; j < size; ++j) next[j] += next[j - size];
    }
    clear(w.dv, last() * size);
    std::memcpy(w.dv + last() * size, grad + sample * size, static_cast<size_t>(size) * sizeof(T));
    clear(bias_grads + sample * size, size);
  }

  // The gradient of iteration n's sums of sample b of the chunk, and what it is a factor of.
  void begin_iteration(int64_t b, int64_t n, const Sample& w) const {
    const int64_t size = r.outputs, sample = base + b;
    const auto bytes = static_cast<size_t>(size) * sizeof(T);
    squash_capsules_grad(r.shape, w.dv + n * size, sums + (sample * terms.iterations + n) * size,
                         w.ds);
    T* const bias_grad = bias_grads + sample * size;
    for (int64_t j = 0; j < size; ++j) bias_grad[j] += w.ds[j];
    if (n == 0) {
      for (int64_t j = 0; j < size; ++j)
        constants[b * size + j] = w.ds[j] / static_cast<T>(r.shape.out);
      return;
    }
    T* const factor = factors + b * factor_step() + (terms.detached ? 0 : 2 * (n - 1) * size);
    std::memcpy(factor, w.ds, bytes);
    if (!terms.detached) std::memcpy(factor + size, w.before + n * size, bytes);
    clear(w.partial, size * table.lanes);
  }

  // Iteration n > 0 over the blocks of `shape`, of which i is the first: its two terms.
  void walk_iteration(const CapsuleShape& shape, int64_t b, int64_t n, const T* votes, int64_t i,
                      const Sample& w, T* scratch) const {
    T* const mine = coefficients + b * coefficient_step() + i * coefficient_block();
    const T* const agreed = w.before + n * r.outputs;
    if (terms.detached) return table.softmax(shape, votes, agreed, mine);
    table.iteration_grad(shape, votes, agreed, w.ds, 2 * (n - 1), terms.count, mine, scratch,
                         w.partial);
  }

  // What comes after the last iteration.
  void walk_rest(int64_t b, const T* votes, const Sample& w, T* scratch) const {
    for (int64_t n = last();; --n) {
      table.total(w.partial, r.outputs, T{1}, scratch);
      end_iteration(n, scratch, w);
      begin_iteration(b, n - 1, w);
      if (n == 1) return;
      walk_iteration(r.shape, b, n - 1, votes, 0, w, scratch);
    }
  }

  // Iteration n adds to the gradients of all outputs before it.
  void end_iteration(int64_t n, const T* totals, const Sample& w) const {
    for (int64_t m = 0; m < n; ++m)
      for (int64_t j = 0; j < r.outputs; ++j) w.dv[m * r.outputs + j] += totals[j];
  }
};

}  // namespace nnarch
