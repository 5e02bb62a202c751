// A sequence of operations that was recorded once, run in one call. Between two kernels of a small
// network Python, the dispatcher and the checks of modules take longer than many a kernel.
//
// The code is a list of integers, written by nnarch/accelerate/program.py:
//
//     number of values
//     then for every instruction:
//       operation, number of arguments, the arguments, number of outputs, the values they become,
//       number of values that nothing reads any more, those values
//     kEnd, number of results, the values they are
//
// Values are numbered: first the inputs, then what instructions make. Constants have numbers of
// their own. An operation is the number of one of ours, whose function is called directly, or
// kTorch and the name of one of torch's, which goes through its dispatcher; kView, kAdd and
// kChannelsLast are those of torch's that have a shorter way, or no other: the dispatcher takes no
// number of any type, which the factor of an addition is. kFromAnyFormat stands before a
// convolution whose output is channels_last whatever its input is.
//
// A program keeps its constants here: handing 170 weights over from Python took 60 µs a call.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cpu/registry.h"
#include "cpu/tensor.h"

namespace nnarch {
namespace {

// In the place of an operation.
constexpr int64_t kEnd = -1, kView = -2, kTorch = -3, kAdd = -4, kChannelsLast = -5,
                  kFromAnyFormat = -6;

enum Kind : int64_t {
  kNothing,
  kSome,  // an optional argument that is there: its own kind follows
  kValue,
  kConstant,
  kTensors,  // values or constants, each with its kind
  kInt,
  kDouble,
  kInts,
  kMemoryFormat
};
constexpr torch::headeronly::MemoryFormat kMemoryFormats[] = {
    torch::headeronly::MemoryFormat::Contiguous, torch::headeronly::MemoryFormat::ChannelsLast,
    torch::headeronly::MemoryFormat::Preserve};

// A recorded program, and what it can see itself of a change of its constants.
struct Recording {
  struct Probe {
    const void* address;
    size_t size;
    uint64_t bits;
  };
  std::vector<Tensor> constants;
  std::vector<int64_t> code;
  std::vector<Probe> probes;    // elements of weights that were packed
  std::vector<int64_t> places;  // where constants lie, and their strides

  // A parameter's data may be exchanged for other data: its version says nothing then.
  bool is_current() const {
    if (places_of(constants) != places) return false;
    bool same = true;  // only now: the addresses are valid as long as nothing has moved
    for (const Probe& probe : probes) {  // all of them: these loads do not wait for each other
      uint64_t now = 0;
      std::memcpy(&now, probe.address, probe.size);
      same &= now == probe.bits;
    }
    return same;
  }

  static std::vector<int64_t> places_of(const std::vector<Tensor>& tensors) {
    std::vector<int64_t> places;
    places.reserve(5 * tensors.size());
    for (const Tensor& t : tensors) {
      places.push_back(static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data_ptr())));
      for (const int64_t stride : t.strides()) places.push_back(stride);
    }
    return places;
  }
};

class Program {
 public:
  Program(const std::vector<Tensor>& inputs, const Recording& recording)
      : at_(recording.code.data()),
        end_(at_ + recording.code.size()),
        constants_(recording.constants),
        values_(inputs.begin(), inputs.end()) {
    values_.resize(static_cast<size_t>(next()));
  }

  std::vector<Tensor> run() {
    for (int64_t op = next(); op != kEnd; op = next()) {
      if (op == kView)
        view();
      else if (op == kAdd)
        add();
      else if (op == kChannelsLast)
        channels_last();
      else if (op == kFromAnyFormat)
        call_from_any_format();
      else if (op == kTorch)
        call_torch();
      else
        call(op);
      for (int64_t count = next(); count > 0; --count) value(next()).reset();
    }
    std::vector<Tensor> results;
    for (int64_t count = next(); count > 0; --count) results.push_back(made_value());
    return results;
  }

 private:
  int64_t next() {
    require(at_ < end_, "run_program: the code ends early");
    return *at_++;
  }

  std::optional<Tensor>& value(int64_t i) {
    require(i >= 0 && i < static_cast<int64_t>(values_.size()), "run_program: no such value");
    return values_[static_cast<size_t>(i)];
  }

  const Tensor& made_value() {
    const std::optional<Tensor>& t = value(next());
    require(t.has_value(), "run_program: a value is read before it is made");
    return *t;
  }

  const Tensor& constant() {
    const int64_t i = next();
    require(i >= 0 && i < static_cast<int64_t>(constants_.size()), "run_program: no such constant");
    return constants_[static_cast<size_t>(i)];
  }

  IntList ints() {
    IntList list;
    for (int64_t count = next(); count > 0; --count) list.push_back(next());
    return list;
  }

  double number() {
    const int64_t bits = next();
    double number;
    static_assert(sizeof(number) == sizeof(bits));
    std::memcpy(&number, &bits, sizeof(number));
    return number;
  }

  std::string text() {
    std::string s;
    for (int64_t count = next(); count > 0; --count) s.push_back(static_cast<char>(next()));
    return s;
  }

  const Tensor& tensor() {
    const int64_t kind = next();
    require(kind == kValue || kind == kConstant, "run_program: no tensor where one is needed");
    return kind == kValue ? made_value() : constant();
  }

  std::vector<Tensor> tensors() {
    std::vector<Tensor> list;
    for (int64_t count = next(); count > 0; --count) list.push_back(tensor());
    return list;
  }

  torch::headeronly::MemoryFormat memory_format() {
    const int64_t i = next();
    require(i >= 0 && i < std::ssize(kMemoryFormats), "run_program: no such memory format");
    return kMemoryFormats[i];
  }

