// Operations called from Python past torch's reading of the arguments and its dispatcher, which
// take 2 to 5 µs of a small call. See docs/adr/0008-direct-calls.md.
//
// nnarch/direct.py makes one of these functions for an operation. It runs the kernel where the
// dispatcher would do nothing else: plain tensors, numbers of Python's own types, no mode,
// transform, profiler or trace. On a GPU it repeats a launch plan (gpu/replay.h), where there is
// one for such arguments. Everything else, and everything that fails, is its caller's: it returns
// one of two objects that say so, and has done nothing.
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/direct_call.h"
#include "cpu/first_output.h"
#include "gpu/replay.h"

namespace nnarch {

Setup python;

namespace {

constexpr int kMostArguments = 24, kMostOutputs = 8;

bool is_instance(PyObject* object, PyObject* type) {
  PyObject* own = PyObject_Type(object);
  Py_DecRef(own);  // the object holds it
  return own == type;
}

PyObject* answer(PyObject* object) {
  Py_IncRef(object);
  return object;
}

// Whether a function returns one of Python's own constants or small numbers.
bool returns(PyObject* function, PyObject* expected) {
  PyObject* result = PyObject_CallNoArgs(function);
  if (result == nullptr) {
    PyErr_Clear();
    return false;
  }
  Py_DecRef(result);
  return result == expected;
}

bool nobody_watches() {
  for (const auto& [function, expected, excuse] : python.watched) {
    if (returns(function, expected)) continue;
    if (excuse == python.none || !returns(excuse, python.yes)) return false;
  }
  return true;
}

// The address of the at::Tensor in a Python tensor, which is a handle that nobody owns; null for
// one with anything special about it, or that lies elsewhere than those before it.
AtenTensorHandle plain_tensor(PyObject* object, Where& where) {
  PyObject* type = PyObject_Type(object);
  Py_DecRef(type);
  if (type != python.tensor && type != python.parameter) return nullptr;
  char* place = reinterpret_cast<char*>(object) + python.impl_offset;
  const char* impl;
  std::memcpy(&impl, place, sizeof(impl));
  uint64_t keys;
  std::memcpy(&keys, impl + python.keys_offset, sizeof(keys));
  Where here = Where::kNowhere;
  if (keys == python.keys[0] || keys == python.keys[1])
    here = Where::kOnCpu;
  else if (is_plain_on_gpu(keys))
    here = Where::kOnGpu;
  if (here == Where::kNowhere || (where != Where::kNowhere && where != here)) return nullptr;
  where = here;
  return reinterpret_cast<AtenTensorHandle>(place);
}

bool read_integer(PyObject* object, int64_t& value) {
  if (!is_instance(object, python.integer)) return false;
  value = PyLong_AsLongLong(object);
  if (value != -1 || !PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

}  // namespace

bool read_integers(PyObject* object, IntList* to) {
  const bool is_list = is_instance(object, python.list);
  if (!is_list && !is_instance(object, python.tuple) && !is_instance(object, python.size))
    return false;
  const std::ptrdiff_t count = is_list ? PyList_Size(object) : PyTuple_Size(object);
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    int64_t value;
    if (!read_integer(is_list ? PyList_GetItem(object, i) : PyTuple_GetItem(object, i), value))
      return false;
    if (to) to->push_back(value);
  }
  return true;
}

namespace {

// Reads one argument as its kind says, of which a capital letter takes None too: a tensor (t), an
// int (i), a float (f), a bool (b) or a list of ints (l).
bool read(char kind, PyObject* object, Value& value, Where& where) {
  using torch::stable::detail::from;
  const bool optional = kind < 'a';
  value.kind = Value::kNone;
  if (object == python.none) return optional;
  value.kind = Value::kNumber;
  switch (kind | 0x20) {
    case 't':
      value.kind = Value::kTensor;
      value.tensor = plain_tensor(object, where);
      return value.tensor != nullptr;
    case 'i': {
      int64_t number;
      if (!read_integer(object, number)) return false;
      value.number = from(number);
      return true;
    }
    case 'f':
      if (!is_instance(object, python.real) && !is_instance(object, python.integer)) return false;
      value.number = from(PyFloat_AsDouble(object));
      if (!PyErr_Occurred()) return true;
      PyErr_Clear();
      return false;
    case 'b':
      if (object != python.yes && object != python.no) return false;
      value.number = from(object == python.yes);
      return true;
    default:
      value.kind = Value::kInts;
      value.ints = object;
      return read_integers(object, nullptr);
  }
}

}  // namespace

Where read_arguments(const Operation& op, PyObjects arguments, std::ptrdiff_t count,
                     Value* values) {
  const auto size = static_cast<std::ptrdiff_t>(op.kinds.size());
  if (count > size) return Where::kNowhere;
  Where where = Where::kNowhere;
  for (std::ptrdiff_t i = 0; i < size; ++i) {
    PyObject* argument = i < count ? arguments[i] : op.defaults[static_cast<size_t>(i)];
    if (argument == nullptr || !read(op.kinds[static_cast<size_t>(i)], argument, values[i], where))
      return Where::kNowhere;
  }
  return where == Where::kNowhere ? Where::kOnCpu : where;  // no tensors: native code still
}

namespace {

bool is_small(const Value* values, std::ptrdiff_t size) {
  constexpr int64_t small = 4096;
  int64_t elements = 0;
  for (std::ptrdiff_t i = 0; i < size; ++i) {
    int64_t own = 0;
    if (values[i].kind == Value::kTensor) aoti_torch_get_numel(values[i].tensor, &own);
    if ((elements += own) > small) return false;
  }
  return true;
}

// What the boxed function takes, and owns from here on.
StableIValue hand_over(char kind, const Value& value) {
  using torch::stable::detail::from;
  if (value.kind == Value::kNone) return from(std::nullopt);
  StableIValue result = value.number;
  if (value.kind == Value::kTensor) {
    AtenTensorHandle own;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(value.tensor, &own));
    result = reinterpret_cast<StableIValue>(own);
  } else if (value.kind == Value::kInts) {
    IntList ints;
    read_integers(value.ints, &ints);
    result = from(ints);
  }
  return kind < 'a' ? from(new StableIValue(result)) : result;
}

// Whether one of them requires a gradient, where gradients are wanted at all.
bool wants_gradient(const Operation& op, PyObjects arguments, std::ptrdiff_t count) {
  if (!aoti_torch_grad_mode_is_enabled()) return false;
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    if ((op.kinds[static_cast<size_t>(i)] | 0x20) != 't' || arguments[i] == python.none) continue;
    PyObject* requires_it = PyObject_GetAttr(arguments[i], python.requires_grad);
    if (requires_it == nullptr) PyErr_Clear();
    Py_DecRef(requires_it);
    if (requires_it != python.no) return true;
  }
  return false;
}

}  // namespace

