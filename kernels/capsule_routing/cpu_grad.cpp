// The gradients of capsule routing on the CPU, through all iterations or with the routing detached.
//
// Votes are computed again rather than kept: keeping them would cost a pass over memory each way.
// For a chunk of samples, first every group of samples walks its iterations backwards over votes in
// cache and leaves the coefficients of the votes' gradients; then every block of input capsules
// forms those gradients in cache and multiplies them with the weight and with x.
#include <iterator>
#include <tuple>

#include "capsule_routing/cpu_routing.h"
#include "cpu/dense.h"
#include "cpu/registry.h"

namespace nnarch {
namespace {

// Bytes of coefficients that a chunk of samples may leave: they are read from the last-level cache.
constexpr int64_t kChunkBytes = int64_t{8} << 20;

// A gradient of the weight above this goes past the caches: nothing reads it before they are full
// of something else.
constexpr int64_t kStreamedBytes = int64_t{2} << 20;

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

// One block of the weight's gradient, to where the weight has it.
template <class T>
void unpack_weight_block(const Routing<T>& r, int64_t i, const T* packed, bool channels_last,
                         T* weight) {
  const int64_t row = r.shape.dim * r.shape.in, block = kCapsuleBlock<T>;
  const auto& table = NNARCH_SELECT(routing_table<T>());
  if (channels_last) {
    const bool past_caches = r.packed_size() * int64_t{sizeof(T)} > kStreamedBytes;
    return table.copy_rows(packed, block, weight + i * block, r.inputs, r.shape.out * row,
                           r.inside(i), past_caches);
  }
  for (int64_t o = 0; o < r.shape.out; ++o)
    table.transpose(packed + o * row * block, block, weight + (o * r.inputs + i * block) * row, row,
                    row, r.inside(i));
}

template <class T>
struct Backward {
  const Routing<T>& r;
  const RoutingTable<T>& table;
  const Terms terms;
  const T *x, *grad, *sums, *weight;  // weight packed
  T *dx, *dw;
  bool channels_last;       // dw
  T* bias_grads = nullptr;  // [B][O·D_out]
  T* packed_dw = nullptr;   // grows from chunk to chunk; null where there is but one

  // Of a chunk.
  int64_t chunk = 1;
  T *packed_x = nullptr, *coefficients = nullptr, *constants = nullptr, *factors = nullptr;

  int64_t coefficient_block() const { return terms.count * r.shape.out * kCapsuleBlock<T>; }
  int64_t coefficient_step() const { return padded<T>(r.shape.blocks * coefficient_block()); }
  int64_t factor_step() const { return terms.count * r.outputs; }

  static void clear(T* p, int64_t count) {
    std::memset(p, 0, static_cast<size_t>(count) * sizeof(T));
  }

  // What a sample's walk needs, and the sums of its present iteration.
  struct Walk {
    T* before;   // outputs' running sums, which an iteration's logits agree with: [iterations + 1]
    T* dv;       // gradients of the outputs: [iterations]
    T* ds;       // of the present iteration's sums
    T* partial;  // Σ db·votes, a vector wide
  };
  int64_t walk_size() const { return r.outputs * (2 * terms.iterations + 2 + table.lanes); }
  Walk walk_at(T* memory) const {
    const int64_t size = r.outputs, n = terms.iterations;
    return {memory, memory + (n + 1) * size, memory + (2 * n + 1) * size,
            memory + (2 * n + 2) * size};
  }

  // Samples [first, first + count) of the chunk that begins at sample `base`. The last iteration's
  // gradient is known beforehand: a block's votes go through it while they are in the second cache.
  void walk_group(int64_t base, int64_t first, int64_t count) const {
    const int64_t last = terms.iterations - 1, block = r.outputs * kCapsuleBlock<T>;
    const Scratch<T> memory(count * walk_size());
    const Scratch<T> scratch(std::max(r.shape.out * kCapsuleBlock<T>, r.outputs));
    const auto walk = [&](int64_t n) { return walk_at(memory.get() + n * walk_size()); };
    for (int64_t n = 0; n < count; ++n) {
      pack_sample(r, x + (base + first + n) * r.inputs * r.shape.in,
                  packed_x + (first + n) * r.x_sample);
      begin_walk(base + first + n, walk(n));
      begin_iteration(base + first + n, first + n, last, walk(n));
    }
    if (last == 0) return;
    const LargeScratch<T> votes(count * r.votes_step);
    CapsuleShape one = r.shape;
    one.blocks = 1;
    for (int64_t i = 0; i < r.shape.blocks; ++i) {
      table.votes(r.shape, weight + i * r.weight_block,
                  {packed_x + first * r.x_sample + i * r.x_block, r.x_sample}, count,
                  {votes.get() + i * block, r.votes_step}, {nullptr, 0});
      for (int64_t n = 0; n < count; ++n)
        walk_iteration(one, first + n, last, votes.get() + n * r.votes_step + i * block, i, walk(n),
                       scratch.get());
    }
    for (int64_t n = 0; n < count && !terms.detached; ++n)
      walk_rest(base + first + n, first + n, votes.get() + n * r.votes_step, walk(n),
                scratch.get());
  }

