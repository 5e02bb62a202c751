// The backward of operations that are called directly: nodes of nodes/nodes.cpp where that library
// is there. See docs/adr/0012-nodes.md.
#include <cstring>

#include "cpu/direct_call.h"
#include "gpu/replay.h"

namespace nnarch {
namespace {

SetUpNodes set_up_nodes = nullptr;
RecordNode record_node = nullptr;

constexpr int kMostArguments = 24, kMostInts = 64;

bool holds(const Backward::Condition& condition, const Value* values) {
  using torch::stable::detail::to;
  const Value& value = values[condition.argument];
  const bool is_number = value.kind == Value::kNumber;
  const bool is_given = value.kind != Value::kNone && !(is_number && value.number == 0);
  switch (condition.is) {
    case Backward::Condition::kOneOf: {
      const auto number = is_number ? to<int64_t>(value.number) : -1;
      return number >= 0 && number < 63 && (condition.bits >> number & 1);
    }
    default:
      return is_given == (condition.is == Backward::Condition::kGiven);
  }
}

PyObject* constant(PyObject* object) {
  Py_IncRef(object);
  return object;
}

PyObject* list_of(const int64_t* ints, int64_t size) {
  PyObject* tuple = PyTuple_New(size);
  for (int64_t i = 0; tuple != nullptr && i < size; ++i) {
    PyObject* item = PyLong_FromLongLong(ints[i]);
    if (item != nullptr && PyTuple_SetItem(tuple, i, item) == 0) continue;
    Py_DecRef(tuple);
    return nullptr;
  }
  return tuple;
}

// What Python has for an argument of a backward.
PyObject* argument(const Backward::Argument& of, const Given& value) {
  using torch::stable::detail::to;
  if (of.source == Backward::kNone) return constant(python.none);
  switch (of.kind | 0x20) {
    case 't': {
      if (value.tensor == nullptr) return constant(python.none);
      AtenTensorHandle own;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(value.tensor, &own));
      return adopted(reinterpret_cast<StableIValue>(own));
    }
    case 'i':
      return PyLong_FromLongLong(to<int64_t>(value.number));
    case 'f':
      return PyFloat_FromDouble(to<double>(value.number));
    case 'l':
      return list_of(value.ints, value.size);
    default:
      return constant(value.number != 0 ? python.yes : python.no);
  }
}

// A handle of its own of what a formula returned; null for None, false for anything else.
bool take_result(PyObject* object, AtenTensorHandle* handle) {
  *handle = nullptr;
  if (object == python.none) return true;
  if (PyObject_IsInstance(object, python.tensor) != 1) return false;
  char* place = reinterpret_cast<char*>(object) + python.impl_offset;
  return aoti_torch_new_tensor_handle(reinterpret_cast<AtenTensorHandle>(place), handle) == 0;
}

std::string text(PyObject* object) {
  const char* characters = object ? PyUnicode_AsUTF8AndSize(object, nullptr) : nullptr;
  const std::string copy = characters ? characters : "";
  if (object) Py_DecRef(object);
  PyErr_Clear();
  return copy;
}

std::string raised() {
  PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
  PyErr_Fetch(&type, &value, &traceback);
  if (type == nullptr) return "RuntimeError: the formula of a backward returned no tensors";
  const std::string error = text(PyObject_GetAttrString(type, "__name__")) + ": " +
                            (value ? text(PyObject_Str(value)) : "");
  for (PyObject* object : {type, value, traceback})
    if (object) Py_DecRef(object);
  return error;
}

bool call_formula_with_lock(const Backward& backward, const Given* given,
                            AtenTensorHandle* results) {
  const auto size = static_cast<std::ptrdiff_t>(backward.arguments.size());
  PyObject* arguments = PyTuple_New(size);
  for (std::ptrdiff_t a = 0; a < size; ++a) {
    PyObject* value = argument(backward.arguments[static_cast<size_t>(a)], given[a]);
    if (value == nullptr || PyTuple_SetItem(arguments, a, value) != 0) {
      Py_DecRef(arguments);
      return false;
    }
  }
  PyObject* tuple = PyObject_CallObject(static_cast<PyObject*>(backward.formula), arguments);
  Py_DecRef(arguments);
  bool done = tuple != nullptr && PyTuple_Size(tuple) == backward.results;
  for (int64_t r = 0; done && r < backward.results; ++r)
    done = take_result(PyTuple_GetItem(tuple, r), &results[r]);
  if (tuple) Py_DecRef(tuple);
  return done;
}

bool call_formula(const Backward& backward, const Given* arguments, AtenTensorHandle* results,
                  std::string* error) {
  const int lock = PyGILState_Ensure();
  bool done = false;
  try {
    done = call_formula_with_lock(backward, arguments, results);
    if (!done) *error = raised();
  } catch (const std::exception& e) {
    *error = e.what();
  }
  PyGILState_Release(lock);
  return done;
}

}  // namespace

