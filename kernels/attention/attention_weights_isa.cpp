// Attention's weights themselves: 2^(score - log-sum-exp), tile by tile, as the backward makes them
// again. Where they are averaged over heads, a task adds up a block of all heads in cache, so that
// nothing of size heads · queries · keys is in memory.
#include "attention/backward_rows_isa.h"
#include "attention/weights_problem.h"

namespace nnarch::NNARCH_ISA {
namespace {

constexpr int64_t kTaskQueries = 4 * kTileQueries;  // which share a block of packed keys

template <class T>
class WeightsBlock {
 public:
  WeightsBlock(const AttentionWeights<T>& a, const WeightsTask& task, T* scratch)
      : a_(a), f_(a.forward), task_(task), few_(f_.queries <= kFewRows) {
    const int64_t depth = in_vectors<T>(f_.depth);
    keys_t_ = take(scratch, depth * kTileKeys);
    keys_ = take(scratch, depth * kTileKeys);
    q_ = take(scratch, depth * kTileQueries);
    weights_ = take(scratch, kTileQueries * kTileKeys);
    kept_ = f_.drops ? take(scratch, kTileQueries * kTileKeys) : weights_;
    sums_ = take(scratch, kTaskQueries * kTileKeys);
  }
  static int64_t scratch_of(const AttentionWeights<T>& a) {
    const int64_t depth = in_vectors<T>(a.forward.depth);
    return 3 * depth * kTileKeys + 2 * kTileQueries * kTileKeys + kTaskQueries * kTileKeys;
  }

  NNARCH_INLINE void run() {
    const int64_t all = task_.key_end - task_.key, seen = seen_keys();
    if (a_.averaged) clear(sums_, (task_.query_end - task_.query) * kTileKeys);
    for (int64_t head = task_.head; head < task_.heads_end; ++head) {
      const Rows<T> keys = keys_of(head, seen);
      for (int64_t i = task_.query; i < task_.query_end; i += kTileQueries)
        tile(head, i, seen, keys);
    }
    if (a_.averaged) write(0, task_.query, task_.query_end, sums_, all, T(1) / T(f_.heads));
  }

  // Goes on with the maxima of rows whose log-sum-exp is large, and the sums below them.
  NNARCH_INLINE void add_sums(T* top, T* sum) {
    const int64_t seen = seen_keys();
    const Rows<T> keys = keys_of(task_.head, seen);
    for (int64_t i = task_.query; i < task_.query_end; i += kTileQueries)
      add_tile_sums(i, seen, keys, top + (i - task_.query), sum + (i - task_.query));
  }

 private:
  int64_t seen_keys() const {
    const int64_t length = f_.key_length(task_.batch) - task_.key;
    const int64_t all = task_.key_end - task_.key;
    return length < 0 ? 0 : length < all ? length : all;
  }
  NNARCH_INLINE Rows<T> keys_of(int64_t head, int64_t seen) {
    const int64_t group = head / f_.heads_each();
    const Rows<T> keys =
        dense_rows<T>(f_.k, f_.k.at(task_.batch, group, task_.key), seen, f_.depth, keys_);
    if (!few_) transpose_block<T>(keys, seen, f_.depth, keys_t_);
    return keys;
  }
  NNARCH_NOINLINE void add_tile_sums(int64_t query, int64_t columns, const Rows<T>& keys, T* top,
                                     T* sum) {
    const TilePlace p = place(task_.head, query, columns);
    const Seen seen = columns == 0 || p.band.empty() ? Seen::nothing : seen_in_tile(f_, p);
    if (seen == Seen::nothing) return;
    scores(p, keys);
    const Operand& m = f_.mask.values;
    alignas(kVectorBytes) T bias[kTileKeys];
    for (int64_t r = 0; r < p.band.rows; ++r) {
      if (!is_large_sum(a_.lse.at(task_.batch, task_.head, query + r))) continue;
      if (seen != Seen::all)
        bias_row<T>(f_.mask, m.at(p.batch, p.head, query + r) + p.key * m.column, columns, bias);
      T* row = weights_ + r * kTileKeys;
      whole_scores<T>(row, p.width, p.band.first_column(r), p.band.end_column(r), f_.scale,
                      seen == Seen::all ? nullptr : bias);
      T most = top[r], total = T(0);
      for (int64_t c = 0; c < columns; ++c) most = row[c] > most ? row[c] : most;
      if (most == -kInfinity<T>) continue;
      large_weights<T>(row, p.width, most, T(1));
      for (int64_t c = 0; c < columns; ++c) total += row[c];
      const T before = exp2<T>(broadcast((top[r] - most) * T(kLog2E)))[0];
      sum[r] = sum[r] * before + total, top[r] = most;
    }
  }
  TilePlace place(int64_t head, int64_t query, int64_t columns) const {
    const int64_t left = task_.query_end - query;
    const int64_t rows = left < kTileQueries ? left : kTileQueries;
    const int64_t shift = query - task_.key;
    const Band band = {f_.low + shift, f_.high + shift, rows, columns};
    return {task_.batch, head, query, task_.key, band, in_vectors<T>(columns)};
  }
  static T* take(T*& scratch, int64_t count) {
    T* at = scratch;
    scratch += count;
    return at;
  }