  void begin_walk(int64_t sample, const Walk& w) const {
    const int64_t size = r.outputs, last = terms.iterations - 1;
    const T* s = sums + sample * terms.iterations * size;
    clear(w.before, size);
    for (int64_t n = 0; n < last; ++n) {
      T* next = w.before + (n + 1) * size;
      squash_capsules(r.shape, s + n * size, next);
      for (int64_t j = 0; j < size; ++j) next[j] += next[j - size];
    }
    clear(w.dv, last * size);
    std::memcpy(w.dv + last * size, grad + sample * size, static_cast<size_t>(size) * sizeof(T));
    clear(bias_grads + sample * size, size);
  }

  // The gradient of iteration n's sums, and what it is a factor of.
  void begin_iteration(int64_t sample, int64_t b, int64_t n, const Walk& w) const {
    const int64_t size = r.outputs;
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
                      const Walk& w, T* scratch) const {
    T* const mine = coefficients + b * coefficient_step() + i * coefficient_block();
    const T* const agreed = w.before + n * r.outputs;
    if (terms.detached) return table.softmax(shape, votes, agreed, mine);
    table.iteration_grad(shape, votes, agreed, w.ds, 2 * (n - 1), terms.count, mine, scratch,
                         w.partial);
  }

  // What comes after the last iteration: it adds to the gradients of the outputs before it.
  void walk_rest(int64_t sample, int64_t b, const T* votes, const Walk& w, T* scratch) const {
    const int64_t size = r.outputs;
    for (int64_t n = terms.iterations - 1;; --n) {
      table.total(w.partial, size, T{1}, scratch);
      for (int64_t m = 0; m < n; ++m)
        for (int64_t j = 0; j < size; ++j) w.dv[m * size + j] += scratch[j];
      begin_iteration(sample, b, n - 1, w);
      if (n == 1) return;
      walk_iteration(r.shape, b, n - 1, votes, 0, w, scratch);
    }
  }

  // Block i of the input capsules, for a chunk of samples.
  void finish_block(int64_t i, int64_t base, int64_t count) const {
    const int64_t block = kCapsuleBlock<T>, in = r.shape.in;
    const Scratch<T> scratch(kGradSamples * r.shape.dim * block), grads(count * r.x_block);
    const Scratch<T> weight_grad(packed_dw ? 0 : r.weight_block);
    GradBlock<T> g;
    g.samples = count;
    g.terms = terms.count;
    g.constant = {terms.constant ? constants : nullptr, r.outputs};
    g.coefficients = {coefficients + i * coefficient_block(), coefficient_step()};
    g.factors = {factors, factor_step()};
    g.x = {packed_x + i * r.x_block, r.x_sample};
    g.weight = weight + i * r.weight_block;
    g.first = base == 0;
    g.scratch = scratch.get();
    g.x_grad = {grads.get(), r.x_block};
    g.weight_grad = packed_dw ? packed_dw + i * r.weight_block : weight_grad.get();
    table.grad(r.shape, g);
    if (base + count == r.samples) unpack_weight_block(r, i, g.weight_grad, channels_last, dw);
    for (int64_t b = 0; b < count; ++b)
      transpose_fn<T>()(grads.get() + b * r.x_block, block,
                        dx + ((base + b) * r.inputs + i * block) * in, in, in, r.inside(i));
  }

