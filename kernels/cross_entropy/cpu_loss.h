// What the losses of all memory orders share: arguments, the terms of a sample, the reduction.
//
//   loss = Σ_c a_c·(lse - z_c) + z_loss·lse²,  a_c = weight_c·((1 - ε)·q_c + ε/C)
//
// with q the target's distribution: 1 at the target's class, or given.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/arena.h"
#include "cpu/tensor.h"
#include "cross_entropy/cpu_kernels.h"

namespace nnarch {

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };

struct LossOptions {
  int64_t ignore_index;
  double smoothing, z_loss;
  Reduction reduction;
  int64_t classes;

  double of_target() const { return 1 - smoothing; }
  double rest() const { return smoothing == 0 ? 0 : smoothing / static_cast<double>(classes); }
};

inline LossOptions loss_options(const char* op, int64_t ignore_index, double smoothing,
                                double z_loss, int64_t reduction, int64_t classes) {
  if (!(smoothing >= 0 && smoothing <= 1 && reduction >= 0 && reduction <= 2 &&
        std::isfinite(z_loss)))
    throw std::runtime_error(std::string(op) + ": a number is outside its range");
  return {ignore_index, smoothing, z_loss, static_cast<Reduction>(reduction), classes};
}

// Class indices, each valid or ignored, and what the means divide by.
template <class T>
class Targets {
 public:
  Targets(const char* op, const int64_t* index, int64_t count, const T* weight,
          const LossOptions& o)
      : index_(index), weight_(weight), ignore_(o.ignore_index) {
    check(op, count, o.classes);
    if (o.reduction != Reduction::mean) {
      weights_ = kept_ = 1;
    } else if (weight_) {
      double sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += kept(i) ? weight_of(i) : 0;
      weights_ = sum;
    }
    invert();
  }
  // Of probabilities: every sample counts, and means divide by their number.
  Targets(int64_t count, const LossOptions& o)
      : weights_(o.reduction == Reduction::mean ? static_cast<double>(count) : 1), kept_(weights_) {
    invert();
  }

  bool probabilities() const { return index_ == nullptr; }
  bool kept(int64_t i) const { return index_ == nullptr || index_[i] != ignore_; }
  int64_t at(int64_t i) const { return index_[i]; }
  double weight_of(int64_t i) const {
    return weight_ ? static_cast<double>(weight_[index_[i]]) : 1;
  }
  // What the entropies and the z-losses are multiplied by: a division for every position would
  // show where classes are few.
  double per_weight() const { return per_weight_; }
  double per_count() const { return per_count_; }
  bool none_kept() const { return kept_ == 0; }

 private:
  // Counts what is kept. One pass without branches, and another to say which target is wrong: a
  // map of labels has so many that a branch for each would show.
  void check(const char* op, int64_t count, int64_t classes) {
    const int64_t ignore = ignore_;
    int64_t kept = 0, wrong = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t keep = index_[i] != ignore;
      kept += keep, wrong |= keep & (index_[i] < 0 || index_[i] >= classes);
    }
    for (int64_t i = 0; wrong && i < count; ++i) {
      const int64_t t = index_[i];
      if (t != ignore && (t < 0 || t >= classes))
        throw std::runtime_error(std::string(op) + ": target must be a class from 0 to " +
                                 std::to_string(classes - 1) + " or ignore_index " +
                                 std::to_string(ignore) + ", got " + std::to_string(t));
    }
    weights_ = kept_ = static_cast<double>(kept);
  }
  void invert() { per_weight_ = 1 / weights_, per_count_ = 1 / kept_; }

  const int64_t* index_ = nullptr;
  const T* weight_ = nullptr;
  int64_t ignore_ = 0;
  double weights_ = 0, kept_ = 0, per_weight_ = 0, per_count_ = 0;
};

// log Σ exp(z) of a sample as the largest logit and what the others add: a sum of both would lose
// the second where logits are large, those of a masked sample say.
struct LogSum {
  double max, rest;
  double share;  // exp(-rest): of the largest logit

  static LogSum of(double max, double sum) { return {max, std::log(sum), 1 / sum}; }

