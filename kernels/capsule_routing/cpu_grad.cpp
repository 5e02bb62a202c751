// The gradients of capsule routing on the CPU, through all iterations or with the routing detached.
//
// Votes are computed again rather than kept: keeping them would cost a pass over memory each way.
// For a chunk of samples, first every group of samples walks its iterations backwards over votes in
// cache and leaves the coefficients of the votes' gradients; then every block of input capsules
// forms those gradients in cache and multiplies them with the weight and with x.
#include <iterator>
#include <tuple>

#include "capsule_routing/cpu_walk.h"
#include "cpu/dense.h"
#include "cpu/registry.h"

namespace nnarch {
namespace {

// Bytes of coefficients that a chunk of samples may leave: they are read from the last-level cache.
// Where that is far, they come from there in any case, and every chunk reads and writes the
// weight's gradient once more.
int64_t chunk_bytes() { return int64_t{far_l3() ? 32 : 16} << 20; }

// A gradient of the weight above this goes past the caches: nothing reads it before they are full
// of something else.
constexpr int64_t kStreamedBytes = int64_t{2} << 20;

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
  WalkBack<T>& walk;
  T *dx, *dw;
  bool channels_last;  // dw
  int64_t chunk;       // samples
  T* packed_dw;        // grows from chunk to chunk; null where there is but one

  // Block i of the input capsules, for a chunk of samples.
  void finish_block(int64_t i) const {
    const Routing<T>& r = walk.r;
    const int64_t block = kCapsuleBlock<T>, in = r.shape.in, count = walk.count;
    const Scratch<T> scratch(kGradSamples * r.shape.dim * block), grads(count * r.x_block);
    const Scratch<T> weight_grad(packed_dw ? 0 : r.weight_block);
    GradBlock<T> g;
    g.samples = count;
    g.terms = walk.terms.count;
    g.constant = {walk.terms.constant ? walk.constants : nullptr, r.outputs};
    g.coefficients = {walk.coefficients + i * walk.coefficient_block(), walk.coefficient_step()};
    g.factors = {walk.factors, walk.factor_step()};
    g.x = {walk.packed_x + i * r.x_block, r.x_sample};
    g.weight = walk.packed + i * r.weight_block;
    g.first = walk.base == 0;
    g.scratch = scratch.get();
    g.x_grad = {grads.get(), r.x_block};
    g.weight_grad = packed_dw ? packed_dw + i * r.weight_block : weight_grad.get();
    walk.table.grad(r.shape, g);
    if (walk.base + count == r.samples) unpack_weight_block(r, i, g.weight_grad, channels_last, dw);
    for (int64_t b = 0; b < count; ++b)
      transpose_fn<T>()(grads.get() + b * r.x_block, block,
                        dx + ((walk.base + b) * r.inputs + i * block) * in, in, in, r.inside(i));
  }

  void run() const {
    const int64_t samples = walk.r.samples;
    for (walk.base = 0; walk.base < samples; walk.base += chunk) {
      walk.count = std::min(chunk, samples - walk.base);
      walk.run();
      parallel_tasks(walk.r.shape.blocks, [&](int64_t i) { finish_block(i); });
    }
  }
};

template <class T>
void capsule_routing_grad_of(const Tensor& grad, const Tensor& x, const Tensor& weight,
                             const Tensor& sums, bool detach, const OptTensor& packed,
                             const Tensor& dx, const Tensor& dw, const Tensor& db) {
  const Routing<T> r(x, weight);
  const Terms terms(sums.size(1), detach);
  const auto& table = NNARCH_SELECT(routing_table<T>());
  const bool lanes = !detach && votes_in_lanes(r, table.lanes, backward_passes(terms.iterations));
  if (lanes) set_algorithm("votes in lanes");
  const Tensor natural = lanes ? as_contiguous(weight) : weight;
  const PackedWeight<T> order(r, weight, packed);
  WalkBack<T> walk{r,
                   table,
                   terms,
                   data<T>(x),
                   data<T>(grad),
                   data<T>(sums),
                   order.get(),
                   lanes ? data<T>(natural) : nullptr};
  const int64_t per_sample = (walk.coefficient_step() + r.x_sample) * int64_t{sizeof(T)};
  const int64_t groups = chunk_bytes() / std::max<int64_t>(1, per_sample * walk.together());
  const int64_t chunk = std::min(r.samples, std::max<int64_t>(1, groups) * walk.together());
  const bool one_chunk = chunk == r.samples;
  // One buffer, so that the votes lie where the forward had its own, which are still in cache: two
  // of 6 MB more cost 1 ms where rivals have cleared the caches in between.
  const int64_t sizes[] = {one_chunk ? 0 : r.packed_size(),
                           r.samples * r.outputs,
                           chunk * r.x_sample,
                           chunk * r.outputs,
                           chunk * walk.coefficient_step(),
                           chunk * walk.factor_step()};
  int64_t total = 0;
  for (const int64_t size : sizes) total = checked_sum(total, padded<T>(size));
  const Scratch<T> memory(total);
  T* parts[std::size(sizes)];
  T* next = memory.get();
  for (size_t n = 0; n < std::size(sizes); next += round_up(sizes[n++], kCapsuleBlock<T>))
    parts[n] = next;
  walk.bias_grads = parts[1], walk.packed_x = parts[2], walk.constants = parts[3];
  walk.coefficients = parts[4], walk.factors = parts[5];
  Backward<T>{walk,  mutable_data<T>(dx),           mutable_data<T>(dw), !dw.is_contiguous(),
              chunk, one_chunk ? nullptr : parts[0]}
      .run();
  T* const bias_grad = mutable_data<T>(db);
  for (int64_t n = 0; n < r.samples; ++n)
    for (int64_t j = 0; j < r.outputs; ++j) bias_grad[j] += walk.bias_grads[n * r.outputs + j];
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