  NNARCH_NOINLINE void tile(int64_t head, int64_t query, int64_t columns, const Rows<T>& keys) {
    const TilePlace p = place(head, query, columns);
    const int64_t rows = p.band.rows;
    const Seen seen = columns == 0 || p.band.empty() ? Seen::nothing : seen_in_tile(f_, p);
    if (seen == Seen::nothing) {
      if (!a_.averaged) write(head, query, query + rows, weights_, 0, T(1));
      return;
    }
    scores(p, keys);
    alignas(kVectorBytes) T lse[kTileQueries] = {};
    for (int64_t i = 0; i < rows; ++i) {
      const T one = a_.lse.at(task_.batch, head, query + i);
      lse[i] = one == -kInfinity<T> ? T(0) : one * T(kLog2E);
    }
    tile_weights(f_, p, seen, RowSums<T>(lse, f_, a_.large, p), weights_, kept_);
    if (!a_.averaged) return write(head, query, query + rows, kept_, columns, T(1));
    T* to = sums_ + (query - task_.query) * kTileKeys;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < p.width; c += kLanes<T>) {
        T* sum = to + r * kTileKeys + c;
        store(sum, load(sum) + load(kept_ + r * kTileKeys + c));
      }
  }
  NNARCH_INLINE void scores(const TilePlace& p, const Rows<T>& keys) {
    const Band& band = p.band;
    const Rows<T> q =
        dense_rows<T>(f_.q, f_.q.at(p.batch, p.head, p.query), band.rows, f_.depth, q_);
    const Product<T> product = {q.data,    q.step,   1,         keys_t_,
                                kTileKeys, weights_, kTileKeys, Finish::store};
    if (few_)
      return few_rows_product<T>(product, keys, band.rows, band.columns, in_vectors<T>(f_.depth));
    const int64_t depth = f_.depth;
    multiply_all<T>(product, band.rows, p.width, fetch_,
                    [&band, depth](int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
                      const bool seen = band.first_column(m0) < n1 && band.end_column(m1 - 1) > n0;
                      return seen ? Steps{0, depth} : kNoTile;
                    });
  }
  // Rows of kTileKeys, of which `columns` count: the other keys get zeros.
  NNARCH_NOINLINE void write(int64_t head, int64_t query, int64_t end, const T* from,
                             int64_t columns, T factor) {
    constexpr int w = kLanes<T>;
    const Operand& out = f_.out;
    const int64_t all = task_.key_end - task_.key;
    for (int64_t i = query; i < end; ++i, from += kTileKeys) {
      char* to = out.at(task_.batch, head, i) + task_.key * out.column;
      int64_t c = 0;
      for (; c < columns; c += w)
        store_as<T>(out.storage, to + c * out.column, load(from + c) * factor, all - c);
      for (; c < all; c += w) store_as<T>(out.storage, to + c * out.column, Vec<T>{}, all - c);
    }
  }

  const AttentionWeights<T>& a_;
  const Attention<T>& f_;
  const WeightsTask& task_;
  const bool few_;
  T *keys_t_, *keys_, *q_, *weights_, *kept_, *sums_;
  Fetch fetch_;
};

template <class T>
void run(const AttentionWeights<T>& a, const WeightsTask& task, T* scratch) {
  WeightsBlock<T>(a, task, scratch).run();
}

template <class T>
void large_sums(const AttentionWeights<T>& a, const WeightsTask& task, T* top, T* inverse,
                T* scratch) {
  const int64_t rows = task.query_end - task.query;
  bool any = false;
  for (int64_t r = 0; r < rows; ++r) {
    top[r] = -kInfinity<T>, inverse[r] = T(0);
    any |= is_large_sum(a.lse.at(task.batch, task.head, task.query + r));
  }
  for (int64_t key = task.key; any && key < task.key_end; key += kTileKeys) {
    WeightsTask block = task;
    block.key = key;
    if (key + kTileKeys < task.key_end) block.key_end = key + kTileKeys;
    WeightsBlock<T>(a, block, scratch).add_sums(top, inverse);
  }
  for (int64_t r = 0; r < rows; ++r)
    if (inverse[r] > T(0)) inverse[r] = T(1) / inverse[r];
}

}  // namespace

template <class T>
const AttentionWeightsTable<T>& attention_weights_table() {
  static constexpr AttentionWeightsTable<T> table = {
      kTaskQueries, kTileKeys, WeightsBlock<T>::scratch_of, run<T>, large_sums<T>};
  return table;
}
template const AttentionWeightsTable<float>& attention_weights_table();
template const AttentionWeightsTable<double>& attention_weights_table();

}  // namespace nnarch::NNARCH_ISA
