#include "cpu/rows_product.h"

#include <algorithm>

#include "cpu/combine.h"
#include "cpu/gather_gemm.h"
#include "cpu/machine.h"
#include "cpu/parallel.h"
#include "cpu/rows_in_place.h"
#include "cpu/rows_turned.h"

namespace nnarch {
namespace {

// Few rows: every weight is read once, in place.
template <class T>
void few_rows(const RowsProduct<T>& p) {
  // Four rows of x go past a task's weights at a time; the next four find them in cache.
  constexpr int64_t cache = int64_t{256} << 10;
  const int64_t n = p.columns(), in_cache = cache / (p.depth() * int64_t{sizeof(T)});
  const int64_t run = p.m <= kFewRows ? std::clamp<int64_t>(in_cache, 64, 256)
                                      : std::clamp<int64_t>(in_cache, 8, 64);
  parallel_tasks(ceil_div(n, run), [&](int64_t task) {
    const int64_t first = task * run, w_step = p.weight.column_stride;
    gemm<T>().few_rows(p.x, p.x_step, p.m, p.weights() + first * w_step, w_step, p.depth(),
                       std::min(run, n - first), p.y + first, p.y_step,
                       p.epilogue.from_channel(first));
  });
}

// Few rows, or a short sum, where the weights' columns are dense: transposed ones, which a gradient
// multiplies with. Packing them took as long as the product three times.
template <class T>
void rows_of_weights(const RowsProduct<T>& p) {
  const CombineRows<T> combine = NNARCH_SELECT(combine_rows<T>());
  const int64_t n = p.columns(), w_step = p.weight.depth_stride;
  if (p.m <= kFewRows) {
    constexpr int64_t run = 4096 / static_cast<int64_t>(sizeof(T));
    return parallel_tasks(ceil_div(n, run), [&](int64_t task) {
      const int64_t first = task * run;
      combine(p.x, p.x_step, 1, p.m, p.depth(), p.weights() + first, w_step,
              std::min(run, n - first), p.y + first, p.y_step);
    });
  }
  constexpr int64_t run = 32;
  parallel_tasks(ceil_div(p.m, run), [&](int64_t task) {
    const int64_t first = task * run;
    combine(p.x + first * p.x_step, p.x_step, 1, std::min(run, p.m - first), p.depth(), p.weights(),
            w_step, n, p.y + first * p.y_step, p.y_step);
  });
}

// How a task packs unpacked weights for itself: so many columns of so deep a part of the sum stay
// in cache, and so many rows go past them at a time. A large second-level cache holds enough for
// any number of rows; with a small one many rows are worth a packed copy in memory.
template <class T>
struct PackedInCache {
  int64_t columns, rows, parts;

  static bool serves(int64_t m) { return m <= kManyRows || roomy(); }

  PackedInCache(int64_t depth, int64_t all_columns) {
    constexpr int64_t wanted_tasks = 8;
    const int64_t nr = gemm<T>().nr, mr = gemm<T>().mr;
    parts = depth > kPartDepth<T> * 3 / 2 ? ceil_div(depth, kPartDepth<T>) : 1;
    const int64_t row_bytes = std::max<int64_t>(1, ceil_div(depth, parts) * int64_t{sizeof(T)});
    const int64_t panels = (roomy() ? kRoomyBytes : kBytes) / (row_bytes * nr);
    columns = std::min(nr * std::clamp<int64_t>(panels, 1, 8),
                       round_up(ceil_div(all_columns, wanted_tasks), nr));
    rows = std::max(round_up(kBytes / row_bytes, mr), 4 * mr);
  }

 private:
  static constexpr int64_t kBytes = int64_t{192} << 10, kRoomyBytes = int64_t{1} << 20;
  static bool roomy() { return l2_bytes() >= int64_t{2} << 20; }
};

// Each task packs a few panels into cache and takes all rows past them.
template <class T>
class PackAndMultiply {
 public:
  explicit PackAndMultiply(const RowsProduct<T>& p)
      : p_(p),
        block_(p.depth(), p.columns()),
        stream_(outgrows_caches<T>(p.y, p.m, {0, 0, p.y_step})) {}

