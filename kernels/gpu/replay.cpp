#include "gpu/replay.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>

#include "cpu/machine.h"

namespace nnarch {
namespace {

using torch::stable::Tensor;

// Functions of CUDA's driver, and torch's of the current stream.
struct {
  int (*launch)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                unsigned shared, void* stream, void** parameters, void** extra) = nullptr;
  int (*launch_cooperative)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned,
                            unsigned, unsigned shared, void* stream, void** parameters) = nullptr;
  int (*current_device)(int*) = nullptr;
  AOTITorchError (*current_stream)(int32_t device, void** stream) = nullptr;
  int (*describe)(void* descriptor, int type, uint32_t rank, void* start, const uint64_t* sizes,
                  const uint64_t* strides, const uint32_t* box, const uint32_t* every,
                  int interleave, int swizzle, int promotion, int fill) = nullptr;
  uint64_t keys[2] = {};
  std::vector<PyObject*> settings;  // functions, each of which returns a string
} cuda;

// ---------------------------------------------------------------------------------- what is run

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
struct alignas(64) Descriptor {
  unsigned char bytes[128];
};

struct Launch {
  void* function;
  unsigned grid[3], threads, shared;
  bool cooperative;
  std::vector<uint64_t> parameters;  // numbers, each in its first bytes
  std::vector<std::pair<size_t, Place>> pointers;
  std::vector<Description> descriptions;
};

class Memory {
 public:
  explicit Memory(const std::vector<AtenTensorHandle>& inputs) : handles_(inputs) {
    for (AtenTensorHandle t : inputs) pointers_.push_back(pointer_of(t));
  }

  uint64_t at(const Place& place) const {
    return pointers_[place.slot] + static_cast<uint64_t>(place.offset);
  }

  // A handle of its own of a tensor.
  AtenTensorHandle view(const View& view) const {
    AtenTensorHandle result;
    const AtenTensorHandle base = handles_[view.place.slot];
    if (view.whole) {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(base, &result));
      return result;
    }
    int64_t start;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(base, &start));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
        base, static_cast<int64_t>(view.sizes.size()), view.sizes.data(), view.strides.data(),
        start + view.elements, &result));
    return result;
  }

  void run(const Allocate& step) {
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(step.sizes.size()), step.sizes.data(), step.strides.data(), step.dtype,
        step.device_type, step.device, &handle));
    owned_.emplace_back(handle);
    handles_.push_back(handle);
    pointers_.push_back(pointer_of(handle));
    if (step.content == Allocate::kZeros) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(handle));
    if (step.content != Allocate::kCopy) return;
    const Tensor source(view(step.source));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(handle, source.get(), 0));
  }

  void run(const Launch& step) const {
    std::vector<uint64_t> values = step.parameters;
    for (const auto& [parameter, place] : step.pointers) values[parameter] = at(place);
    std::vector<void*> parameters;
    parameters.reserve(values.size());
    for (uint64_t& value : values) parameters.push_back(&value);
    std::vector<Descriptor> descriptors(step.descriptions.size());
    for (size_t d = 0; d < descriptors.size(); ++d) {
      describe(step.descriptions[d], &descriptors[d]);
      parameters[step.descriptions[d].parameter] = &descriptors[d];
    }
    const auto [x, y, z] = step.grid;
    const int failed = step.cooperative
                           ? cuda.launch_cooperative(step.function, x, y, z, step.threads, 1, 1,
                                                     step.shared, stream_, parameters.data())
                           : cuda.launch(step.function, x, y, z, step.threads, 1, 1, step.shared,
                                         stream_, parameters.data(), nullptr);
    if (failed) throw std::runtime_error("a kernel does not launch");
  }

  // False where the tensors' device is not the current one.
  bool find_stream() {
    int32_t device;
    int current = -1;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handles_.front(), &device));
    if (cuda.current_device(&current) != 0 || current != device) return false;
    return cuda.current_stream(device, &stream_) == 0;
  }

 private:
  void describe(const Description& d, Descriptor* to) const {
    constexpr int kNotInterleaved = 0, kPromoteTo128Bytes = 2;
    constexpr uint32_t kEvery[] = {1, 1, 1, 1, 1};
    const int failed =
        cuda.describe(to, d.type, static_cast<uint32_t>(d.sizes.size()),
                      reinterpret_cast<void*>(at(d.place)), d.sizes.data(), d.strides.data(),
                      d.box.data(), kEvery, kNotInterleaved, d.swizzle, kPromoteTo128Bytes, d.fill);
    if (failed) throw std::runtime_error("a tensor has no descriptor");
  }

  static uint64_t pointer_of(AtenTensorHandle t) {
    void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t, &data));
    return reinterpret_cast<uint64_t>(data);
  }

  std::vector<AtenTensorHandle> handles_;
  std::vector<uint64_t> pointers_;
  std::vector<Tensor> owned_;
  void* stream_ = nullptr;
};

