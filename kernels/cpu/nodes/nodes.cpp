// Nodes of autograd's graph for operations whose backward is one native operation.
//
// torch.autograd.Function costs 11 µs a training call, more than a small kernel. torch's own nodes
// are C++, of an interface that changes between versions: this file is a library of its own, built
// for one torch and loaded beside no other, and all works without it. See docs/adr/0012-nodes.md.
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/nodes.h"

namespace nnarch {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

struct {
  uint64_t keys[2];
  NodeCalls calls;
} setup;

const Tensor& tensor_of(AtenTensorHandle handle) { return *reinterpret_cast<Tensor*>(handle); }
AtenTensorHandle handle_of(const Tensor& t) {
  return reinterpret_cast<AtenTensorHandle>(const_cast<Tensor*>(&t));
}
Tensor taken(AtenTensorHandle handle) {
  if (handle == nullptr) return {};
  Tensor result = std::move(*reinterpret_cast<Tensor*>(handle));
  aoti_torch_delete_tensor_object(handle);
  return result;
}

bool is_plain_on_cpu(const Tensor& t) {
  const uint64_t keys = t.key_set().raw_repr();
  return keys == setup.keys[0] || keys == setup.keys[1];
}
bool is_plain_on_gpu(const Tensor& t) {
  return setup.calls.is_plain_on_gpu(t.key_set().raw_repr());
}

// Whether the dispatcher would do nothing but call the kernel (nnarch.direct.watched).
bool nobody_watches() {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet watchers{DispatchKey::Python,
                                         DispatchKey::FuncTorchDynamicLayerFrontMode,
                                         DispatchKey::FuncTorchDynamicLayerBackMode,
                                         DispatchKey::Functionalize,
                                         DispatchKey::Tracer,
                                         DispatchKey::PythonDispatcher};
  return c10::impl::TorchDispatchModeTLS::stack_len() == 0 && !at::hasCallbacks() &&
         !c10::impl::tls_local_dispatch_key_set().included_.has_any(watchers);
}

// Arguments of a backward operation, while it is called. Lists are the node's.
struct Arguments {
  struct Ints {
    const int64_t* data = nullptr;
    int64_t size = 0;
  };
  std::array<Tensor, kMostBackwardArguments> tensors;
  std::array<uint64_t, kMostBackwardArguments> numbers{};
  std::array<Ints, kMostBackwardArguments> lists;
};

bool is_tensor(char kind) { return (kind | 0x20) == 't'; }
bool is_list(char kind) { return kind == 'l'; }
bool is_optional(char kind) { return kind < 'a'; }

struct OpNode : torch::autograd::Node {
  const Backward& backward;
  std::vector<SavedVariable> saved;  // in the order of the arguments
  std::vector<uint64_t> numbers;
  std::vector<int64_t> lists;  // each behind its length

  OpNode(const Backward& backward, torch::autograd::edge_list&& edges)
      : Node(std::move(edges)), backward(backward) {}

  std::string name() const override { return "nnarch_" + backward.name; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& s : saved) s.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list gradients(num_outputs());
    bool any = false;
    for (const Tensor& g : grads) any |= g.defined();
    if (!any) return gradients;
    std::array<Tensor, kMostBackwardResults> results;
    {
      Arguments arguments;
      gather(grads, arguments);
      grads.clear();
      if (!may_run_kernel() || !(run_on_cpu(arguments, results) || run_on_gpu(arguments, results)))
        run_formula(arguments, results);
    }
    const auto& edges = backward.edges;
    for (size_t e = 0; e < edges.size(); ++e)
      if (task_should_compute_output(e)) {
        gradients[e] = results[static_cast<size_t>(edges[e].result)];
        lead_error_on(gradients[e]);
      }
    return gradients;
  }

 private:
  // A formula without a second derivative marks its results with an error. It must lie on the way
  // to what lies behind this operation: autograd passes over one that leads to nothing.
  void lead_error_on(const Tensor& gradient) const {
    if (!gradient.defined() || !gradient.grad_fn()) return;
    auto* const error = dynamic_cast<torch::autograd::Error*>(gradient.grad_fn().get());
    if (error) error->set_next_edges(torch::autograd::edge_list(next_edges()));
  }

