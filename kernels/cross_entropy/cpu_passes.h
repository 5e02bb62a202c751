// The passes over logits: statistics and loss, gradients.
#pragma once

#include "cpu/streaming.h"
#include "cross_entropy/cpu_logits.h"

namespace nnarch {

template <class T>
struct LogitLoss {
  LogitView<T> x, q;  // logits; target probabilities, or no data
  ClassFactors<T> factors;
  const int64_t* target;  // of every position; null for probabilities
  const Loss<T>& loss;
};

// Where results go; null where one is not wanted.
template <class T>
struct LogitResults {
  T* loss;  // of every position
  double* lse;
  LogitView<T> dx, dq;  // or no data
  const T* grad;        // of the loss: of every position, or one number
  bool each;
};

// So many classes and a position has vectors of its own.
constexpr int64_t kRowClasses = 129;

// Positions whose classes lie side by side and are many.
template <class T>
class RowPass {
 public:
  RowPass(const LogitLoss<T>& p, const LogitResults<T>& to) : p_(p), to_(to) {
    // A line that is written whole need not be read first.
    stream_ = to.dx.data && p.x.classes * int64_t{sizeof(T)} >= 4096 &&
              p.x.positions() * p.x.classes * int64_t{sizeof(T)} >= kStreamBytes;
  }
  static bool suits(const LogitLoss<T>& p) {
    return p.x.rows && !p.q.data && p.x.classes >= kRowClasses;
  }
  int64_t block_size() const { return std::clamp<int64_t>(32768 / p_.x.classes, 1, 64); }

  // Returns the block's sum of losses.
  double forward(const PositionBlock& b) const {
    double sum = 0;
    for (int64_t i = 0; i < b.count; ++i) {
      const int64_t at = b.first + i;
      const T* z = p_.x.at(b.outer, b.inner + i);
      T top, total;
      softmax<T>().row_observe(z, p_.x.classes, &top, &total);
      Seen seen{LogSum::of(top, total), 0, 0, 0};
      if (p_.factors.any())
        softmax<T>().row_weigh(z, p_.x.classes, top, p_.factors, &seen.weighted, &seen.total);
      if (p_.loss.targets().kept(at)) seen.at_target = z[p_.target[at]];
      const double value = p_.loss.value(at, seen);
      to_.lse[at] = seen.lse.value();
      if (!p_.loss.reduces()) to_.loss[at] = static_cast<T>(value);
      sum += value;
      if (to_.dx.data) gradient(b, i, seen.lse, p_.loss.slopes(at, seen, 1.0));
    }
    return sum;
  }
  void backward(const PositionBlock& b, double total) const {
    for (int64_t i = 0; i < b.count; ++i) {
      const int64_t at = b.first + i;
      const Seen seen{log_sum(b, i), 0, 0, total};
      gradient(b, i, seen.lse, p_.loss.slopes(at, seen, to_.grad[to_.each ? at : 0]));
    }
  }

 private:
  // As the forward pass left it, or, where that cannot be, made again.
  LogSum log_sum(const PositionBlock& b, int64_t i) const {
    const double value = to_.lse[b.first + i];
    if (LogSum::is_exact<T>(value)) return LogSum::of_value<T>(value);
    T top, total;
    softmax<T>().row_observe(p_.x.at(b.outer, b.inner + i), p_.x.classes, &top, &total);
    return LogSum::of(top, total);
  }

  void gradient(const PositionBlock& b, int64_t i, const LogSum& lse, Slopes s) const {
    s.take_share(lse);
    const int64_t at = b.first + i;
    T* g = to_.dx.at(b.outer, b.inner + i);
    softmax<T>().row_gradient(p_.x.at(b.outer, b.inner + i), p_.x.classes, static_cast<T>(lse.max),
                              static_cast<T>(s.alpha), static_cast<T>(s.scale), p_.factors, g,
                              stream_);
    if (s.beta != 0) g[p_.target[at]] -= static_cast<T>(s.beta);
  }

  const LogitLoss<T>& p_;
  const LogitResults<T>& to_;
  bool stream_;
};

// Positions side by side, or few classes, or probabilities as targets.
template <class T>
class TilePass {
 public:
  using Tiles = BlockTiles<T>;
  TilePass(const LogitLoss<T>& p, const LogitResults<T>& to) : p_(p), to_(to) {}
  int64_t block_size() const { return Tiles::columns(p_.x); }