  void run() const {
    parallel_tasks(ceil_div(p_.columns(), block_.columns), [&](int64_t task) {
      const int64_t first = task * block_.columns;
      Scratch<T> packed(packed_size<T>(block_.columns, 1, ceil_div(p_.depth(), block_.parts)));
      for (int64_t part = 0; part < block_.parts; ++part) {
        const WeightView<T> weight = part_of(first, part);
        const bool ends = part + 1 == block_.parts;
        pack_columns(weight, packed.get());
        multiply(packed.get(), first, weight.columns, part,
                 lines_of(ends ? part_of(first + block_.columns, 0) : part_of(first, part + 1)));
      }
    });
  }

 private:
  int64_t start_of(int64_t part) const { return p_.depth() * part / block_.parts; }

  // A task's columns, from the first one, and a part of their sum: what is packed together.
  WeightView<T> part_of(int64_t first, int64_t part) const {
    const int64_t from = start_of(part);
    return p_.weight.columns_from(first, block_.columns)
        .depth_from(from, start_of(part + 1) - from);
  }

  // Columns [first, first + n) of the product, all rows past `packed`, which has a part of the sum;
  // `later` is what will be packed next.
  void multiply(const T* packed, int64_t first, int64_t n, int64_t part,
                const Later<T>& later) const {
    const int64_t from = start_of(part), depth = start_of(part + 1) - from;
    const bool ends = part + 1 == block_.parts, copies = copies_rows<T>(p_.x_step, n, depth);
    Scratch<T> room(copies ? room_for<T>(std::min(block_.rows, p_.m), depth) : 0);
    const int64_t blocks = ceil_div(p_.m, block_.rows);
    for (int64_t i = 0, row = 0; i < blocks; ++i, row += block_.rows) {
      const Strip<T> rows{p_.x + row * p_.x_step + from, row * p_.y_step,
                          std::min(block_.rows, p_.m - row)};
      gemm<T>().run({.depth = depth,
                     .b = packed,
                     .after = later.part(i, i + 1, blocks),
                     .b_is_near = true,
                     .c = p_.y + first,
                     .n = n,
                     .accumulate = part > 0,
                     .epilogue = ends ? p_.epilogue.from_channel(first) : Epilogue<T>{},
                     .stream = stream_ && block_.parts == 1,
                     .strips = &rows,
                     .strip_count = 1,
                     .a_step = p_.x_step,
                     .c_step = p_.y_step,
                     .room = copies ? room.get() : nullptr});
    }
  }

  const RowsProduct<T>& p_;
  const PackedInCache<T> block_;
  const bool stream_;
};

}  // namespace

template <class T>
const char* multiply_rows(const RowsProduct<T>& p) {
  const int64_t depth = p.depth();
  const bool dense_rows = p.weight.depth_stride == 1 && depth > 0;
  const bool dense_columns = p.weight.column_stride == 1 && depth > 0 && is_identity(p.epilogue);
  if (p.m <= kFewUnpackedRows && dense_rows) return few_rows(p), "gemv";
  if ((p.m <= kFewRows || depth <= kFewRows) && dense_columns) return rows_of_weights(p), "rows";
  if (dense_rows && serves_turned<T>(p.m)) return multiply_turned(p), "turned";
  if (dense_columns && serves_in_place(p.m, p.columns(), depth))
    return multiply_in_place(p), "unpacked";
  if (PackedInCache<T>::serves(p.m)) return PackAndMultiply<T>(p).run(), "gemm";
  return nullptr;
}

template const char* multiply_rows<float>(const RowsProduct<float>& p);
template const char* multiply_rows<double>(const RowsProduct<double>& p);

}  // namespace nnarch