const Backward* backward_of(const Operation& op, const Value* values) {
  for (const auto& backward : op.backwards) {
    bool suits = true;
    for (const auto& condition : backward->conditions) suits = suits && holds(condition, values);
    if (suits) return backward.get();
  }
  return nullptr;
}

bool record(const Operation& op, const Backward& backward, const Value* values,
            const StableIValue* outputs) {
  Given arguments[kMostArguments];
  AtenTensorHandle results[kMostArguments];
  IntList ints;  // of all lists
  ints.reserve(kMostInts);
  for (size_t i = 0; i < op.kinds.size(); ++i) {
    const Value& value = values[i];
    Given& to = arguments[i];
    if (value.kind == Value::kTensor) to.tensor = value.tensor;
    if (value.kind == Value::kNumber) to.number = value.number;
    if (value.kind != Value::kInts) continue;
    const size_t first = ints.size();
    read_integers(value.ints, &ints);
    if (ints.size() > kMostInts) return false;
    to.ints = ints.data() + first;
    to.size = static_cast<int64_t>(ints.size() - first);
  }
  for (uint64_t o = 0; o < op.outputs; ++o)
    results[o] = reinterpret_cast<AtenTensorHandle>(outputs[o]);
  try {
    return record_node(backward, arguments, results);
  } catch (...) {  // where a hook on saved tensors raised, Python's error is set
    return false;
  }
}

}  // namespace nnarch

#define NNARCH_EXPORT extern "C" __attribute__((visibility("default")))

// The functions of the library of nodes.
NNARCH_EXPORT void nnarch_direct_nodes(void* set_up, void* record) {
  using namespace nnarch;
  set_up_nodes = reinterpret_cast<SetUpNodes>(set_up);
  record_node = reinterpret_cast<RecordNode>(record);
  set_up_nodes(python.keys[0], python.keys[1], {&call_formula, &is_plain_on_gpu, &replay_backward});
}

// Gives a direct function a backward: `number` is its operation's, of `arguments` 3 numbers each
// (source, index, kind), of `edges` 3 (input, result, bit), of `conditions` 3 (what, argument,
// bits); then as in cpu/nodes.h.
NNARCH_EXPORT void nnarch_direct_backward(PyObject* function, const char* name, int64_t number,
                                          const int64_t* arguments, int64_t argument_count,
                                          const int64_t* edges, int64_t edge_count, int64_t results,
                                          int64_t seen, int64_t shown, const int64_t* conditions,
                                          int64_t condition_count, PyObject* formula) {
  using namespace nnarch;
  if (argument_count > kMostBackwardArguments || results > kMostBackwardResults) return;
  auto* op =
      static_cast<Operation*>(PyCapsule_GetPointer(PyCFunction_GetSelf(function), kOperation));
  auto backward = std::make_unique<Backward>();
  backward->name = name;
  backward->number = number;
  backward->function = boxed_ops().at(static_cast<size_t>(number));
  for (int64_t a = 0; a < 3 * argument_count; a += 3)
    backward->arguments.push_back({static_cast<Backward::Source>(arguments[a]), arguments[a + 1],
                                   static_cast<char>(arguments[a + 2])});
  for (int64_t e = 0; e < 3 * edge_count; e += 3)
    backward->edges.push_back({edges[e], edges[e + 1], edges[e + 2]});
  backward->results = results;
  backward->seen = seen;
  backward->shown = shown;
  for (int64_t c = 0; c < 3 * condition_count; c += 3)
    backward->conditions.push_back({static_cast<Backward::Condition::Is>(conditions[c]),
                                    conditions[c + 1], conditions[c + 2]});
  Py_IncRef(formula);
  backward->formula = formula;
  op->backwards.push_back(std::move(backward));
}
