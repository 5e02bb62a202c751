// The kernels that put maxima back where they were, of one instruction set.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nnarch {

// Where windows do not overlap: row i and column j of the input belong to the rows from i·tall and
// the columns from j·wide of the output.
struct Windows2d {
  int64_t height, width, tall, wide;  // of the input, and of a window
};

template <class T>
struct UnpoolTable {
  int64_t lanes;
  // Any indices: y[index[i][c]][c] = x[i][c] for `channels` neighbouring channels, where pixels lie
  // `stride` apart; the last of several counts, and 0 where there is none. False, and y is of no
  // use, where an index lies outside of y.
  bool (*scatter)(const T* x, const int64_t* index, int64_t pixels, int64_t outputs, int64_t stride,
                  int64_t channels, T* y);
  // Indices that lie in windows that do not overlap: input rows [from, to) of a channels_last image
  // with at least a vector of channels, or of a plane. False where one lies elsewhere.
  bool (*rows)(const T* x, const int64_t* index, int64_t channels, const Windows2d& w, int64_t from,
               int64_t to, T* y, bool past_caches);
  bool (*plane)(const T* x, const int64_t* index, const Windows2d& w, int64_t from, int64_t to,
                T* y);
};

NNARCH_PER_ISA(template <class T> const UnpoolTable<T>& unpool_table();)

}  // namespace nnarch
