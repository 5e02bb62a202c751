// Where the outputs of an axis lie between its inputs, by torch's rules, and the transpose.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu/tensor.h"
#include "upsample/cpu_kernels.h"

namespace nnarch {

struct AxisArguments {
  int64_t inputs, outputs;
  bool bilinear, align_corners;
  double scale;  // that the user gave; 0 where it follows from the sizes
};

// The sources of all outputs of one axis.
template <class T>
class SourceTable {
 public:
  explicit SourceTable(const AxisArguments& a) : a_(a), first_(a.outputs), second_(a.outputs) {
    if (a.bilinear) {
      w0_.resize(a.outputs);
      w1_.resize(a.outputs);
      bilinear();
    } else {
      nearest();
    }
  }

  Sources<T> view() const {
    return {
        a_.inputs, a_.outputs, first_.data(), second_.data(), a_.bilinear ? w0_.data() : nullptr,
        w1_.data()};
  }

 private:
  // A source is an integer here, so it is computed as torch computes it: in float but for doubles,
  // and the same size or twice that is a copy or a doubling whatever scale was given.
  void nearest() {
    T step = a_.scale > 0 ? static_cast<T>(1.0 / a_.scale)
                          : static_cast<T>(a_.inputs) / static_cast<T>(a_.outputs);
    if (a_.outputs == a_.inputs) step = T(1);
    if (a_.outputs == 2 * a_.inputs) step = T(0.5);
    for (int64_t i = 0; i < a_.outputs; ++i)
      first_[i] = second_[i] = within(std::floor(static_cast<T>(i) * step));
  }

  // A position in double: its error is that of an interpolation weight.
  void bilinear() {
    const auto in = static_cast<double>(a_.inputs), out = static_cast<double>(a_.outputs);
    double step = a_.scale > 0 ? 1.0 / a_.scale : in / out;
    if (a_.align_corners) step = a_.outputs > 1 ? (in - 1) / (out - 1) : 0.0;
    for (int64_t i = 0; i < a_.outputs; ++i) {
      const auto at = static_cast<double>(i);
      double source = a_.align_corners ? step * at : std::max(step * (at + 0.5) - 0.5, 0.0);
      if (a_.inputs == a_.outputs) source = at;
      first_[i] = within(std::floor(source));
      second_[i] = std::min(first_[i] + 1, a_.inputs - 1);
      if (a_.inputs == a_.outputs) second_[i] = i;
      const double part = std::clamp(source - static_cast<double>(first_[i]), 0.0, 1.0);
      w0_[i] = static_cast<T>(1.0 - part);
      w1_[i] = static_cast<T>(part);
    }
  }

  int64_t within(double index) const {
    return index >= static_cast<double>(a_.inputs) ? a_.inputs - 1 : static_cast<int64_t>(index);
  }

  AxisArguments a_;
  std::vector<int64_t> first_, second_;
  std::vector<T> w0_, w1_;
};

// Nearest rows of a plane, of which every one is copied equally often: `together` of them and all
// their copies are one longer row, in whole vectors where `together` rows can be chosen so.
template <class T>
class JoinedRows {
 public:
  // Where rows end within vectors, and what a vector needs of two rows is in reach.
  static bool serve(const Sources<T>& h, const Sources<T>& w, int64_t lanes) {
    if (h.w0 || h.outputs % h.inputs != 0) return false;
    if (w.outputs % lanes == 0 || w.inputs > 2 * lanes) return false;
    const int64_t copies = h.outputs / h.inputs;
    for (int64_t i = 0; i < h.outputs; ++i)
      if (h.first[i] != i / copies) return false;
    return copies > 1;
  }

  JoinedRows(const Sources<T>& h, const Sources<T>& w, int64_t lanes) {
    const int64_t copies = h.outputs / h.inputs;
    int64_t together = 1;
    for (int64_t n : {2, 4})
      if (together * copies * w.outputs % lanes != 0 && h.inputs % n == 0) together = n;
    inputs_ = together * w.inputs;
    for (int64_t row = 0; row < together; ++row)
      for (int64_t copy = 0; copy < copies; ++copy)
        for (int64_t j = 0; j < w.outputs; ++j) columns_.push_back(row * w.inputs + w.first[j]);
    for (int64_t i = 0; i < h.inputs / together; ++i) rows_.push_back(i);
  }

  Sources<T> rows() const { return sources(static_cast<int64_t>(rows_.size()), rows_); }
  Sources<T> columns() const { return sources(inputs_, columns_); }

 private:
  static Sources<T> sources(int64_t inputs, const std::vector<int64_t>& first) {
    return {inputs, static_cast<int64_t>(first.size()), first.data(), first.data(), nullptr,
            nullptr};
  }

