// Capsule routing on the CPU: all iterations of a group of samples while their votes are in cache.
#include <tuple>

#include "capsule_routing/cpu_lanes.h"
#include "capsule_routing/cpu_routing.h"
#include "cpu/registry.h"

namespace nnarch {
namespace {

// One task: samples [first, first + count) of x [B, I, D_in] to v [B, O, D_out] and the sums
// [B, iterations, O, D_out].
template <class T>
struct Group {
  const Routing<T>& r;
  const RoutingTable<T>& table;
  int64_t first, count;
  Scratch<T> x;
  Scratch<T> votes;
  Scratch<T> partial, logits, agreed;

  Group(const Routing<T>& routing, const RoutingTable<T>& table_, int64_t first_)
      : r(routing),
        table(table_),
        first(first_),
        count(std::min(routing.group, routing.samples - first_)),
        x(count * r.x_sample),
        votes(count * r.votes_step),
        partial(count * r.outputs * table_.lanes),
        logits(r.shape.out * kCapsuleBlock<T>),
        agreed(r.outputs) {}

  int64_t partial_step() const { return r.outputs * table.lanes; }

  // The votes of all samples, and their sums over the input capsules.
  void vote(const T* from, const T* weight) {
    clear(partial.get(), count * partial_step());
    for (int64_t b = 0; b < count; ++b)
      pack_sample(r, from + (first + b) * r.inputs * r.shape.in, x.get() + b * r.x_sample);
    for (int64_t i = 0; i < r.shape.blocks; ++i)
      table.votes(r.shape, weight + i * r.weight_block, {x.get() + i * r.x_block, r.x_sample},
                  count, {votes.get() + i * r.outputs * kCapsuleBlock<T>, r.votes_step},
                  {partial.get(), partial_step()});
  }

  // All iterations of one sample.
  void route(int64_t b, const T* bias, int64_t iterations, T* sums, T* v) {
    T* const mine = partial.get() + b * partial_step();
    clear(agreed.get(), r.outputs);
    for (int64_t n = 0; n < iterations; ++n, sums += r.outputs) {
      if (n > 0) {
        clear(mine, partial_step());
        table.iteration(r.shape, votes.get() + b * r.votes_step, agreed.get(), logits.get(), mine);
      }
      // Without logits every softmax is 1/O.
      table.total(mine, r.outputs, n > 0 ? T{1} : T{1} / static_cast<T>(r.shape.out), sums);
      if (bias)
        for (int64_t j = 0; j < r.outputs; ++j) sums[j] += bias[j];
      squash_capsules(r.shape, sums, v);
      for (int64_t j = 0; j < r.outputs; ++j) agreed[j] += v[j];
    }
  }

  static void clear(T* p, int64_t count) {
    std::memset(p, 0, static_cast<size_t>(count) * sizeof(T));
  }
};

std::tuple<Tensor, Tensor> capsule_routing(const Tensor& x, const Tensor& weight,
                                           const OptTensor& bias, int64_t iterations,
                                           bool /*detach_routing*/, const OptTensor& packed) {
  check_capsules("capsule_routing: x and weight do not fit together", x, weight);
  require(iterations >= 1, "capsule_routing: iterations must be at least 1");
  require(!bias || (bias->dim() == 2 && bias->size(0) == weight.size(0) &&
                    bias->size(1) == weight.size(2) && bias->scalar_type() == x.scalar_type()),
          "capsule_routing: bias must be [O, D_out]");
  const Tensor from = as_contiguous(to_compute_type(x)), w = to_compute_type(weight);
  const OptTensor b = bias ? OptTensor(as_contiguous(to_compute_type(*bias))) : bias;
  const int64_t samples = x.size(0), out = weight.size(0), dim = weight.size(2);
  const Tensor v = new_contiguous({samples, out, dim}, from.scalar_type());
  const Tensor sums = new_contiguous({samples, iterations, out, dim}, from.scalar_type());
  set_algorithm("votes in cache");
  if (v.numel() > 0)
    with_scalar_type(from.scalar_type(), "capsule_routing", [&](auto scalar) {
      using T = decltype(scalar);
      const Routing<T> r(from, w);
      const auto& table = NNARCH_SELECT(routing_table<T>());
      const T *x_ptr = data<T>(from), *bias_ptr = b ? data<T>(*b) : nullptr;
      T *sums_ptr = mutable_data<T>(sums), *v_ptr = mutable_data<T>(v);
      if (votes_in_lanes(r, table.lanes, forward_passes(iterations))) {
        set_algorithm("votes in lanes");
        check_packed(r, w, packed);
        const Tensor natural = as_contiguous(w);
        return route_in_lanes<T>(
            {r, table, x_ptr, data<T>(natural), bias_ptr, iterations, sums_ptr, v_ptr});
      }
      const PackedWeight<T> order(r, w, packed);
      parallel_tasks(ceil_div(samples, r.group), [&](int64_t task) {
        Group<T> group(r, table, task * r.group);
        group.vote(x_ptr, order.get());
        for (int64_t n = 0; n < group.count; ++n) {
          const int64_t sample = group.first + n;
          group.route(n, bias_ptr, iterations, sums_ptr + sample * iterations * r.outputs,
                      v_ptr + sample * r.outputs);
        }
      });
    });
  return {to_type(v, x.scalar_type()), sums};
}

Tensor capsule_routing_pack(const Tensor& weight) {
  require(weight.dim() == 4, "capsule_routing_pack: weight must be [O, I, D_out, D_in]");
  const Tensor w = in_either_order(to_compute_type(weight));
  Tensor packed;
  with_scalar_type(w.scalar_type(), "capsule_routing_pack", [&](auto scalar) {
    using T = decltype(scalar);
    const Tensor x = new_contiguous({0, w.size(1), w.size(3)}, w.scalar_type());
    const Routing<T> r(x, w);
    packed = new_contiguous({r.packed_size()}, w.scalar_type());
    pack_weight(r, data<T>(w), !w.is_contiguous(), mutable_data<T>(packed));
  });
  return packed;
}

}  // namespace

NNARCH_OPS(capsule_routing, ops) {
  ops.impl("capsule_routing", TORCH_BOX(&capsule_routing));
  ops.impl("capsule_routing_pack", TORCH_BOX(&capsule_routing_pack));
}

}  // namespace nnarch