  uint64_t wanted() const {
    int64_t bits = 0;
    for (size_t e = 0; e < backward.edges.size(); ++e)
      if (task_should_compute_output(e)) bits |= backward.edges[e].bit;
    return static_cast<uint64_t>(bits);
  }

  void gather(const variable_list& grads, Arguments& to) {
    size_t next_saved = 0, next_number = 0, next_list = 0;
    for (size_t a = 0; a < backward.arguments.size(); ++a) {
      const auto& [source, index, kind] = backward.arguments[a];
      switch (source) {
        case Backward::kGrad:
          if (static_cast<size_t>(index) < grads.size())
            to.tensors[a] = grads[static_cast<size_t>(index)];
          break;
        case Backward::kInput:
          to.tensors[a] = saved[next_saved++].unpack();
          break;
        case Backward::kOutput:
          to.tensors[a] = saved[next_saved++].unpack(getptr());
          break;
        case Backward::kNumber:
          to.numbers[a] = numbers[next_number++];
          break;
        case Backward::kInts:
        case Backward::kSizes:
          to.lists[a] = {&lists[next_list + 1], lists[next_list]};
          next_list += 1 + static_cast<size_t>(lists[next_list]);
          break;
        case Backward::kWanted:
          to.numbers[a] = wanted();
          break;
        case Backward::kKeepsGraph:
          to.numbers[a] = torch::autograd::get_current_graph_task_keep_graph();
          break;
        case Backward::kNone:;
      }
    }
  }

  static uint64_t boxed(const Arguments::Ints& list) {
    return torch::stable::detail::from(std::vector<int64_t>(list.data, list.data + list.size));
  }

  using Results = std::array<Tensor, kMostBackwardResults>;

  static bool may_run_kernel() { return !at::GradMode::is_enabled() && nobody_watches(); }

  // Whether each tensor is there and is plain, or is absent and may be.
  template <class IsPlain>
  bool are_plain(const Arguments& from, const IsPlain& is_plain) const {
    for (size_t a = 0; a < backward.arguments.size(); ++a) {
      const char kind = backward.arguments[a].kind;
      if (!is_tensor(kind)) continue;
      if (from.tensors[a].defined() ? !is_plain(from.tensors[a]) : !is_optional(kind)) return false;
    }
    return true;
  }

  // False where the kernel may not, or does not, take the arguments.
  bool run_on_cpu(const Arguments& from, Results& results) const {
    if (!are_plain(from, is_plain_on_cpu)) return false;
    const size_t size = backward.arguments.size();
    uint64_t stack[kMostBackwardArguments];
    for (size_t a = 0; a < size; ++a) {
      const char kind = backward.arguments[a].kind;
      stack[a] = from.numbers[a];
      if (is_list(kind)) stack[a] = boxed(from.lists[a]);
      if (!is_tensor(kind)) continue;
      stack[a] = 0;
      if (!from.tensors[a].defined()) continue;
      stack[a] = reinterpret_cast<uint64_t>(new Tensor(from.tensors[a]));
      if (is_optional(kind)) stack[a] = reinterpret_cast<uint64_t>(new uint64_t(stack[a]));
    }
    const auto count = static_cast<size_t>(backward.results);
    try {
      backward.function(stack, size, count);
    } catch (...) {
      return false;  // the formula fails the same way, and says why
    }
    for (size_t r = 0; r < count; ++r)
      results[r] = taken(reinterpret_cast<AtenTensorHandle>(stack[r]));
    return true;
  }

  std::array<Given, kMostBackwardArguments> given(const Arguments& from) const {
    std::array<Given, kMostBackwardArguments> to;
    for (size_t a = 0; a < backward.arguments.size(); ++a)
      to[a] = {from.tensors[a].defined() ? handle_of(from.tensors[a]) : nullptr, from.numbers[a],
               from.lists[a].data, from.lists[a].size};
    return to;
  }