struct Replay {
  std::vector<std::variant<Allocate, Launch>> steps;
  std::vector<std::pair<bool, View>> results;  // whether there is one
  PyObject* kept = nullptr;                    // keeps the kernels loaded

  Replay() = default;
  Replay(const Replay&) = delete;
  ~Replay() {
    const int lock = PyGILState_Ensure();
    Py_DecRef(kept);
    PyGILState_Release(lock);
  }

  bool run(const std::vector<AtenTensorHandle>& inputs, AtenTensorHandle* to) const {
    Memory memory(inputs);
    if (!memory.find_stream()) return false;
    for (const auto& step : steps) std::visit([&](const auto& s) { memory.run(s); }, step);
    for (const auto& [given, view] : results) *to++ = given ? memory.view(view) : nullptr;
    return true;
  }
};

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

// --------------------------------------------------------------------------- from Python's words

// The numbers that replay.py writes, one after the other.
class Words {
 public:
  explicit Words(const int64_t* words) : at_(words) {}

  int64_t next() { return *at_++; }
  template <class Ints = IntList>
  Ints list() {
    const int64_t size = next();
    Ints result(at_, at_ + size);
    at_ += size;
    return result;
  }
  Place place() {
    const auto slot = static_cast<size_t>(next());
    return {slot, next()};
  }
  View view() {
    View v;
    v.place = place();
    v.whole = next() != 0;
    v.elements = next();
    v.sizes = list();
    v.strides = list();
    return v;
  }
  Allocate allocate() {
    Allocate step;
    step.content = static_cast<Allocate::Content>(next());
    step.dtype = static_cast<int32_t>(next());
    step.device_type = static_cast<int32_t>(next());
    step.device = static_cast<int32_t>(next());
    step.sizes = list();
    step.strides = list();
    if (step.content == Allocate::kCopy) step.source = view();
    return step;
  }
  Launch launch() {
    Launch step;
    step.function = reinterpret_cast<void*>(next());
    for (unsigned& programs : step.grid) programs = static_cast<unsigned>(next());
    step.threads = static_cast<unsigned>(next());
    step.shared = static_cast<unsigned>(next());
    step.cooperative = next() != 0;
    step.parameters = list<std::vector<uint64_t>>();
    for (int64_t count = next(); count > 0; --count) {
      const auto parameter = static_cast<size_t>(next());
      step.pointers.emplace_back(parameter, place());
    }
    for (int64_t count = next(); count > 0; --count) step.descriptions.push_back(description());
    return step;
  }
  Description description() {
    Description d;
    d.parameter = static_cast<size_t>(next());
    d.place = place();
    for (int* number : {&d.type, &d.swizzle, &d.fill}) *number = static_cast<int>(next());
    d.sizes = list<std::vector<uint64_t>>();
    d.strides = list<std::vector<uint64_t>>();
    d.box = list<std::vector<uint32_t>>();
    return d;
  }

 private:
  const int64_t* at_;
};

std::shared_ptr<const Replay> decoded(const int64_t* numbers, PyObject* kept) {
  Words words(numbers);
  auto replay = std::make_shared<Replay>();
  for (int64_t steps = words.next(); steps > 0; --steps) {
    if (words.next() == 0)
      replay->steps.emplace_back(words.allocate());
    else
      replay->steps.emplace_back(words.launch());
  }
  for (int64_t results = words.next(); results > 0; --results) {
    const bool given = words.next() != 0;
    replay->results.emplace_back(given, given ? words.view() : View{});
  }
  Py_IncRef(kept);
  replay->kept = kept;
  return replay;
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
  for (PyObject* function : cuda.settings) {
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
  return cuda.launch != nullptr && (keys == cuda.keys[0] || keys == cuda.keys[1]);
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
  using nnarch::cuda;
  Py_IncRef(settings);
  cuda.launch = reinterpret_cast<decltype(cuda.launch)>(launch);
  cuda.launch_cooperative = reinterpret_cast<decltype(cuda.launch_cooperative)>(launch_cooperative);
  cuda.current_device = reinterpret_cast<decltype(cuda.current_device)>(current_device);
  cuda.current_stream = reinterpret_cast<decltype(cuda.current_stream)>(current_stream);
  cuda.describe = reinterpret_cast<decltype(cuda.describe)>(describe);
  cuda.keys[0] = keys;
  cuda.keys[1] = other_keys;
  cuda.settings.clear();
  for (std::ptrdiff_t i = 0; i < PyTuple_Size(settings); ++i)
    cuda.settings.push_back(PyTuple_GetItem(settings, i));
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
  std::shared_ptr<const Replay> plan = decoded(words, kept);
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