// Python's function wraps what the handle has and leaves the handle.
PyObject* adopted(StableIValue value) {
  const Tensor owner(reinterpret_cast<AtenTensorHandle>(value));
  PyObject* capsule = PyCapsule_New(owner.get(), nullptr, nullptr);
  if (capsule == nullptr) return nullptr;
  PyObject* tensor = PyObject_CallFunctionObjArgs(python.adopt, capsule, nullptr);
  Py_DecRef(capsule);
  return tensor;
}

namespace {

void let_go(StableIValue output) {
  if (output != 0) Tensor(reinterpret_cast<AtenTensorHandle>(output));
}

// One tensor or a tuple of them. Those from `shown` on are None, for nobody asks for them, and
// those that a launcher has None for.
PyObject* results(const Operation& op, const StableIValue* stack, uint64_t shown) {
  const uint64_t outputs = op.outputs;
  if (op.first)
    for (uint64_t i = 1; i < outputs; ++i) let_go(stack[i]);
  if (op.first || outputs == 1) return adopted(stack[0]);
  PyObject* tuple = PyTuple_New(static_cast<std::ptrdiff_t>(outputs));
  for (uint64_t i = 0; tuple != nullptr && i < outputs; ++i) {
    PyObject* tensor = i < shown && stack[i] ? adopted(stack[i]) : answer(python.none);
    if (i >= shown) let_go(stack[i]);
    if (tensor == nullptr || PyTuple_SetItem(tuple, static_cast<std::ptrdiff_t>(i), tensor) != 0) {
      Py_DecRef(tuple);
      return nullptr;
    }
  }
  return tuple;
}

// Calls `function` and lets other threads of Python run meanwhile, but for a microsecond's work:
// that costs 0.1 µs. False where it fails: the long way fails the same way, and says why.
template <class Function>
bool run(bool alone, const Function& function) {
  void* thread = alone ? nullptr : PyEval_SaveThread();
  bool done;
  try {
    done = function();
  } catch (...) {
    done = false;
  }
  if (!alone) PyEval_RestoreThread(thread);
  return done;
}

bool run_on_cpu(const Operation& op, const Value* values, StableIValue* stack) {
  const size_t size = op.kinds.size();
  for (size_t i = 0; i < size; ++i) stack[i] = hand_over(op.kinds[i], values[i]);
  return run(is_small(values, static_cast<std::ptrdiff_t>(size)), [&] {
    op.function(stack, size, op.outputs);
    return true;
  });
}

bool run_on_gpu(const Operation& op, const Value* values, StableIValue* stack) {
  const ReplayKey key = replay_key(op, values);
  return run(false,
             [&] { return replay(op.number, key, reinterpret_cast<AtenTensorHandle*>(stack)); });
}

PyObject* call_operation(const Operation& op, PyObjects arguments, std::ptrdiff_t count) {
  Value values[kMostArguments];
  const Where where = read_arguments(op, arguments, count, values);
  if (where == Where::kNowhere) return answer(python.declined);
  const bool wanted = wants_gradient(op, arguments, count);
  const Backward* backward = wanted ? backward_of(op, values) : nullptr;
  if (wanted && !backward) return answer(python.wants_gradient);
  if (!nobody_watches()) return answer(wanted ? python.wants_gradient : python.declined);
  const auto run_kernel = where == Where::kOnGpu ? &run_on_gpu : &run_on_cpu;
  StableIValue stack[kMostArguments];
  const FirstOutputAlone enough(op.first && !wanted);  // a node keeps the others
  if (!wanted)
    return run_kernel(op, values, stack) ? results(op, stack, op.outputs) : answer(python.declined);
  aoti_torch_grad_mode_set_enabled(false);  // the kernel may call operations of torch's
  const bool done = run_kernel(op, values, stack);
  aoti_torch_grad_mode_set_enabled(true);
  if (!done) return answer(python.wants_gradient);
  const auto shown = static_cast<uint64_t>(backward->shown);
  if (record(op, *backward, values, stack)) return results(op, stack, shown);
  for (uint64_t i = 0; i < op.outputs; ++i) let_go(stack[i]);
  // Hooks count their calls (torch.utils.checkpoint): an error of theirs is the call's.
  return PyErr_Occurred() ? nullptr : answer(python.wants_gradient);
}

PyObject* call(PyObject* self, PyObjects arguments, std::ptrdiff_t count) {
  try {
    const void* op = PyCapsule_GetPointer(self, kOperation);
    return call_operation(*static_cast<const Operation*>(op), arguments, count);
  } catch (...) {  // no memory for a handle or a list
    return answer(python.declined);
  }
}

}  // namespace
}  // namespace nnarch

