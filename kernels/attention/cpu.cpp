// attention on the CPU: how the work is cut into tasks.
#include <algorithm>
#include <tuple>

#include "attention/cpu_kernels.h"
#include "attention/cpu_setup.h"
#include "cpu/arena.h"
#include "cpu/first_output.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace nnarch {
namespace {

constexpr int64_t kEnoughTasks = 32;     // more are not made smaller
constexpr int64_t kLeastChunk = 512;     // keys
constexpr int64_t kSmallWork = 1 << 16;  // multiplications that one thread does at once

// A task is some rows and a range of keys. Everything follows from the shape: sums are the same
// for any number of threads.
template <class T>
struct Cut {
  bool few;
  int64_t stacked;  // heads of queries whose rows one task has
  int64_t rows;     // of a stack
  int64_t rows_each, row_blocks;
  int64_t chunks, keys_each;
  int64_t units;  // stacks

  Cut(const Attention<T>& a, const AttentionTable<T>& table) {
    // Heads that share keys go together where one of them would not fill a tile.
    stacked = a.queries < table.tile ? a.heads_each() : 1;
    rows = stacked * a.queries;
    units = a.batch * (a.heads / stacked);
    few = rows <= table.few_rows;
    rows_each = few ? rows : table.tile * table.tiles_at_once;
    while (rows_each > table.tile && !few && units * ceil_div(rows, rows_each) < kEnoughTasks)
      rows_each /= 2;
    row_blocks = ceil_div(rows, rows_each);
    const int64_t wanted = ceil_div(kEnoughTasks, units * row_blocks);
    chunks = std::max<int64_t>(1, std::min(wanted, a.keys / kLeastChunk));
    keys_each = std::max<int64_t>(64, round_up(ceil_div(a.keys, chunks), 64));
    chunks = std::max<int64_t>(1, ceil_div(a.keys, keys_each));
  }

  int64_t blocks() const { return units * row_blocks; }
  QueryRows block(const Attention<T>& a, int64_t i) const {
    const int64_t unit = i / row_blocks, first = i % row_blocks * rows_each;
    const int64_t units_each = a.heads / stacked;
    return {unit / units_each, unit % units_each * stacked, first,
            std::min(rows_each, rows - first)};
  }
};

template <class T>
void run(const Attention<T>& a) {
  const auto& table = NNARCH_SELECT(attention_table<T>());
  const Cut<T> cut(a, table);
  const int64_t partial_step = a.value_depth + 2;
  const int64_t chunk_step = cut.rows_each * partial_step;
  const int64_t block_step = cut.chunks > 1 ? cut.chunks * chunk_step : 0;
  const Scratch<T> partial(checked_product(cut.blocks(), block_step));
  const int64_t scratch = table.scratch(a, cut.rows_each);

  const auto task = [&](int64_t i) {
    const int64_t block = i / cut.chunks, chunk = i % cut.chunks;
    const QueryRows rows = cut.block(a, block);
    KeyRange<T> keys{chunk * cut.keys_each, std::min((chunk + 1) * cut.keys_each, a.keys), nullptr,
                     partial_step};
    if (cut.chunks > 1) keys.partial = partial.get() + block * block_step + chunk * chunk_step;
    const Scratch<T> memory(scratch);
    (cut.few ? table.few : table.tiles)(a, rows, keys, memory.get());
  };
  const int64_t tasks = checked_product(cut.blocks(), cut.chunks);
  if (tasks * cut.rows_each * cut.keys_each * (a.depth + a.value_depth) < kSmallWork) {
    parallel_tasks(1, [&](int64_t) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
    });
  } else {
    parallel_tasks(tasks, task);
  }
  if (cut.chunks == 1) return;
  parallel_tasks(cut.blocks(), [&](int64_t block) {
    const Scratch<T> memory(scratch);
    table.combine(a, cut.block(a, block), partial.get() + block * block_step, partial_step,
                  cut.chunks, chunk_step, memory.get());
  });
}

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const OptTensor& mask, const OptTensor& key_lengths,
                                     const OptTensor& seed, double dropout_p, double scale,
                                     int64_t low, int64_t high) {
  const bool alone = takes_first_output_alone();
  const AttentionInputs inputs{query, key,       value, mask, key_lengths,
                               seed,  dropout_p, scale, low,  high};
  inputs.check("attention: tensors, mask, lengths or dropout do not fit together");
  const Tensor out = new_attention_output(query, value.size(3));
  const ScalarType type = query.scalar_type();
  const Tensor lse =
      alone ? out
            : new_contiguous({query.size(0), query.size(1), query.size(2)}, compute_type(type));
  if (lse.numel() == 0) return {out, lse};
  with_scalar_type(type, "attention", [&](auto scalar) {
    using T = decltype(scalar);
    Attention<T> a = inputs.problem<T>();
    a.out = operand_of(out);
    const Scratch<T> unseen(alone ? out.numel() / value.size(3) : 0);
    a.lse = alone ? unseen.get() : mutable_data<T>(lse);
    run(a);
  });
  return {out, lse};
}

}  // namespace

NNARCH_OPS(attention, ops) { ops.impl("attention", TORCH_BOX(&attention)); }

}  // namespace nnarch
