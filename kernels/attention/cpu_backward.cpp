// attention_backward on the CPU: how the work is cut into tasks.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "attention/backward_problem.h"
#include "attention/cpu_setup.h"
#include "attention/large_rows.h"
#include "cpu/arena.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace nnarch {
namespace {

constexpr int64_t kEnoughTasks = 32;     // more are not made smaller
constexpr int64_t kLeastChunk = 512;     // keys: each chunk has a dq of its own
constexpr int64_t kMostParts = 1 << 26;  // numbers in all chunks' dq
constexpr int64_t kRowsOfFinish = 256;   // queries of a task that adds up dq
constexpr int64_t kSmallWork = 1 << 15;  // multiplications of a product: one thread is enough

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct BackwardInputs {
  const AttentionInputs& forward;
  const Tensor& grad;
  const OptTensor& grad_lse;
  const Tensor &out, &lse;

  void check(const char* message) const {
    forward.check(message);
    const Tensor& q = forward.q;
    const ScalarType type = q.scalar_type();
    for (const Tensor* t : {&grad, &out}) {
      require(t->dim() == 4 && t->scalar_type() == type, message);
      for (int d = 0; d < 3; ++d) require(t->size(d) == q.size(d), message);
      require(t->size(3) == forward.v.size(3), message);
    }
    check_rows(lse, message);
    if (grad_lse) check_rows(*grad_lse, message);
  }

 private:
  void check_rows(const Tensor& t, const char* message) const {
    const ScalarType type = forward.q.scalar_type();
    require(t.dim() == 3 && t.scalar_type() == (is_half(type) ? ScalarType::Float : type), message);
    for (int d = 0; d < 3; ++d) require(t.size(d) == forward.q.size(d), message);
  }
};

template <class T>
RowValues<T> rows_of(const Tensor& t) {
  return {data<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

// Strides of a dense tensor, 0 for dimensions of one.
template <class T>
Sums<T> sums_of(const Tensor& t) {
  const auto stride = [&](int d) { return t.size(d) == 1 ? 0 : t.stride(d); };
  return {mutable_data<T>(t), stride(0), stride(1), stride(2), stride(3)};
}

// A task is some sequences, some key heads, and a range of keys. It has all that is summed into one
// number of the mask's gradient, in one order. Everything follows from the shape.
struct BackwardCut {
  int64_t batches, groups;  // in parts of
  int64_t batch_each, group_each;
  int64_t chunks, keys_each;

  template <class T>
  BackwardCut(const Attention<T>& a, int64_t block, const OptTensor& d_mask) {
    const bool batch_summed = d_mask && d_mask->size(0) == 1;
    const bool heads_summed = d_mask && d_mask->size(1) == 1;
    const bool keys_summed = d_mask && d_mask->size(3) == 1;
    batch_each = batch_summed ? a.batch : 1;
    group_each = heads_summed ? a.groups : 1;
    batches = a.batch / batch_each, groups = a.groups / group_each;
    const int64_t part = checked_product(checked_product(a.batch, a.heads),
                                         checked_product(a.queries, std::max<int64_t>(1, a.depth)));
    const int64_t wanted = std::min(ceil_div(kEnoughTasks, batches * groups), kMostParts / part);
    chunks = keys_summed ? 1 : std::max<int64_t>(1, std::min(wanted, a.keys / kLeastChunk));
    keys_each = round_up(ceil_div(a.keys, chunks), block);
    chunks = ceil_div(a.keys, keys_each);
  }
  int64_t tasks() const { return checked_product(batches * groups, chunks); }
  int64_t batch(int64_t task) const { return task / chunks / groups * batch_each; }
  int64_t group(int64_t task) const { return task / chunks % groups * group_each; }
  // The chunk of a task: from both ends in turn, because causal work grows from one to the other.
  int64_t chunk(int64_t task) const {
    const int64_t i = task % chunks;
    return i % 2 == 0 ? i / 2 : chunks - 1 - i / 2;
  }
};

template <class T>
void run_tasks(const AttentionBackward<T>& a, const BackwardCut& cut) {
  const auto& table = NNARCH_SELECT(attention_backward_table<T>());
  const Attention<T>& f = a.forward;
  const int64_t scratch = table.scratch(a);
  const auto task = [&](int64_t i) {
    const Scratch<T> memory(scratch);
    const int64_t chunk = cut.chunk(i), first = chunk * cut.keys_each;
    const int64_t end = std::min(first + cut.keys_each, f.keys);
    const int64_t batch = cut.batch(i), group = cut.group(i);
    const int64_t next = std::min(i + 1, cut.tasks() - 1);
    for (int64_t b = batch; b < batch + cut.batch_each; ++b)
      for (int64_t g = group; g < group + cut.group_each; ++g) {
        KeyChunk keys{b, g, chunk, first, end, cut.batch(next), cut.group(next)};
        if (g + 1 < group + cut.group_each)
          keys.next_batch = b, keys.next_group = g + 1;
        else if (b + 1 < batch + cut.batch_each)
          keys.next_batch = b + 1, keys.next_group = group;
        table.run(a, keys, memory.get());
      }
  };
  const int64_t tasks = cut.tasks();
  const int64_t multiplications = f.heads * f.queries * f.batch * f.keys * (f.depth + 1);
  if (tasks > 1 && multiplications < kSmallWork) {
    parallel_tasks(1, [&](int64_t) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
    });
  } else {
    parallel_tasks(tasks, task);
  }
  if (a.dq_in_place) return;
  const int64_t blocks = ceil_div(f.queries, kRowsOfFinish);
  parallel_tasks(checked_product(f.batch * f.heads, blocks), [&](int64_t i) {
    const int64_t first = i % blocks * kRowsOfFinish, row = i / blocks;
    table.finish(a, row / f.heads, row % f.heads, first,
                 std::min(first + kRowsOfFinish, f.queries));
  });
}

template <class T>
void run(AttentionBackward<T> a, const Tensor& dq, const OptTensor& d_mask) {
  const auto& table = NNARCH_SELECT(attention_backward_table<T>());
  const Attention<T>& f = a.forward;
  const BackwardCut cut(f, table.keys, d_mask);
  if (d_mask) a.d_mask = sums_of<T>(*d_mask);
  a.chunks = cut.chunks;
  a.dq_in_place = cut.chunks == 1 && a.dq.storage == Storage::native && f.depth % table.lanes == 0;
  if (a.dq_in_place) {
    a.dq_sum = sums_of<T>(dq);
    return run_tasks(a, cut);
  }
  const int64_t depth = round_up(f.depth, table.lanes);
  const Tensor parts =
      new_contiguous({checked_product(cut.chunks, f.batch), f.heads, f.queries, depth},
                     sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
  a.dq_sum = sums_of<T>(parts);
  a.dq_sum.row = depth;
  a.dq_chunk = f.batch * f.heads * f.queries * depth;
  if (f.batch > 1) a.dq_sum.batch = f.heads * f.queries * depth;
  run_tasks(a, cut);
}

void zero(const Tensor& t) {
  if (t.numel() > 0)
    std::memset(t.data_ptr(), 0, static_cast<size_t>(t.numel() * element_bytes(t.scalar_type())));
}

Four attention_backward(const Tensor& grad, const OptTensor& grad_lse, const Tensor& query,
                        const Tensor& key, const Tensor& value, const OptTensor& mask,
                        const OptTensor& key_lengths, const OptTensor& seed, const Tensor& out,
                        const Tensor& lse, double dropout_p, double scale, int64_t low,
                        int64_t high, bool mask_gradient) {
  const AttentionInputs inputs{query, key,       value, mask, key_lengths,
                               seed,  dropout_p, scale, low,  high};
  const BackwardInputs all{inputs, grad, grad_lse, out, lse};
  all.check("attention_backward: tensors, mask, lengths or dropout do not fit together");
  const ScalarType type = query.scalar_type(), sum_type = lse.scalar_type();
  const Tensor dq = new_attention_output(query, query.size(3));
  const Tensor dk = new_attention_output(key, key.size(3));
  const Tensor dv = new_attention_output(value, value.size(3));
  OptTensor d_mask;
  if (mask && mask_gradient) zero(d_mask.emplace(new_contiguous(sizes_of(*mask), sum_type)));
  set_algorithm("attention_backward");
  if (lse.numel() == 0 || key.size(2) == 0) {
    zero(dq), zero(dk), zero(dv);
  } else {
    with_scalar_type(type, "attention_backward", [&](auto scalar) {
      using T = decltype(scalar);
      AttentionBackward<T> a{};
      a.forward = inputs.problem<T>();
      a.forward.out = operand_of(out);
      a.grad = operand_of(grad);
      a.dq = operand_of(dq), a.dk = operand_of(dk), a.dv = operand_of(dv);
      a.lse = rows_of<T>(lse);
      if (grad_lse) a.grad_lse = rows_of<T>(*grad_lse);
      const LargeRows<T> large(a.forward, a.lse);
      a.large = large.sums();
      run(a, dq, d_mask);
    });
  }
  return {dq, dk, dv, d_mask ? to_type(*d_mask, type) : new_contiguous({0}, type)};
}

// One in place of the parts of several chunks, in their order.
template <class T>
void add_parts(T* sums, int64_t parts, int64_t count) {
  parallel_tasks(ceil_div(count, kRowsOfFinish), [&](int64_t task) {
    const int64_t end = std::min((task + 1) * kRowsOfFinish, count);
    for (int64_t i = task * kRowsOfFinish; i < end; ++i)
      for (int64_t part = 1; part < parts; ++part) sums[i] += sums[part * count + i];
  });
}

Four attention_weights_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                const OptTensor& mask, const OptTensor& key_lengths,
                                const OptTensor& seed, const Tensor& lse, double dropout_p,
                                double scale, int64_t low, int64_t high, bool averaged,
                                bool mask_gradient) {
  constexpr const char* message = "attention_weights_backward: tensors do not fit together";
  const AttentionInputs inputs{query, key,       key,   mask, key_lengths,
                               seed,  dropout_p, scale, low,  high};
  inputs.check(message);
  const ScalarType type = query.scalar_type();
  check_weights(inputs, grad, lse, averaged, message);
  require(grad.scalar_type() == type, message);
  const Tensor dq = new_attention_output(query, query.size(3));
  const Tensor dk = new_attention_output(key, key.size(3));
  Tensor d_lse = new_contiguous(sizes_of(lse), lse.scalar_type());
  OptTensor d_mask;
  if (mask && mask_gradient)
    zero(d_mask.emplace(new_contiguous(sizes_of(*mask), lse.scalar_type())));
  set_algorithm("attention_weights_backward");
  if (lse.numel() == 0 || key.size(2) == 0) {
    zero(dq), zero(dk), zero(d_lse);
  } else {
    with_scalar_type(type, "attention_weights_backward", [&](auto scalar) {
      using T = decltype(scalar);
      AttentionBackward<T> a{};
      a.forward = inputs.problem<T>();
      a.forward.value_depth = 0, a.forward.v = Operand{};
      a.dq = operand_of(dq), a.dk = operand_of(dk);
      a.lse = rows_of<T>(lse);
      a.weights_grad = operand_of(grad);
      if (grad.size(3) == 1) a.weights_grad.column = 0;
      a.weights_factor = averaged ? T(1) / static_cast<T>(query.size(1)) : T(1);
      const BackwardCut cut(a.forward, NNARCH_SELECT(attention_backward_table<T>()).keys, d_mask);
      const Tensor parts =
          cut.chunks == 1 ? d_lse : new_contiguous({cut.chunks, lse.numel()}, lse.scalar_type());
      a.d_lse = mutable_data<T>(parts);
      const LargeRows<T> large(a.forward, a.lse);
      a.large = large.sums();
      run(a, dq, d_mask);
      if (cut.chunks == 1) return;
      add_parts(a.d_lse, cut.chunks, lse.numel());
      std::memcpy(d_lse.data_ptr(), a.d_lse, static_cast<size_t>(lse.numel()) * sizeof(T));
    });
  }
  return {dq, dk, d_lse, d_mask ? to_type(*d_mask, type) : new_contiguous({0}, type)};
}

}  // namespace

NNARCH_OPS(attention_backward, ops) {
  ops.impl("attention_backward", TORCH_BOX(&attention_backward));
  ops.impl("attention_weights_backward", TORCH_BOX(&attention_weights_backward));
}

}  // namespace nnarch