  double forward(const PositionBlock& b) const {
    const Tiles x(p_.x), q(p_.q);
    constexpr int64_t most = Tiles::kPlaneColumns;
    T top[most], total[most];
    double weighted[most] = {}, factors[most] = {};
    T at_target[most] = {};
    begin_sums(top, total);
    each_class_tile(p_.x.classes, Tiles::kClasses, [&](int64_t c, int64_t classes) {
      const T* z = x.read(b, c, classes);
      softmax<T>().observe(z, x.step(), classes, b.count, top, total);
      if (p_.factors.any() || p_.q.data)
        softmax<T>().weigh(z, x.step(), classes, b.count, top, factors_at(q, b, c, classes),
                           weighted, factors);
      const int64_t* target = p_.target ? p_.target + b.first : nullptr;
      const int64_t step = x.step();
      for (int64_t i = 0; target && i < b.count; ++i) {
        const int64_t t = target[i] - c;
        if (t >= 0 && t < classes) at_target[i] = z[t * step + i];
      }
    });
    double sum = 0;
    const Loss<T> loss = p_.loss;
    double* lse = to_.lse + b.first;
    softmax<T>().log_sums(total, b.count, lse);
    Scratch<T> memory(SlopeRows<T>::kArrays * most);
    const SlopeRows<T> slopes(memory.get(), most);
    for (int64_t i = 0; i < b.count; ++i) {
      const int64_t at = b.first + i;
      const LogSum log_sum{top[i], lse[i], 1 / static_cast<double>(total[i])};
      const Seen seen{log_sum, static_cast<double>(at_target[i]), weighted[i], factors[i]};
      lse[i] = log_sum.value();
      const double value = loss.value(at, seen);
      if (!loss.reduces()) to_.loss[at] = static_cast<T>(value);
      sum += value;
      if (to_.dx.data) slopes.set(i, log_sum, loss.slopes(at, seen, 1.0));
    }
    if (to_.dx.data) gradients(b, x, q, slopes);
    return sum;
  }

  void backward(const PositionBlock& b, double total) const {
    const Tiles x(p_.x), q(p_.q);
    constexpr int64_t most = Tiles::kPlaneColumns;
    double weighted[most] = {}, factors[most] = {};
    T top[most], sums[most];
    const bool again =
        !std::all_of(to_.lse + b.first, to_.lse + b.first + b.count, LogSum::is_exact<T>);
    if (again) observe(b, x, top, sums);
    if (p_.q.data)
      each_class_tile(p_.x.classes, Tiles::kClasses, [&](int64_t c, int64_t classes) {
        const T* z = x.read(b, c, classes);
        T near[most] = {};
        softmax<T>().weigh(z, x.step(), classes, b.count, near, factors_at(q, b, c, classes),
                           weighted, factors);
      });
    Scratch<T> memory(SlopeRows<T>::kArrays * most);
    const SlopeRows<T> slopes(memory.get(), most);
    for (int64_t i = 0; i < b.count; ++i) {
      const int64_t at = b.first + i;
      const LogSum log_sum = again ? LogSum::of(top[i], sums[i]) : LogSum::of_value<T>(to_.lse[at]);
      const Seen seen{log_sum, 0, 0, p_.q.data ? factors[i] : total};
      slopes.set(i, seen.lse, p_.loss.slopes(at, seen, to_.grad[to_.each ? at : 0]));
    }
    gradients(b, x, q, slopes);
  }

 private:
  static void begin_sums(T* top, T* total) {
    std::fill_n(top, Tiles::kPlaneColumns, -static_cast<T>(INFINITY));
    std::fill_n(total, Tiles::kPlaneColumns, T{0});
  }

  // The forward pass' sums, where its logarithms do not tell them (LogSum::is_exact).
  void observe(const PositionBlock& b, const Tiles& x, T* top, T* total) const {
    begin_sums(top, total);
    each_class_tile(p_.x.classes, Tiles::kClasses, [&](int64_t c, int64_t classes) {
      softmax<T>().observe(x.read(b, c, classes), x.step(), classes, b.count, top, total);
    });
  }

  ClassFactors<T> factors_at(const Tiles& q, const PositionBlock& b, int64_t c,
                             int64_t classes) const {
    ClassFactors<T> a = p_.factors;
    if (a.weight) a.weight += c;
    if (p_.q.data) a.q = q.read(b, c, classes), a.q_step = q.step();
    return a;
  }

  void gradients(const PositionBlock& b, const Tiles& x, const Tiles& q,
                 const SlopeRows<T>& s) const {
    const Tiles dx(to_.dx), dq(to_.dq);
    each_class_tile(p_.x.classes, Tiles::kClasses, [&](int64_t c, int64_t classes) {
      const T* z = x.read(b, c, classes);
      const ClassFactors<T> a = factors_at(q, b, c, classes);
      if (to_.dx.data) {
        T* g = dx.to_write(b, c);
        softmax<T>().gradient(z, x.step(), classes, b.count, s.max, s.alpha, s.scale, a, g,
                              dx.step());
        for (int64_t i = 0; p_.target && i < b.count; ++i) {
          const int64_t t = p_.target[b.first + i] - c;
          if (t >= 0 && t < classes) g[t * dx.step() + i] -= s.beta[i];
        }
        dx.wrote(b, c, classes);
      }
      if (to_.dq.data) {
        softmax<T>().target_gradient(z, x.step(), classes, b.count, s.max, s.rest, s.scale, a,
                                     dq.to_write(b, c), dq.step());
        dq.wrote(b, c, classes);
      }
    });
  }

  const LogitLoss<T>& p_;
  const LogitResults<T>& to_;
};

template <class T, class Pass>
double run_forward(const LogitLoss<T>& p, const Pass& pass) {
  const PositionBlocks<T> blocks(p.x, pass.block_size());
  std::vector<double> sums(static_cast<size_t>(blocks.count()));
  parallel_tasks(blocks.count(),
                 [&](int64_t i) { sums[static_cast<size_t>(i)] = pass.forward(blocks.at(i)); });
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

template <class T, class Pass>
void run_backward(const LogitLoss<T>& p, const Pass& pass, double total) {
  const PositionBlocks<T> blocks(p.x, pass.block_size());
  parallel_tasks(blocks.count(), [&](int64_t i) { pass.backward(blocks.at(i), total); });
}

}  // namespace nnarch
