// attention_weights on the CPU: how the work is cut into tasks.
#include <algorithm>
#include <cstring>

#include "attention/cpu_setup.h"
#include "attention/large_rows.h"
#include "attention/weights_problem.h"
#include "cpu/arena.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace nnarch {
namespace {

constexpr int64_t kSmallWork = 1 << 16;  // multiplications that one thread does at once

// A task has all heads of what is averaged, in their order: the same sums for any number of
// threads.
template <class T>
void run(const AttentionWeights<T>& a) {
  const auto& table = NNARCH_SELECT(attention_weights_table<T>());
  const Attention<T>& f = a.forward;
  const int64_t heads_each = a.averaged ? f.heads : 1;
  const int64_t row_blocks = ceil_div(f.queries, table.queries);
  const int64_t key_blocks = ceil_div(f.keys, table.keys);
  const int64_t scratch = table.scratch(a);
  const auto task = [&](int64_t i) {
    const int64_t key = i % key_blocks * table.keys;
    const int64_t query = i / key_blocks % row_blocks * table.queries;
    const int64_t unit = i / (key_blocks * row_blocks), units = f.heads / heads_each;
    const int64_t head = unit % units * heads_each;
    const Scratch<T> memory(scratch);
    table.run(a,
              {unit / units, head, head + heads_each, query,
               std::min(query + table.queries, f.queries), key, std::min(key + table.keys, f.keys)},
              memory.get());
  };
  const int64_t tasks =
      checked_product(checked_product(f.batch * (f.heads / heads_each), row_blocks), key_blocks);
  if (f.batch * f.heads * f.queries * f.keys * (f.depth + 1) < kSmallWork) {
    parallel_tasks(1, [&](int64_t) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
    });
  } else {
    parallel_tasks(tasks, task);
  }
}

Tensor attention_weights(const Tensor& query, const Tensor& key, const OptTensor& mask,
                         const OptTensor& key_lengths, const OptTensor& seed, const Tensor& lse,
                         double dropout_p, double scale, int64_t low, int64_t high, bool averaged) {
  constexpr const char* message = "attention_weights: tensors do not fit together";
  const AttentionInputs inputs{query, key,       key,   mask, key_lengths,
                               seed,  dropout_p, scale, low,  high};
  inputs.check(message);
  const ScalarType type = query.scalar_type();
  const Tensor out = new_contiguous(
      {query.size(0), averaged ? 1 : query.size(1), query.size(2), key.size(2)}, type);
  check_weights(inputs, out, lse, averaged, message);
  set_algorithm("attention_weights");
  if (out.numel() == 0) return out;
  if (query.size(1) == 0) {  // the mean of nothing
    std::memset(out.data_ptr(), 0, static_cast<size_t>(out.numel() * element_bytes(type)));
    return out;
  }
  with_scalar_type(type, "attention_weights", [&](auto scalar) {
    using T = decltype(scalar);
    AttentionWeights<T> a{};
    a.forward = inputs.problem<T>();
    a.forward.value_depth = 0, a.forward.v = Operand{};
    a.forward.out = operand_of(out);
    a.lse = {data<T>(lse), lse.stride(0), lse.stride(1), lse.stride(2)};
    a.averaged = averaged;
    const LargeRows<T> large(a.forward, a.lse);
    a.large = large.sums();
    run(a);
  });
  return out;
}

}  // namespace

NNARCH_OPS(attention_weights, ops) { ops.impl("attention_weights", TORCH_BOX(&attention_weights)); }

}  // namespace nnarch
