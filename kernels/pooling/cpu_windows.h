// The windows of pooling, from the arguments of the operations.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/tensor.h"
#include "pooling/cpu_kernels.h"

namespace nnarch {

// An Axis with the memory that it points to.
struct Windows {
  std::vector<int64_t> start, end, count;
  int64_t inputs = 0, step = 1, kernel = 0, stride = 0, padding = 0;

  // Room for all windows: growing three lists for each axis took 0.4 µs of a small call.
  void reserve(int64_t windows) {
    for (auto* list : {&start, &end, &count}) list->reserve(static_cast<size_t>(windows));
  }

  Axis axis() const {
    return {inputs,       static_cast<int64_t>(start.size()),
            start.data(), end.data(),
            count.data(), step,
            kernel,       stride,
            padding};
  }
};

// More windows than any image has: their table alone would take gigabytes. Callers allocate the
// output before they build tables, so that torch refuses what does not fit into memory.
inline constexpr int64_t kMostWindows = int64_t{1} << 26;

inline void check_windows(int64_t windows) {
  require(windows >= 0, "pooling: a size must not be negative");
  require(windows <= kMostWindows, "pooling: more than 2**26 windows in one axis");
}

// The output size of an adaptive operation.
inline void check_pair(const IntList& output_size) {
  require(output_size.size() == 2, "pooling: output_size must be a pair");
  check_windows(output_size[0]);
  check_windows(output_size[1]);
}

// One axis of a pooling operation's arguments.
struct AxisArguments {
  int64_t kernel, stride, padding, dilation;
  bool ceil_mode;
};

inline AxisArguments axis_arguments(const IntList& kernel, const IntList& stride,
                                    const IntList& padding, const IntList& dilation, bool ceil_mode,
                                    size_t axis) {
  require(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
          "pooling: kernel, stride, padding and dilation must be pairs");
  const AxisArguments a{kernel[axis], stride[axis], padding[axis], dilation[axis], ceil_mode};
  constexpr int64_t limit = int64_t{1} << 31;
  require(a.kernel > 0 && a.kernel < limit, "pooling: kernel must be positive");
  require(a.stride > 0 && a.stride < limit, "pooling: stride must be positive");
  require(a.dilation > 0 && a.dilation < limit, "pooling: dilation must be positive");
  require(a.padding >= 0 && a.padding <= a.kernel / 2, "pooling: padding exceeds half the kernel");
  return a;
}

// With ceil_mode a window may begin anywhere inside the input or its left padding, never past them.
inline int64_t output_size(int64_t inputs, const AxisArguments& a) {
  const int64_t span = inputs + 2 * a.padding - a.dilation * (a.kernel - 1) - 1;
  require(span >= 0 || (a.ceil_mode && span + a.stride > 0), "pooling: output size is too small");
  int64_t outputs = (span + (a.ceil_mode ? a.stride - 1 : 0)) / a.stride + 1;
  if (a.ceil_mode && (outputs - 1) * a.stride >= inputs + a.padding) --outputs;
  require(outputs > 0, "pooling: output size is too small");
  check_windows(outputs);
  return outputs;
}

// `count_padding`: whether an average's divisor counts the padding that a window covers.
inline Windows regular_windows(int64_t inputs, const AxisArguments& a, bool count_padding) {
  const int64_t outputs = output_size(inputs, a);
  Windows w;
  w.inputs = inputs;
  w.step = a.dilation;
  w.kernel = a.kernel;
  w.stride = a.stride;
  w.padding = a.padding;
  w.reserve(outputs);
  for (int64_t i = 0; i < outputs; ++i) {
    const int64_t begin = i * a.stride - a.padding, past = begin + (a.kernel - 1) * a.dilation + 1;
    const int64_t skipped = begin < 0 ? ceil_div(-begin, a.dilation) : 0;
    w.start.push_back(begin + skipped * a.dilation);
    w.end.push_back(std::min(past, inputs));
    const int64_t padded = std::min(past, inputs + a.padding) - begin;
    const int64_t inside = w.end.back() - w.start.back();
    w.count.push_back(count_padding ? padded : std::max<int64_t>(1, inside));
  }
  return w;
}

// Output i takes the inputs from floor(i·inputs/outputs) up to ceil((i+1)·inputs/outputs).
inline Windows adaptive_windows(int64_t inputs, int64_t outputs) {
  check_windows(outputs);
  Windows w;
  w.inputs = inputs;
  w.reserve(outputs);
  bool regular = true;  // 14 -> 7, 13 -> 6, 7 -> 1: the same kernel at the same distance
  for (int64_t i = 0; i < outputs; ++i) {
    w.start.push_back(i / outputs * inputs + i % outputs * inputs / outputs);
    w.end.push_back(1 + ((i + 1) * inputs - 1) / outputs);
    w.count.push_back(w.end.back() - w.start.back());
    regular &= w.count.back() == w.count.front() && w.start.back() == i * (inputs / outputs);
  }
  if (regular && 0 < outputs && outputs <= inputs) {  // more outputs share their inputs
    w.kernel = w.count.front();
    w.stride = std::max<int64_t>(1, inputs / outputs);
  }
  return w;
}

// For every input the outputs whose windows hold it: the windows of the gradient. They are ranges,
// because starts and ends of windows never decrease.
inline Windows inverse_windows(const Windows& forward) {
  Windows w;
  w.inputs = static_cast<int64_t>(forward.start.size());
  w.reserve(forward.inputs);
  int64_t first = 0, past = 0;
  for (int64_t i = 0; i < forward.inputs; ++i) {
    while (first < w.inputs && forward.end[first] <= i) ++first;
    while (past < w.inputs && forward.start[past] <= i) ++past;
    w.start.push_back(first);
    w.end.push_back(past);
    w.count.push_back(1);
  }
  return w;
}

}  // namespace nnarch
