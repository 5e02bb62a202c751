// Attention's arguments, checked, as its kernels take them.
#pragma once

#include <cmath>

#include "attention/cpu_problem.h"
#include "cpu/tensor.h"

namespace nnarch {

inline int64_t element_bytes(ScalarType type) {
  if (type == ScalarType::Bool) return 1;
  if (is_half(type)) return 2;
  return type == ScalarType::Double ? 8 : 4;
}

// A tensor of four dimensions; a dimension of size 1 counts as broadcast: its stride is 0.
inline Operand operand_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  const int64_t bytes = element_bytes(type);
  const auto sizes = t.sizes(), strides = t.strides();  // asked once: each costs a call
  const auto stride = [&](size_t d) { return sizes[d] == 1 ? 0 : strides[d] * bytes; };
  Operand o;
  o.data = static_cast<char*>(mutable_data<void>(t));
  o.batch = stride(0), o.head = stride(1), o.row = stride(2);
  o.column = sizes[3] == 1 ? bytes : strides[3] * bytes;
  o.storage = type == ScalarType::Half       ? Storage::half
              : type == ScalarType::BFloat16 ? Storage::bfloat16
                                             : Storage::native;
  o.in_place = o.storage == Storage::native && o.column == bytes;
  return o;
}

struct AttentionInputs {
  const Tensor &q, &k, &v;
  const OptTensor &mask, &key_lengths, &seed;
  double dropout_p, scale;
  int64_t low, high;

  void check(const char* message) const {
    const auto holds = [&](bool condition) { require(condition, message); };
    holds(q.dim() == 4 && k.dim() == 4 && v.dim() == 4);
    const ScalarType type = q.scalar_type();
    holds(is_half(type) || type == ScalarType::Float || type == ScalarType::Double);
    holds(k.scalar_type() == type && v.scalar_type() == type);
    const auto of_q = q.sizes(), of_k = k.sizes(), of_v = v.sizes();
    const int64_t b = of_q[0], h = of_q[1], g = of_k[1], s = of_k[2];
    holds(of_k[0] == b && of_k[3] == of_q[3]);
    holds(of_v[0] == b && of_v[1] == g && of_v[2] == s);
    holds(h == 0 || (g > 0 && h % g == 0));
    if (mask) {
      holds(mask->dim() == 4);
      holds(mask->scalar_type() == ScalarType::Bool || mask->scalar_type() == type);
      const int64_t full[] = {b, h, of_q[2], s};
      for (int d = 0; d < 4; ++d) holds(mask->size(d) == full[d] || mask->size(d) == 1);
    }
    if (key_lengths)
      holds(key_lengths->dim() == 1 && key_lengths->size(0) == b &&
            key_lengths->scalar_type() == ScalarType::Long);
    holds(dropout_p >= 0 && dropout_p <= 1 && (seed || dropout_p == 0));
    if (seed) holds(seed->scalar_type() == ScalarType::Long && seed->numel() == 1);
  }

  // Queries take the scale's power of two, which rounds nothing; all of it where a mask is added.
  template <class T>
  void set_scale(Attention<T>& a) const {
    int exponent = 0;
    const double rest = 2 * std::fabs(std::frexp(scale, &exponent));  // in [1, 2)
    const bool whole = (mask && !a.mask.boolean) || !(rest >= 1 && rest < 2);
    a.scale = static_cast<T>(scale);
    a.query_scale = whole ? a.scale : static_cast<T>(scale / rest);
    a.score_scale = whole ? 1 : rest;
  }

  // All but the output and the log-sum-exp.
  template <class T>
  Attention<T> problem() const {
    Attention<T> a{};
    const auto sizes = q.sizes(), of_k = k.sizes();
    a.batch = sizes[0], a.heads = sizes[1], a.queries = sizes[2], a.depth = sizes[3];
    a.groups = of_k[1], a.keys = of_k[2], a.value_depth = v.size(3);
    a.q = operand_of(q), a.k = operand_of(k), a.v = operand_of(v);
    if (mask) {
      a.mask.values = operand_of(*mask);
      if (mask->size(3) == 1) a.mask.values.column = 0;
      a.mask.boolean = mask->scalar_type() == ScalarType::Bool;
    }
    if (key_lengths) {
      a.key_lengths = data<int64_t>(*key_lengths);
      a.key_lengths_step = key_lengths->stride(0);
    }
    set_scale(a);
    a.low = low, a.high = high;
    if (seed) {
      a.drops = dropout_p > 0;
      a.seed = static_cast<uint64_t>(*data<int64_t>(*seed));
      a.threshold = static_cast<uint64_t>(std::nearbyint(dropout_p * 4294967296.0));
      a.survivor_scale = dropout_p < 1 ? 1 / (1 - dropout_p) : 0.0;
    }
    return a;
  }
};

// The weights [B, H or 1, L, S] of a call, and its log-sum-exps.
inline void check_weights(const AttentionInputs& inputs, const Tensor& weights, const Tensor& lse,
                          bool averaged, const char* message) {
  const Tensor& q = inputs.q;
  const ScalarType type = q.scalar_type();
  require(lse.dim() == 3 && lse.scalar_type() == (is_half(type) ? ScalarType::Float : type),
          message);
  for (int d = 0; d < 3; ++d) require(lse.size(d) == q.size(d), message);
  require(weights.dim() == 4 && weights.size(0) == q.size(0), message);
  require(weights.size(1) == (averaged ? 1 : q.size(1)), message);
  require(weights.size(2) == q.size(2) && weights.size(3) == inputs.k.size(2), message);
}

// As kernels/attention/reference.py's new_output: heads and positions in the order of `query`'s.
inline Tensor new_attention_output(const Tensor& query, int64_t value_depth) {
  const auto of = query.sizes(), strides = query.strides();
  const int64_t b = of[0], h = of[1], n = of[2];
  const IntList sizes = {b, h, n, value_depth};
  if (strides[1] >= strides[2]) return new_contiguous(sizes, query.scalar_type());
  const IntList dense = contiguous_strides({b, n, h, value_depth});
  return new_strided(sizes, {dense[0], dense[2], dense[1], dense[3]}, query.scalar_type());
}

}  // namespace nnarch
