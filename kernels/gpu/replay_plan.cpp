#include "gpu/replay_plan.h"

#include <stdexcept>

namespace nnarch {

Driver driver;

namespace {

using torch::stable::Tensor;

// ---------------------------------------------------------------------------------------- running

struct alignas(64) Descriptor {
  unsigned char bytes[128];
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
                           ? driver.launch_cooperative(step.function, x, y, z, step.threads, 1, 1,
                                                       step.shared, stream_, parameters.data())
                           : driver.launch(step.function, x, y, z, step.threads, 1, 1, step.shared,
                                           stream_, parameters.data(), nullptr);
    if (failed) throw std::runtime_error("a kernel does not launch");
  }

  // False where the tensors' device is not the current one.
  bool find_stream() {
    int32_t device;
    int current = -1;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handles_.front(), &device));
    if (driver.current_device(&current) != 0 || current != device) return false;
    return driver.current_stream(device, &stream_) == 0;
  }

 private:
  void describe(const Description& d, Descriptor* to) const {
    constexpr int kNotInterleaved = 0, kPromoteTo128Bytes = 2;
    constexpr uint32_t kEvery[] = {1, 1, 1, 1, 1};
    const int failed = driver.describe(to, d.type, static_cast<uint32_t>(d.sizes.size()),
                                       reinterpret_cast<void*>(at(d.place)), d.sizes.data(),
                                       d.strides.data(), d.box.data(), kEvery, kNotInterleaved,
                                       d.swizzle, kPromoteTo128Bytes, d.fill);
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

// ---------------------------------------------------------------------------- from Python's words

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

}  // namespace

Replay::Replay(const int64_t* numbers, PyObject* keep) : kept(keep) {
  Words words(numbers);
  for (int64_t count = words.next(); count > 0; --count) {
    if (words.next() == 0)
      steps.emplace_back(words.allocate());
    else
      steps.emplace_back(words.launch());
  }
  for (int64_t count = words.next(); count > 0; --count) {
    const bool given = words.next() != 0;
    results.emplace_back(given, given ? words.view() : View{});
  }
  Py_IncRef(kept);
}

Replay::~Replay() {
  const int lock = PyGILState_Ensure();
  Py_DecRef(kept);
  PyGILState_Release(lock);
}

bool Replay::run(const std::vector<AtenTensorHandle>& inputs, AtenTensorHandle* to) const {
  Memory memory(inputs);
  if (!memory.find_stream()) return false;
  for (const auto& step : steps) std::visit([&](const auto& s) { memory.run(s); }, step);
  for (const auto& [given, view] : results) *to++ = given ? memory.view(view) : nullptr;
  return true;
}

}  // namespace nnarch
