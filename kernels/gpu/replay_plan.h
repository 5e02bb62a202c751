// What a launch plan does without Python: new tensors and launches of kernels, one after the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/direct_call.h"

namespace nnarch {

// Functions of CUDA's driver, and torch's of the current stream. All are null where there are none.
struct Driver {
  int (*launch)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                unsigned shared, void* stream, void** parameters, void** extra) = nullptr;
  int (*launch_cooperative)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned,
                            unsigned, unsigned shared, void* stream, void** parameters) = nullptr;
  int (*current_device)(int*) = nullptr;
  AOTITorchError (*current_stream)(int32_t device, void** stream) = nullptr;
  int (*describe)(void* descriptor, int type, uint32_t rank, void* start, const uint64_t* sizes,
                  const uint64_t* strides, const uint32_t* box, const uint32_t* every,
                  int interleave, int swizzle, int promotion, int fill) = nullptr;
};
extern Driver driver;

// A tensor by where it lies: bytes after the start of an argument or of an earlier step's result.
struct Place {
  size_t slot = 0;
  int64_t offset = 0;
};

struct View {
  Place place;
  bool whole = false;    // the tensor at the slot itself
  int64_t elements = 0;  // the offset in elements
  IntList sizes, strides;
};

// A new tensor: a copy of another one, zeros, or neither.
struct Allocate {
  enum Content : int64_t { kNothing, kZeros, kCopy } content;
  int32_t dtype, device_type, device;
  IntList sizes, strides;
  View source;
};

// A tensor for the tensor memory accelerator, dimensions innermost first; strides, of all but the
// innermost, in bytes.
struct Description {
  size_t parameter;
  Place place;
  int type, swizzle, fill;
  std::vector<uint64_t> sizes, strides;
  std::vector<uint32_t> box;
};

struct Launch {
  void* function;
  unsigned grid[3], threads, shared;
  bool cooperative;
  std::vector<uint64_t> parameters;  // numbers, each in its first bytes
  std::vector<std::pair<size_t, Place>> pointers;
  std::vector<Description> descriptions;
};

struct Replay {
  std::vector<std::variant<Allocate, Launch>> steps;
  std::vector<std::pair<bool, View>> results;  // whether there is one
  PyObject* kept;                              // keeps the kernels loaded

  // From the numbers that replay.py writes.
  Replay(const int64_t* words, PyObject* kept);
  Replay(const Replay&) = delete;
  ~Replay();

  // False where the tensors' device is not the current one. Results are the caller's.
  bool run(const std::vector<AtenTensorHandle>& inputs, AtenTensorHandle* results) const;
};

}  // namespace nnarch
