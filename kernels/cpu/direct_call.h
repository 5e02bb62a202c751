// What direct_call.cpp and direct_backward.cpp share.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/nodes.h"
#include "cpu/python.h"
#include "cpu/registry.h"
#include "cpu/tensor.h"

namespace nnarch {

// What nnarch/direct.py tells of Python and of torch, once.
struct Setup {
  // Where a tensor's object points to its TensorImpl, where that holds its dispatch keys, and the
  // keys of tensors that the dispatcher hands to the kernel as they are.
  int64_t impl_offset = 0, keys_offset = 0;
  uint64_t keys[2] = {};
  PyObject *tensor = nullptr, *parameter = nullptr, *integer = nullptr, *real = nullptr,
           *tuple = nullptr, *list = nullptr, *size = nullptr, *none = nullptr, *yes = nullptr,
           *no = nullptr;
  PyObject *declined = nullptr, *wants_gradient = nullptr;  // the two answers
  PyObject *adopt = nullptr, *requires_grad = nullptr;
  // A function, what it has to return, and one that may excuse another answer, or None.
  struct Watched {
    PyObject *function, *expected, *excuse;
  };
  std::vector<Watched> watched;
};
extern Setup python;

constexpr const char* kOperation = "nnarch operation";
struct Operation {
  int64_t number;  // in the table of native operations
  BoxedOp function;
  std::string kinds;  // a letter an argument, see read()
  std::vector<PyObject*> defaults;
  uint64_t outputs;
  bool first;  // hands out the first output alone
  PyMethodDef method;
  std::vector<std::unique_ptr<Backward>> backwards = {};
};

// An argument that has been read and is owned by nobody yet.
struct Value {
  enum { kNone, kTensor, kNumber, kInts } kind;
  union {
    AtenTensorHandle tensor;
    StableIValue number;
    PyObject* ints;
  };
};

// Where the tensors of a call lie: all on the CPU, or all on a GPU, or the call is not plain.
enum class Where { kNowhere, kOnCpu, kOnGpu };
// Reads the arguments of a call, as many as the operation has.
Where read_arguments(const Operation&, PyObjects arguments, std::ptrdiff_t count, Value* values);

// Appends the items of a list of ints, where there is somewhere; false where it is none.
bool read_integers(PyObject* list, IntList* to);
// The new tensor of a handle, which is the tensor's from then on.
PyObject* adopted(StableIValue value);

// The backward that a call with these arguments has as a native operation; null for none.
const Backward* backward_of(const Operation&, const Value* values);
// Puts a node behind the outputs; false where it cannot, perhaps with an error of Python's set.
bool record(const Operation&, const Backward&, const Value* values, const StableIValue* outputs);

}  // namespace nnarch