  // From their sum, for kernels that compute in T: what rounding it to T leaves is the rest.
  template <class T>
  static LogSum of_value(double value) {
    const double max = static_cast<double>(static_cast<T>(value)), d = max - value;
    constexpr double small = 1e-4;  // exp(d) takes as long as all else of a position
    const double near = 1 + d * (1 + d * (0.5 + d * (1.0 / 6)));
    return {max, -d, std::abs(d) <= small ? near : std::exp(d)};
  }
  // Whether the sum of both says what each was, as exactly as T tells.
  template <class T>
  static bool is_exact(double value) {
    return std::abs(value) < (sizeof(T) == sizeof(float) ? 0x1p20 : 0x1p6);
  }

  double value() const { return max + rest; }
  double above(double z) const { return (max - z) + rest; }
};

// What is known of a sample once all its logits were seen.
struct Seen {
  LogSum lse;
  double at_target;        // its logit; unused for probabilities
  double weighted, total;  // Σ a·z and Σ a of probabilities and smoothing
};

// The gradient of a sample's logits: alpha·p - beta·[c is the target] - scale·a_c.
struct Slopes {
  double alpha = 0, beta = 0, scale = 0;

  // Kernels take exp(z - max) in place of p: alpha is what that is multiplied by.
  void take_share(const LogSum& lse) {
    if (alpha != 0) alpha *= lse.share;
  }
};

// Small enough to copy: a loop over positions keeps a copy of its own, which no store can change.
template <class T>
class Loss {
 public:
  Loss(const LossOptions& options, const Targets<T>& targets)
      : o_(options),
        t_(targets),
        spread_(options.rest() != 0 || targets.probabilities()),
        of_target_(targets.probabilities() ? 0 : options.of_target()) {}

  // Of sample i, divided by what the reduction divides by.
  double value(int64_t i, const Seen& s) const {
    if (!t_.kept(i)) return 0;
    double loss = spread_ ? (s.total * s.lse.max - s.weighted) + s.total * s.lse.rest : 0;
    if (of_target_ != 0) loss += of_target_ * t_.weight_of(i) * s.lse.above(s.at_target);
    loss *= t_.per_weight();
    const double lse = s.lse.value();
    if (o_.z_loss != 0) loss += o_.z_loss * lse * lse * t_.per_count();
    return loss;
  }

  // `grad` is the gradient of the value.
  Slopes slopes(int64_t i, const Seen& s, double grad) const {
    if (!t_.kept(i)) return {};
    Slopes g;
    g.scale = grad * t_.per_weight();
    g.alpha = g.scale * s.total;
    if (of_target_ != 0) {
      g.beta = g.scale * of_target_ * t_.weight_of(i);
      g.alpha += g.beta;
    }
    if (o_.z_loss != 0) g.alpha += grad * t_.per_count() * 2 * o_.z_loss * s.lse.value();
    return g;
  }

  // A sum of values as the reduction wants it: where nothing is kept, the mean is 0/0 as in torch.
  double reduced(double sum) const {
    return o_.reduction == Reduction::mean && t_.none_kept() ? NAN : sum;
  }

  bool reduces() const { return o_.reduction != Reduction::none; }
  const LossOptions& options() const { return o_; }
  const Targets<T>& targets() const { return t_; }

 private:
  LossOptions o_;
  Targets<T> t_;
  bool spread_;  // whether every class adds to the loss
  double of_target_;
};

// Of every sample in a block; the memory is the caller's scratch.
template <class T>
struct SlopeRows {
  T *max, *rest, *alpha, *beta, *scale;

  static constexpr int64_t kArrays = 5;
  SlopeRows(T* memory, int64_t n)
      : max(memory),
        rest(memory + n),
        alpha(memory + 2 * n),
        beta(memory + 3 * n),
        scale(memory + 4 * n) {}

  void set(int64_t i, const LogSum& lse, Slopes s) const {
    s.take_share(lse);
    max[i] = static_cast<T>(lse.max), rest[i] = static_cast<T>(lse.rest);
    alpha[i] = static_cast<T>(s.alpha), beta[i] = static_cast<T>(s.beta);
    scale[i] = static_cast<T>(s.scale);
  }
};

}  // namespace nnarch