  int64_t inputs_;
  std::vector<int64_t> rows_, columns_;
};

// For every input of an axis the outputs that it went into: neighbours, as sources never decrease.
template <class T>
class SpreadTable {
 public:
  explicit SpreadTable(const Sources<T>& s)
      : results_(s.inputs), values_(s.outputs), start_(s.inputs), end_(s.inputs), at_(s.inputs) {
    int64_t start = 0, end = 0;
    weight_.reserve(static_cast<size_t>(s.w0 ? 2 * values_ : values_));
    for (int64_t h = 0; h < results_; ++h) {
      while (start < values_ && s.second[start] < h) ++start;
      while (end < values_ && s.first[end] <= h) ++end;
      start_[h] = start;
      end_[h] = std::max(start, end);
      at_[h] = static_cast<int64_t>(weight_.size());
      for (int64_t o = start; o < end; ++o) {
        const T w0 = s.w0 ? s.w0[o] : T{1}, w1 = s.w0 ? s.w1[o] : T{0};
        weight_.push_back((s.first[o] == h ? w0 : T{0}) + (s.second[o] == h ? w1 : T{0}));
      }
    }
  }

  Spread<T> view() const {
    return {results_, values_, start_.data(), end_.data(), at_.data(), weight_.data()};
  }

 private:
  int64_t results_, values_;
  std::vector<int64_t> start_, end_, at_;
  std::vector<T> weight_;
};

// An axis cut into vectors of `lanes` results, where every pixel has `channels` neighbours.
template <class T>
class ColumnTable {
 public:
  using Lane = typename LaneOf<T>::Type;

  ColumnTable(const Sources<T>& s, int64_t channels, int64_t lanes)
      : ColumnTable(s.inputs, s.outputs, 0, channels, lanes) {
    place(s.first, base0_, lane0_);
    if (s.w0) place(s.second, base1_, lane1_);
    if (!s.w0) return;
    w0_.assign(padded_, T{0});
    w1_.assign(padded_, T{0});
    for (int64_t j = 0; j < outputs_; ++j) {
      w0_[j] = s.w0[j / channels];
      w1_[j] = s.w1[j / channels];
    }
  }

  ColumnTable(const Spread<T>& s, int64_t channels, int64_t lanes)
      : ColumnTable(s.values, s.results, most(s), channels, lanes) {
    place(s.start, base0_, lane0_);
    w0_.assign(padded_ * taps_, T{0});
    for (int64_t j = 0; j < outputs_; ++j) {
      const int64_t pixel = j / channels;
      for (int64_t k = 0; k < s.end[pixel] - s.start[pixel]; ++k)
        w0_[(j / lanes_ * taps_ + k) * lanes_ + j % lanes_] = s.weight[s.at[pixel] + k];
    }
  }

  Columns<T> view() const {
    return {inputs_,       outputs_,      taps_,         channels_,  reach_,    base0_.data(),
            base1_.data(), lane0_.data(), lane1_.data(), w0_.data(), w1_.data()};
  }

 private:
  ColumnTable(int64_t inputs, int64_t outputs, int64_t taps, int64_t channels, int64_t lanes)
      : inputs_(inputs * channels),
        outputs_(outputs * channels),
        taps_(taps),
        channels_(channels),
        lanes_(lanes),
        padded_(round_up(outputs_, lanes)),
        base0_(padded_ / lanes),
        base1_(padded_ / lanes),
        lane0_(padded_),
        lane1_(padded_) {}

  static int64_t most(const Spread<T>& s) {
    int64_t taps = 1;
    for (int64_t j = 0; j < s.results; ++j) taps = std::max(taps, s.end[j] - s.start[j]);
    return taps;
  }

  // The lanes that every vector picks, and where it counts them from.
  void place(const int64_t* source, std::vector<int64_t>& bases, std::vector<Lane>& lane) {
    int64_t furthest = 0;
    for (int64_t block = 0; block < padded_; block += lanes_) {
      const int64_t end = std::min(block + lanes_, outputs_);
      int64_t base = at(source, block);
      for (int64_t j = block; j < end; ++j) base = std::min(base, at(source, j));
      bases[block / lanes_] = base;
      for (int64_t j = block; j < block + lanes_; ++j) {
        lane[j] = static_cast<Lane>(at(source, std::min(j, end - 1)) - base);
        furthest = std::max<int64_t>(furthest, lane[j]);
      }
    }
    if (furthest >= 2 * lanes_)
      reach_ = Reach::any;
    else if (furthest >= lanes_ && reach_ == Reach::one)
      reach_ = Reach::two;
  }

  int64_t at(const int64_t* source, int64_t j) const {
    return source[j / channels_] * channels_ + j % channels_;
  }

  int64_t inputs_, outputs_, taps_, channels_, lanes_, padded_;
  Reach reach_ = Reach::one;
  std::vector<int64_t> base0_, base1_;
  std::vector<Lane> lane0_, lane1_;
  std::vector<T> w0_, w1_;
};

}  // namespace nnarch
