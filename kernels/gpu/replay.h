// Launch plans that run without Python: what plans.py recorded of a launcher, repeated with other
// tensors. See docs/adr/0013-native-plans.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/direct_call.h"

namespace nnarch {

// What a launcher may look at, as bytes: shapes, strides, dtypes, alignment, numbers, settings.
class ReplayKey {
 public:
  ReplayKey() {
    bytes_.reserve(1024);
    inputs_.reserve(16);
  }
  void none() { word(-1); }
  void number(uint64_t bits) { word(static_cast<int64_t>(bits)); }
  void ints(const int64_t* values, int64_t size);
  void tensor(AtenTensorHandle);
  // What decides how float32 is multiplied, where there is some. Needs Python's lock.
  void settings();
  bool has_settings() const { return exact_; }

  const std::string& bytes() const { return bytes_; }
  const std::vector<AtenTensorHandle>& inputs() const { return inputs_; }

 private:
  void word(int64_t value) { bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value)); }

  std::string bytes_;
  std::vector<AtenTensorHandle> inputs_;
  bool exact_ = false;
};

// The key of a call whose arguments have been read.
ReplayKey replay_key(const Operation&, const Value* values);

// Whether these are the dispatch keys of a plain tensor on a GPU on which plans can be repeated.
bool is_plain_on_gpu(uint64_t keys);

// Repeats what was recorded for the operation of this number and such arguments; results are the
// caller's, null where there is None. False where nothing was recorded, or it failed.
bool replay(int64_t operation, const ReplayKey&, AtenTensorHandle* results);

// The same for a node, whose thread may not hold Python's lock.
bool replay_backward(const Backward&, const Given* arguments, AtenTensorHandle* results);

}  // namespace nnarch
