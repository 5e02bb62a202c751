// The one matrix product under convolution, linear and their gradients: C = A·B by rows of A that
// are reached through pointers, or lie evenly in strips.
//
// A convolution is a sum over kernel taps of small matrix products whose A rows are input pixels:
//     C[m, n] = Σ_tap Σ_k rows[tap][m][k] · B[tap·depth + k, n]
// With one tap this is a plain matrix product. Nothing is gathered or unfolded: a pixel in the
// padding is a pointer to zeros, and a tap at which a whole register tile lies in the padding is
// skipped.
#pragma once

#include <cstdint>

#include "cpu/epilogue.h"
#include "cpu/isa.h"
#include "cpu/streaming.h"

namespace nnarch {

// Rows of A and of C that lie evenly: row i starts at a + i * a_step and at c + i * c_step. Their
// tiles start and end in half the time.
template <class T>
struct Strip {
  const T* a;
  int64_t c;  // offset from the block's c
  int64_t rows;
};

// What is read next: `rows` of `size` elements, `step` apart.
template <class T>
struct Later {
  const T* at = nullptr;
  int64_t size = 0, rows = 1, step = 0;

  // Parts [i, end) of n. Few rows that lie apart are cut across: 16 are asked for together.
  Later part(int64_t i, int64_t end, int64_t n) const {
    if (!at) return {};
    if (rows == 1 || (step != size && rows < 16 * n))
      return {at + size * i / n, size * end / n - size * i / n, rows, step};
    const int64_t first = rows * i / n;
    return {at + first * step, size, rows * end / n - first, step};
  }
};

template <class T>
struct GemmBlock {
  // rows[tap * row_stride + m] points to `depth` values of A.
  const T* const* rows = nullptr;
  int64_t row_stride = 0;
  int64_t taps = 1;
  int64_t depth = 0;
  // Packed B: panels of `nr` columns; panel j starts at b + j * panel_step.
  const T* b = nullptr;
  int64_t panel_step = 0;  // 0: taps * depth * nr
  // The panel that another block will read next, fetched ahead; or null.
  const T* b_after = nullptr;
  // Or what else it will read, fetched ahead with the last panel; or, where B has one tap and was
  // packed just now, so that it is in cache, evenly with all panels.
  Later<T> after = {};
  bool b_is_near = false;
  // Row m of the output starts at c + c_offset[m]; columns are dense.
  T* c = nullptr;
  const int64_t* c_offset = nullptr;
  int64_t m = 0;              // rows
  int64_t n = 0;              // columns; the last panel may be partial
  int64_t longest_sum = 512;  // terms of a running sum; of 1024, with 2.3 times torch's error, two
  bool accumulate = false;    // add to what C holds; then the epilogue is applied to the sum
  Epilogue<T> epilogue = {};
  // Where a row of A lies in the padding, or null where none does.
  const T* zeros = nullptr;
  // Rows that belong together, so that no register tile mixes them: segment i ends before row
  // segment_end[i]. Null: one segment.
  const int64_t* segment_end = nullptr;
  int64_t segments = 1;
  bool stream = false;  // write C past the caches: see outgrows_caches
  // In place of rows, c_offset, m, zeros and segments; no tile mixes two strips.
  const Strip<T>* strips = nullptr;
  int64_t strip_count = 0;
  int64_t a_step = 0, c_step = 0;
  // What comes into cache meanwhile in place of C, which is there: two blocks like it, their rows
  // fetched_step apart. Or null. For plain tiles of strips.
  const T *fetched = nullptr, *fetched_too = nullptr;
  int64_t fetched_step = 0;
  const int64_t* tap_offset = nullptr;  // of every tap from the strip's a; null: one tap, at a
  // Room for a copy of the strips' rows, of room_for(rows, depth) elements, or null: where rows
  // would share one set of the first-level cache, and there are columns enough.
  T* room = nullptr;
};

// Rows of A that lie a multiple of 4 KB apart share one set of the first-level cache, of 8 or 12
// lines: taller register tiles evict their own rows at every step (a quarter slower).
template <class T>
bool shares_a_set(int64_t a_step) {
  return a_step * int64_t{sizeof(T)} % 4096 == 0;
}
// Whether products with so many columns are worth a copy of such rows.
template <class T>
bool copies_rows(int64_t a_step, int64_t columns, int64_t depth) {
  constexpr int64_t least_columns = 128;
  return shares_a_set<T>(a_step) && columns >= least_columns && depth > 0;
}
// The depth of a part of a sum. A panel of so many B rows is read from L2 again for every tile of
// rows; that keeps up with the FMAs, and a longer sum saves loads and stores of C. Measured: 1024
// floats beat what fits L1 by 3-8 %, and half of it by 20 % under AVX-512.
template <class T>
constexpr int64_t kPartDepth = 4096 / static_cast<int64_t>(sizeof(T));
// Elements of room for rows of the longest part.
template <class T>
int64_t room_for(int64_t rows, int64_t depth) {
  const int64_t line = 64 / int64_t{sizeof(T)};
  return rows * ((depth < kPartDepth<T> ? depth : kPartDepth<T>)+2 * line);
}

template <class T>
struct GemmTable {
  int64_t mr;  // rows of the register tile
  int64_t nr;  // columns of a packed panel
  void (*run)(const GemmBlock<T>& block);
  // One panel of packed B: dst[k * nr + j] = src[k * stride_k + j * stride_n] for k < depth,
  // j < n; the columns from n to nr are zero.
  void (*pack_panel)(const T* src, int64_t stride_k, int64_t stride_n, int64_t depth, int64_t n,
                     T* dst);
  // One panel of B whose rows lie anywhere: dst[k * nr + j] = rows[k][offset + j] for k < depth, j
  // < n.
  void (*pack_rows)(const T* const* rows, int64_t offset, int64_t depth, int64_t n, T* dst);
  // y[r * y_stride + j] = epilogue(Σ_k x[r * x_stride + k] · w[j * w_stride + k]) for r < m,
  // j < n: few rows against unpacked weights, at the bandwidth of reading them.
  void (*few_rows)(const T* x, int64_t x_stride, int64_t m, const T* w, int64_t w_stride,
                   int64_t depth, int64_t n, T* y, int64_t y_stride, const Epilogue<T>& epilogue);
};

NNARCH_PER_ISA(template <class T> const GemmTable<T>& gemm_table();)

template <class T>
const GemmTable<T>& gemm() {
  return NNARCH_SELECT(gemm_table<T>());
}

}  // namespace nnarch