  void take(AtenTensorHandle* owned, Results& results) const {
    for (size_t r = 0; r < static_cast<size_t>(backward.results); ++r) results[r] = taken(owned[r]);
  }

  // False where no launch plan is there for such arguments.
  bool run_on_gpu(const Arguments& from, Results& results) const {
    AtenTensorHandle owned[kMostBackwardResults] = {};
    if (!are_plain(from, is_plain_on_gpu)) return false;
    if (!setup.calls.replay_backward(backward, given(from).data(), owned)) return false;
    take(owned, results);
    return true;
  }

  void run_formula(const Arguments& from, Results& results) const {
    AtenTensorHandle owned[kMostBackwardResults] = {};
    std::string error;
    if (!setup.calls.call_formula(backward, given(from).data(), owned, &error)) {
      const auto is = [&](const char* kind) { return error.rfind(kind, 0) == 0; };
      const std::string message = error.substr(std::min(error.size(), error.find(": ") + 2));
      TORCH_CHECK_NOT_IMPLEMENTED(!is("NotImplementedError"), message);
      TORCH_CHECK_VALUE(!is("ValueError"), message);
      TORCH_CHECK_TYPE(!is("TypeError"), message);
      TORCH_CHECK(false, is("RuntimeError") ? message : error);
    }
    take(owned, results);
  }
};

template <class Ints>
void append(std::vector<int64_t>& lists, const Ints& first, int64_t size) {
  lists.push_back(size);
  lists.insert(lists.end(), first, first + size);
}

// Keeps what the backward takes of the operation's arguments and outputs.
void keep(OpNode& node, const Given* arguments, const AtenTensorHandle* outputs) {
  node.saved.reserve(node.backward.arguments.size());
  for (const auto& [source, index, kind] : node.backward.arguments) {
    if (source == Backward::kNumber) node.numbers.push_back(arguments[index].number);
    if (source == Backward::kInts) append(node.lists, arguments[index].ints, arguments[index].size);
    if (source == Backward::kSizes) {
      const auto sizes = tensor_of(arguments[index].tensor).sizes();
      append(node.lists, sizes.begin(), static_cast<int64_t>(sizes.size()));
    }
    if (source != Backward::kInput && source != Backward::kOutput) continue;
    const bool is_output = source == Backward::kOutput;
    const AtenTensorHandle handle = is_output ? outputs[index] : arguments[index].tensor;
    if (handle == nullptr)
      node.saved.emplace_back();
    else
      node.saved.emplace_back(tensor_of(handle), is_output);
  }
}

bool record(const Backward& backward, const Given* arguments, const AtenTensorHandle* outputs) {
  torch::autograd::edge_list edges;
  edges.reserve(backward.edges.size());
  for (const Backward::Edge& e : backward.edges) {
    if (arguments[e.input].tensor == nullptr) {
      edges.emplace_back();
      continue;
    }
    const Tensor& t = tensor_of(arguments[e.input].tensor);
    if (torch::autograd::isFwGradDefined(t)) return false;
    edges.push_back(torch::autograd::impl::gradient_edge(t));
  }
  const auto node = c10::make_intrusive<OpNode>(backward, std::move(edges));
  for (int64_t o = 0; o < backward.seen; ++o)
    torch::autograd::set_history(tensor_of(outputs[o]), node);
  keep(*node, arguments, outputs);
  return true;
}

}  // namespace
}  // namespace nnarch

#define NNARCH_EXPORT extern "C" __attribute__((visibility("default")))

// The torch that this was built for.
NNARCH_EXPORT const char* nnarch_nodes_torch() { return NNARCH_TORCH; }
NNARCH_EXPORT void nnarch_nodes_setup(uint64_t keys, uint64_t other_keys,
                                      const nnarch::NodeCalls& calls) {
  nnarch::setup = {{keys, other_keys}, calls};
}
NNARCH_EXPORT bool nnarch_nodes_record(const nnarch::Backward& backward,
                                       const nnarch::Given* arguments,
                                       const AtenTensorHandle* outputs) {
  return nnarch::record(backward, arguments, outputs);
}
