// What direct_call.cpp (stable ABI) and nodes/nodes.cpp (built for one torch) tell each other.
// See docs/adr/0012-nodes.md.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <string>
#include <vector>

namespace nnarch {

// An operation's backward that is one native operation: where that takes its arguments from, and
// whose gradients it gives. nnarch/nodes.py has the same in words.
struct Backward {
  enum Source : int64_t {
    kGrad,
    kInput,
    kOutput,
    kNumber,
    kInts,   // a list of ints
    kSizes,  // of an input, which is not kept
    kWanted,
    kKeepsGraph,
    kNone
  };
  struct Argument {
    Source source;
    int64_t index;  // of the gradient, or of the operation's argument or output
    char kind;      // as in direct_call.cpp, a capital letter where None is taken too
  };
  // What an argument of the operation has to be.
  struct Condition {
    enum Is : int64_t { kAbsent, kGiven, kOneOf } is;  // 0 counts as absent
    int64_t argument;
    int64_t bits;  // of kOneOf: the values from 0 to 62
  };
  struct Edge {
    int64_t input;   // argument of the operation that may have a gradient
    int64_t result;  // of the backward operation, that is it
    int64_t bit;     // in the number `wanted`
  };
  std::string name;
  int64_t number;  // of the backward operation in the table of native operations
  void (*function)(uint64_t* stack, uint64_t arguments, uint64_t outputs);
  std::vector<Argument> arguments;
  std::vector<Edge> edges;
  int64_t results;  // of the backward operation
  int64_t seen;     // outputs of the operation that have gradients, from the first
  int64_t shown;    // outputs that the caller gets, from the first
  std::vector<Condition> conditions;
  void* formula;  // the Python function of the same arguments, for what is not plain
};

constexpr int kMostBackwardArguments = 24, kMostBackwardResults = 8;

// One argument's value, of which its kind says what counts. Handles and lists stay their owner's;
// None has a null handle.
struct Given {
  AtenTensorHandle tensor = nullptr;
  uint64_t number = 0;
  const int64_t* ints = nullptr;
  int64_t size = 0;
};

// Calls `formula`; results are the caller's. False where it raised: `error` is then
// "<exception>: <message>".
using CallFormula = bool (*)(const Backward&, const Given* arguments, AtenTensorHandle* results,
                             std::string* error);

// Functions of the native library.
struct NodeCalls {
  CallFormula call_formula;
  // Whether these are the dispatch keys of a plain tensor on a GPU.
  bool (*is_plain_on_gpu)(uint64_t keys);
  // Repeats a launch plan of the backward operation (gpu/replay.h); results are the caller's, null
  // where there is none. False where there is no plan for such arguments.
  bool (*replay_backward)(const Backward&, const Given* arguments, AtenTensorHandle* results);
};

// Functions of the library of nodes.
//
// Sets it up: dispatch keys of plain tensors.
using SetUpNodes = void (*)(uint64_t keys, uint64_t other_keys, const NodeCalls&);
// Puts a node behind the first outputs of an operation that has run; they stay the caller's. False
// where it cannot: nothing has been done then.
using RecordNode = bool (*)(const Backward&, const Given* arguments,
                            const AtenTensorHandle* outputs);

}  // namespace nnarch