  StableIValue argument() {
    using torch::stable::detail::from;
    switch (next()) {
      case kNothing:
        return from(std::nullopt);
      case kSome:  // what `from` makes of an optional; the callee frees it
        return from(new StableIValue(argument()));
      case kValue:
        return from(made_value());
      case kConstant:
        return from(constant());
      case kTensors:
        return from(tensors());
      case kInt:
        return from(next());
      case kDouble:
        return from(number());
      case kInts:
        return from(ints());
      case kMemoryFormat:
        return from(memory_format());
      default:
        throw std::runtime_error("run_program: unknown kind of argument");
    }
  }

  void fill_stack() {
    stack_.clear();
    for (int64_t count = next(); count > 0; --count) stack_.push_back(argument());
  }

  void call(int64_t op) {
    const std::vector<BoxedOp>& ops = boxed_ops();
    require(op >= 0 && op < static_cast<int64_t>(ops.size()), "run_program: no such operation");
    fill_stack();
    const auto arguments = stack_.size();
    const auto outputs = static_cast<size_t>(next());
    stack_.resize(std::max(arguments, outputs));
    ops[static_cast<size_t>(op)](stack_.data(), arguments, outputs);
    for (size_t i = 0; i < outputs; ++i)
      value(next()) = torch::stable::detail::to<Tensor>(stack_[i]);
  }

  void call_from_any_format() {
    const StayChannelsLast scope;
    call(next());
  }

  void call_torch() {
    const std::string name = text(), overload = text();
    fill_stack();
    const bool is_list = next() != 0;  // whether the outputs are one list of tensors
    const int64_t outputs = next();
    stack_.resize(std::max(stack_.size(), static_cast<size_t>(outputs)));
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher(name.c_str(), overload.c_str(), stack_.data(), TORCH_ABI_VERSION));
    using torch::stable::detail::to;
    if (is_list) {
      const auto list = to<std::vector<Tensor>>(stack_[0]);
      require(std::ssize(list) == outputs, "run_program: not as many outputs as recorded");
      for (const Tensor& t : list) value(next()) = t;
    } else {
      for (int64_t i = 0; i < outputs; ++i)
        value(next()) = to<Tensor>(stack_[static_cast<size_t>(i)]);
    }
  }

  void add() {
    const Tensor a = tensor(), b = tensor();
    const double alpha = number();
    AtenTensorHandle sum;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_add_Tensor(a.get(), b.get(), alpha, &sum));
    value(next()) = Tensor(sum);
  }

  void channels_last() {
    const Tensor& of = made_value();
    require(of.dim() == 4 && !is_half(of.scalar_type()), "run_program: no image of floats");
    Tensor result = as_channels_last(of);
    value(next()) = std::move(result);
  }

  void view() {
    const Tensor& of = made_value();
    const IntList sizes = ints();
    value(next()) = torch::stable::view(of, sizes);
  }

  const int64_t* at_;
  const int64_t* end_;
  const std::vector<Tensor>& constants_;
  std::vector<std::optional<Tensor>> values_;
  std::vector<StableIValue> stack_;
};

// The recordings that Python holds, by number.
class Recordings {
 public:
  static Recordings& all() {
    static Recordings recordings;
    return recordings;
  }
  int64_t add(Recording recording) {
    const std::lock_guard lock(mutex_);
    held_[++last_] = std::make_shared<const Recording>(std::move(recording));
    return last_;
  }
  std::shared_ptr<const Recording> get(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = held_.find(number);
    require(found != held_.end(), "run_program: no such program");
    return found->second;
  }
  void drop(int64_t number) {
    std::shared_ptr<const Recording> last;  // declared first: its tensors die outside the lock
    const std::lock_guard lock(mutex_);
    const auto found = held_.find(number);
    if (found == held_.end()) return;
    last = std::move(found->second);
    held_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const Recording>> held_;
  int64_t last_ = 0;
};

// `probes`: an address, a size in bytes and the bits there, again and again.
int64_t make_program(const std::vector<Tensor>& constants, const Tensor& code,
                     const Tensor& probes) {
  for (const Tensor* t : {&code, &probes})
    require(t->scalar_type() == ScalarType::Long && t->is_contiguous() && t->dim() == 1,
            "make_program: code and probes must be dense vectors of int64");
  const int64_t *first = data<int64_t>(code), *probe = data<int64_t>(probes);
  Recording recording{
      constants, {first, first + code.numel()}, {}, Recording::places_of(constants)};
  for (int64_t i = 0; i + 3 <= probes.numel(); i += 3)
    recording.probes.push_back({reinterpret_cast<const void*>(static_cast<uintptr_t>(probe[i])),
                                static_cast<size_t>(std::clamp<int64_t>(probe[i + 1], 0, 8)),
                                static_cast<uint64_t>(probe[i + 2])});
  return Recordings::all().add(std::move(recording));
}

std::vector<Tensor> run_program(const std::vector<Tensor>& inputs, int64_t program) {
  const std::shared_ptr<const Recording> recording = Recordings::all().get(program);
  return Program(inputs, *recording).run();
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(program, ops) {
  ops.impl("make_program", TORCH_BOX(&nnarch::make_program));
  ops.impl("run_program", TORCH_BOX(&nnarch::run_program));
}

extern "C" __attribute__((visibility("default"))) void nnarch_drop_program(int64_t program) {
  nnarch::Recordings::all().drop(program);
}

extern "C" __attribute__((visibility("default"))) int64_t
nnarch_program_is_current(int64_t program) {
  try {
    return nnarch::Recordings::all().get(program)->is_current();
  } catch (const std::exception&) {
    return 0;
  }
}
