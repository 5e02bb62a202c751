#include "gpu/replay.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <string_view>
#include <unordered_map>

#include "cpu/machine.h"
#include "gpu/replay_plan.h"

namespace nnarch {
namespace {

// What a call on a GPU is known by, beside its arguments.
struct {
  uint64_t keys[2] = {};            // dispatch keys of plain tensors
  std::vector<PyObject*> settings;  // functions, each of which returns a string
} torch_there;

// -------------------------------------------------------------------------------- where it is kept

struct Hash {
  using is_transparent = void;
  size_t operator()(std::string_view bytes) const { return std::hash<std::string_view>{}(bytes); }
};
using Plans = std::unordered_map<std::string, std::shared_ptr<const Replay>, Hash, std::equal_to<>>;

std::mutex plans_mutex;
// By the operation's number. Never freed: Python may be gone before.
auto& plans = *new std::unordered_map<int64_t, Plans>;

std::shared_ptr<const Replay> find(int64_t operation, const std::string& key) {
  const std::lock_guard<std::mutex> lock(plans_mutex);
  const auto of = plans.find(operation);
  if (of == plans.end()) return nullptr;
  const auto found = of->second.find(std::string_view(key));
  return found == of->second.end() ? nullptr : found->second;
}

}  // namespace

// -------------------------------------------------------------------------------------- the key

void ReplayKey::ints(const int64_t* values, int64_t size) {
  word(size);
  bytes_.append(reinterpret_cast<const char*>(values), static_cast<size_t>(size) * sizeof(int64_t));
}

void ReplayKey::tensor(AtenTensorHandle t) {
  int64_t dims, *sizes, *strides;
  int32_t dtype, device;
  void* data;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t, &dims));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t, &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t, &strides));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t, &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t, &data));
  // One tensor for two arguments is one in the plan: a handle's first word is its TensorImpl.
  const auto impl = [](AtenTensorHandle handle) { return *reinterpret_cast<void**>(handle); };
  const int64_t same = std::find_if(inputs_.begin(), inputs_.end(),
                                    [&](auto other) { return impl(other) == impl(t); }) -
                       inputs_.begin();
  const auto alignment = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) & 15);
  word(dtype | static_cast<uint8_t>(device) << 8 | alignment << 16 | same << 24);
  ints(sizes, dims);
  ints(strides, dims);
  exact_ = exact_ || dtype == aoti_torch_dtype_float32();
  inputs_.push_back(t);
}

void ReplayKey::settings() {
  if (!exact_) return;
  word(static_cast<int64_t>(precision()));
  for (PyObject* function : torch_there.settings) {
    PyObject* result = PyObject_CallNoArgs(function);
    const char* text = result ? PyUnicode_AsUTF8AndSize(result, nullptr) : nullptr;
    if (text) bytes_.append(text);
    bytes_.push_back(';');
    if (result) Py_DecRef(result);
    PyErr_Clear();
  }
}

ReplayKey replay_key(const Operation& op, const Value* values) {
  ReplayKey key;
  for (size_t i = 0; i < op.kinds.size(); ++i) {
    const Value& value = values[i];
    if (value.kind == Value::kNone) key.none();
    if (value.kind == Value::kTensor) key.tensor(value.tensor);
    if (value.kind == Value::kNumber) key.number(value.number);
    if (value.kind != Value::kInts) continue;
    IntList ints;
    read_integers(value.ints, &ints);
    key.ints(ints.data(), static_cast<int64_t>(ints.size()));
  }
  key.settings();
  return key;
}

bool is_plain_on_gpu(uint64_t keys) {
  return driver.launch != nullptr && (keys == torch_there.keys[0] || keys == torch_there.keys[1]);
}

bool replay(int64_t operation, const ReplayKey& key, AtenTensorHandle* results) {
  const auto found = find(operation, key.bytes());
  return found && found->run(key.inputs(), results);
}

bool replay_backward(const Backward& backward, const Given* arguments, AtenTensorHandle* results) {
  ReplayKey key;
  for (size_t a = 0; a < backward.arguments.size(); ++a) {
    const Given& given = arguments[a];
    switch (backward.arguments[a].kind | 0x20) {
      case 't':
        given.tensor ? key.tensor(given.tensor) : key.none();
        break;
      case 'l':
        key.ints(given.ints, given.size);
        break;
      default:
        key.number(given.number);
    }
  }
  if (key.has_settings()) {
    const int lock = PyGILState_Ensure();
    key.settings();
    PyGILState_Release(lock);
  }
  return replay(backward.number, key, results);
}

}  // namespace nnarch

#define NNARCH_EXPORT extern "C" __attribute__((visibility("default")))

// Functions of CUDA's driver and of torch's, the dispatch keys of plain tensors there, and a tuple
// of functions that return settings as strings, which is kept. Null functions: no more replays.
NNARCH_EXPORT void nnarch_replay_setup(void* launch, void* launch_cooperative, void* current_device,
                                       void* current_stream, void* describe, uint64_t keys,
                                       uint64_t other_keys, PyObject* settings) {
  using nnarch::driver, nnarch::torch_there;
  Py_IncRef(settings);
  driver.launch = reinterpret_cast<decltype(driver.launch)>(launch);
  driver.launch_cooperative =
      reinterpret_cast<decltype(driver.launch_cooperative)>(launch_cooperative);
  driver.current_device = reinterpret_cast<decltype(driver.current_device)>(current_device);
  driver.current_stream = reinterpret_cast<decltype(driver.current_stream)>(current_stream);
  driver.describe = reinterpret_cast<decltype(driver.describe)>(describe);
  torch_there.keys[0] = keys;
  torch_there.keys[1] = other_keys;
  torch_there.settings.clear();
  for (std::ptrdiff_t i = 0; i < PyTuple_Size(settings); ++i)
    torch_there.settings.push_back(PyTuple_GetItem(settings, i));
}

// Keeps a plan for calls like this one of a direct function: `words` as replay.py writes them, and
// an object that is kept with it. False where its arguments are not plain.
NNARCH_EXPORT bool nnarch_replay_give(PyObject* function, PyObject* arguments, const int64_t* words,
                                      PyObject* kept, int64_t limit) {
  using namespace nnarch;
  const auto* op = static_cast<const Operation*>(
      PyCapsule_GetPointer(PyCFunction_GetSelf(function), kOperation));
  std::vector<PyObject*> given;
  for (std::ptrdiff_t i = 0; i < PyTuple_Size(arguments); ++i)
    given.push_back(PyTuple_GetItem(arguments, i));
  std::vector<Value> values(op->kinds.size());
  if (read_arguments(*op, given.data(), std::ssize(given), values.data()) != Where::kOnGpu)
    return false;
  const ReplayKey key = replay_key(*op, values.data());
  auto plan = std::make_shared<const Replay>(words, kept);
  if (plan->results.size() != op->outputs) return false;
  Plans dropped;  // dropped without the lock, as a plan that is replaced: Python may run then
  const std::lock_guard<std::mutex> lock(plans_mutex);
  Plans& of = plans[op->number];
  if (std::ssize(of) >= limit) dropped.swap(of);
  of[key.bytes()].swap(plan);
  return true;
}

NNARCH_EXPORT void nnarch_replay_forget() {
  using namespace nnarch;
  std::unordered_map<int64_t, Plans> dropped;
  const std::lock_guard<std::mutex> lock(plans_mutex);
  dropped.swap(plans);
}
