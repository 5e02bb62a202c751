// An operation whose caller takes its first output alone makes no tensors of the others, each of
// which costs a third of a microsecond.
#pragma once

#include <utility>

namespace nnarch {

inline thread_local bool first_output_is_enough = false;

// For a kernel, once, before anything else: whether it may return its first output in place of the
// others.
inline bool takes_first_output_alone() { return std::exchange(first_output_is_enough, false); }

// For the caller, around the call.
class FirstOutputAlone {
 public:
  explicit FirstOutputAlone(bool enough) { first_output_is_enough = enough; }
  ~FirstOutputAlone() { first_output_is_enough = false; }
  FirstOutputAlone(const FirstOutputAlone&) = delete;
  FirstOutputAlone& operator=(const FirstOutputAlone&) = delete;
};

}  // namespace nnarch