  void run() const {
    for (int64_t base = 0; base < r.samples; base += chunk) {
      const int64_t count = std::min(chunk, r.samples - base);
      parallel_tasks(ceil_div(count, r.group), [&](int64_t task) {
        const int64_t first = task * r.group;
        walk_group(base, first, std::min(r.group, count - first));
      });
      parallel_tasks(r.shape.blocks, [&](int64_t i) { finish_block(i, base, count); });
    }
  }
};

template <class T>
void capsule_routing_grad_of(const Tensor& grad, const Tensor& x, const Tensor& weight,
                             const Tensor& sums, bool detach, const OptTensor& packed,
                             const Tensor& dx, const Tensor& dw, const Tensor& db) {
  const Routing<T> r(x, weight);
  const Terms terms(sums.size(1), detach);
  const PackedWeight<T> order(r, weight, packed);
  Backward<T> b{r,
                NNARCH_SELECT(routing_table<T>()),
                terms,
                data<T>(x),
                data<T>(grad),
                data<T>(sums),
                order.get(),
                mutable_data<T>(dx),
                mutable_data<T>(dw),
                !dw.is_contiguous()};
  const int64_t per_sample = (b.coefficient_step() + r.x_sample) * int64_t{sizeof(T)};
  const int64_t groups = kChunkBytes / std::max<int64_t>(1, per_sample * r.group);
  b.chunk = std::min(r.samples, std::max<int64_t>(1, groups) * r.group);
  const bool one_chunk = b.chunk == r.samples;
  // One buffer, so that the votes lie where the forward had its own, which are still in cache: two
  // of 6 MB more cost 1 ms where rivals have cleared the caches in between.
  const int64_t sizes[] = {one_chunk ? 0 : r.packed_size(),
                           r.samples * r.outputs,
                           b.chunk * r.x_sample,
                           b.chunk * r.outputs,
                           b.chunk * b.coefficient_step(),
                           b.chunk * b.factor_step()};
  int64_t total = 0;
  for (const int64_t size : sizes) total = checked_sum(total, padded<T>(size));
  const LargeScratch<T> memory(total);
  T* parts[std::size(sizes)];
  T* next = memory.get();
  for (size_t n = 0; n < std::size(sizes); next += round_up(sizes[n++], kCapsuleBlock<T>))
    parts[n] = next;
  b.packed_dw = one_chunk ? nullptr : parts[0], b.bias_grads = parts[1], b.packed_x = parts[2];
  b.constants = parts[3], b.coefficients = parts[4], b.factors = parts[5];
  b.run();
  T* const bias_grad = mutable_data<T>(db);
  for (int64_t n = 0; n < r.samples; ++n)
    for (int64_t j = 0; j < r.outputs; ++j) bias_grad[j] += b.bias_grads[n * r.outputs + j];
}

// A fresh contiguous tensor of zeros.
template <class T>
Tensor zeros(const IntList& sizes, ScalarType type) {
  const Tensor t = new_contiguous(sizes, type);
  if (t.numel() > 0) std::memset(t.data_ptr(), 0, static_cast<size_t>(t.numel()) * sizeof(T));
  return t;
}

std::tuple<Tensor, Tensor, Tensor> capsule_routing_grad(const Tensor& grad, const Tensor& x,
                                                        const Tensor& weight, const Tensor& sums,
                                                        bool detach_routing,
                                                        const OptTensor& packed) {
  check_capsules("capsule_routing_grad: x and weight do not fit together", x, weight);
  const int64_t samples = x.size(0), out = weight.size(0), dim = weight.size(2);
  require(grad.dim() == 3 && grad.size(0) == samples && grad.size(1) == out &&
              grad.size(2) == dim && grad.scalar_type() == x.scalar_type(),
          "capsule_routing_grad: grad must be [B, O, D_out]");
  const Tensor from = as_contiguous(to_compute_type(x)), w = to_compute_type(weight);
  const ScalarType type = from.scalar_type();
  require(sums.dim() == 4 && sums.size(0) == samples && sums.size(1) >= 1 && sums.size(2) == out &&
              sums.size(3) == dim && sums.scalar_type() == type,
          "capsule_routing_grad: sums must be [B, iterations, O, D_out]");
  set_algorithm("votes in cache");
  Tensor dx, dw, db;
  with_scalar_type(type, "capsule_routing_grad", [&](auto scalar) {
    using T = decltype(scalar);
    const bool empty = samples * w.numel() == 0;
    dx = empty ? zeros<T>(sizes_of(x), type) : new_contiguous(sizes_of(x), type);
    dw = new_like(weight, type);  // in the weight's format: autograd would copy any other
    if (empty && dw.numel() > 0) std::fill_n(mutable_data<T>(dw), dw.numel(), T{0});
    db = zeros<T>({out, dim}, type);
    if (samples * out * dim > 0)
      capsule_routing_grad_of<T>(as_contiguous(to_compute_type(grad)), from, w, as_contiguous(sums),
                                 detach_routing, packed, dx, dw, db);
  });
  const ScalarType original = x.scalar_type();
  return {to_type(dx, original), to_type(dw, original), to_type(db, original)};
}

}  // namespace

NNARCH_OPS(capsule_routing_grad, ops) {
  ops.impl("capsule_routing_grad", TORCH_BOX(&capsule_routing_grad));
}

}  // namespace nnarch