#define NNARCH_EXPORT extern "C" __attribute__((visibility("default")))

// `objects`: what Setup names, in its order; `watched`: in threes, a function, what it returns
// while nobody watches, and its excuse. All of it is kept.
NNARCH_EXPORT void nnarch_direct_setup(PyObject* objects, PyObject* watched, int64_t impl_offset,
                                       int64_t keys_offset, uint64_t keys, uint64_t other_keys) {
  using nnarch::python;
  Py_IncRef(objects);
  Py_IncRef(watched);
  std::ptrdiff_t at = 0;
  for (PyObject** member :
       {&python.tensor, &python.parameter, &python.integer, &python.real, &python.tuple,
        &python.list, &python.size, &python.none, &python.yes, &python.no, &python.declined,
        &python.wants_gradient, &python.adopt, &python.requires_grad})
    *member = PyTuple_GetItem(objects, at++);
  python.watched.clear();
  for (std::ptrdiff_t i = 0; i + 2 < PyTuple_Size(watched); i += 3)
    python.watched.push_back({PyTuple_GetItem(watched, i), PyTuple_GetItem(watched, i + 1),
                              PyTuple_GetItem(watched, i + 2)});
  python.impl_offset = impl_offset;
  python.keys_offset = keys_offset;
  python.keys[0] = keys;
  python.keys[1] = other_keys;
}

// The function of the operation with this number; null, with Python's error set, without memory.
// `defaults` has an object an argument, of which those that have to be given are not read. With
// `first` it hands out the first output alone: another one costs half a microsecond.
NNARCH_EXPORT PyObject* nnarch_direct_function(int64_t number, const char* kinds,
                                               PyObject* defaults, int64_t required,
                                               int64_t outputs, int64_t first) {
  using namespace nnarch;
  const auto size = static_cast<int64_t>(std::strlen(kinds));
  if (size > kMostArguments || outputs > kMostOutputs) return answer(python.none);
  // Never freed: the function lives as long as the module that declares the operation.
  auto* op = new Operation{number,
                           boxed_ops().at(static_cast<size_t>(number)),
                           kinds,
                           {},
                           static_cast<uint64_t>(outputs),
                           first != 0,
                           {"direct", &call, kFastCall, nullptr}};
  Py_IncRef(defaults);
  for (int64_t i = 0; i < size; ++i)
    op->defaults.push_back(i < required ? nullptr : PyTuple_GetItem(defaults, i));
  PyObject* self = PyCapsule_New(op, kOperation, nullptr);
  if (self == nullptr) return nullptr;
  PyObject* function = PyCFunction_NewEx(&op->method, self, nullptr);
  Py_DecRef(self);
  return function;
}
