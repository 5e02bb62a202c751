// Attention's backward: for a block of keys, all queries that see it, a tile of queries at a time.
//
// Weights are made again from the scores and the log-sum-exp. What a block of keys needs in another
// order (keys and values transposed) is packed once; dk and dv of the block stay in cache, and only
// dq is added to in memory. BACKWARD.md counts it all.
#include "attention/backward_rows_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

constexpr int64_t kFetchedQueries = 256;  // of the next group: about what L2 has room for

// The scratch of a task.
template <class T>
struct Buffers {
  T *keys_t, *values_t;  // [depth][kTileKeys]
  T *keys, *dk, *dv;     // [kTileKeys][depth in vectors]
  T *q, *grad;           // [kTileQueries][depth in vectors]
  T *weights, *kept;     // [kTileQueries][kTileKeys]
  T *lse, *delta;        // [heads of the group][queries]
  int64_t size;

  Buffers(const AttentionBackward<T>& a, T* at) : size(0) {
    const Attention<T>& f = a.forward;
    const int64_t depth = in_vectors<T>(f.depth), value_depth = in_vectors<T>(f.value_depth);
    const int64_t rows = f.heads_each() * f.queries;
    keys_t = part(at, f.depth * kTileKeys), values_t = part(at, value_depth * kTileKeys);
    keys = part(at, kTileKeys * depth);
    dk = part(at, kTileKeys * depth), dv = part(at, kTileKeys * value_depth);
    q = part(at, kTileQueries * depth), grad = part(at, kTileQueries * value_depth);
    weights = part(at, kTileQueries * kTileKeys);
    kept = f.drops ? part(at, kTileQueries * kTileKeys) : weights;
    lse = part(at, rows), delta = part(at, rows);
  }

 private:
  T* part(T* at, int64_t n) {
    T* here = at ? at + size : nullptr;
    size += (n + 15) / 16 * 16;
    return here;
  }
};

// The work on one block of keys and one tile after the other of the queries that see it.
template <class T>
class KeyBlocks {
 public:
  KeyBlocks(const AttentionBackward<T>& a, const KeyChunk& keys, T* scratch)
      : a_(a),
        f_(a.forward),
        batch_(keys.batch),
        group_(keys.group),
        chunk_(keys.chunk),
        depth_(in_vectors<T>(f_.depth)),
        value_depth_(in_vectors<T>(f_.value_depth)),
        next_batch_(keys.next_batch),
        next_group_(keys.next_group),
        s_(a, scratch),
        few_(f_.heads_each() * f_.queries <= kFewRows) {}

  NNARCH_INLINE void run(int64_t first, int64_t end) {
    read_rows();
    const int64_t length = f_.key_length(batch_);
    const int64_t seen = length < first ? first : length < end ? length : end;
    for (int64_t key = first; key < seen; key += kTileKeys)
      block(key, seen - key < kTileKeys ? seen - key : kTileKeys);
    for (int64_t key = seen; key < end; ++key) zero_gradients(key);
    if (a_.d_lse) write_lse_gradient();
  }

 private:
  int64_t first_head() const { return group_ * f_.heads_each(); }

  // For each query the log-sum-exp in units of ln 2, and what its weights' gradients are less;
  // and zeros for dq.
  NNARCH_NOINLINE void read_rows() {
    for (int64_t h = 0; h < f_.heads_each(); ++h)
      for (int64_t i = 0; i < f_.queries; ++i) {
        const int64_t head = first_head() + h, at = h * f_.queries + i;
        const T lse = a_.lse.at(batch_, head, i);
        s_.lse[at] = lse == -kInfinity<T> ? T(0) : lse * T(kLog2E);
        T delta = dot<T>(a_.grad, a_.grad.at(batch_, head, i), f_.out, f_.out.at(batch_, head, i),
                         f_.value_depth);
        if (a_.grad_lse.data) delta -= a_.grad_lse.at(batch_, head, i);
        s_.delta[at] = delta;
        clear(dq_row(head, i), depth_);
      }
  }
  NNARCH_NOINLINE void write_lse_gradient() {
    const int64_t heads = (chunk_ * f_.batch + batch_) * f_.heads + first_head();
    for (int64_t i = 0; i < f_.heads_each() * f_.queries; ++i)
      a_.d_lse[heads * f_.queries + i] = s_.delta[i];
  }
  T* dq_row(int64_t head, int64_t i) const {
    return a_.dq_sum.at(batch_, head, i) + chunk_ * a_.dq_chunk;
  }

  NNARCH_NOINLINE void block(int64_t key, int64_t keys) {
    const Rows<T> k = dense_rows<T>(f_.k, f_.k.at(batch_, group_, key), keys, f_.depth, s_.keys);
    // A copy of the values goes where nothing is needed yet.
    T* copy = few_ ? s_.values_t : s_.dv;
    const Rows<T> v = dense_rows<T>(f_.v, f_.v.at(batch_, group_, key), keys, f_.value_depth, copy);
    if (!few_) {
      transpose_block<T>(k, keys, f_.depth, s_.keys_t);
      transpose_block<T>(v, keys, f_.value_depth, s_.values_t);
    }
    keys_ = k, values_ = v;
    fetch_ahead(key, keys);
    // Sums of dk and dv: in place where the rows lie one after the other.
    dk_ = sums_of(a_.dk, key, keys, f_.depth, s_.dk);
    dv_ = sums_of(a_.dv, key, keys, f_.value_depth, s_.dv);
    // The queries that see any of the keys.
    const Band all = {key - f_.high, key + keys - f_.low, 0, f_.queries};
    const int64_t first = Band::within(all.low, f_.queries) / kTileQueries * kTileQueries;
    const int64_t end = Band::within(all.high, f_.queries);
    for (int64_t h = 0; h < f_.heads_each(); ++h)
      for (int64_t i = first; i < end; i += kTileQueries) {
        const int64_t rows = f_.queries - i < kTileQueries ? f_.queries - i : kTileQueries;
        const Band band = {f_.low + i - key, f_.high + i - key, rows, keys};
        if (!band.empty()) tile({batch_, first_head() + h, i, key, band, in_vectors<T>(keys)}, h);
      }
    if (dk_ == s_.dk)
      for (int64_t j = 0; j < keys; ++j) put_row(a_.dk, key + j, dk_ + j * depth_, f_.depth);
    if (dv_ == s_.dv)
      for (int64_t j = 0; j < keys; ++j)
        put_row(a_.dv, key + j, dv_ + j * value_depth_, f_.value_depth);
  }
  NNARCH_INLINE T* sums_of(const Operand& o, int64_t key, int64_t keys, int64_t n, T* copy) {
    const bool in_place =
        o.in_place && n % kLanes<T> == 0 && o.row == n * static_cast<int64_t>(sizeof(T));
    T* sums = in_place ? reinterpret_cast<T*>(o.at(batch_, group_, key)) : copy;
    clear(sums, keys * in_vectors<T>(n));
    return sums;
  }
  // Where dk and dv will be written; then the next keys, or the next group with its queries.
  NNARCH_INLINE void fetch_ahead(int64_t key, int64_t keys) {
    const auto rows = [&](const Operand& o, const char* at, int64_t count, int64_t n) {
      const int64_t size = o.storage == Storage::native ? sizeof(T) : 2;
      if (o.column == size) fetch_.add(at, o.row, count, n * size);
    };
    rows(a_.dk, a_.dk.at(batch_, group_, key), keys, f_.depth);
    rows(a_.dv, a_.dv.at(batch_, group_, key), keys, f_.value_depth);
    int64_t b = batch_, g = group_, next = key + keys;
    if (next >= f_.keys) {
      b = next_batch_, g = next_group_, next = 0;
      const int64_t count = f_.queries < kFetchedQueries ? f_.queries : kFetchedQueries;
      const int64_t h = g * f_.heads_each();
      rows(a_.grad, a_.grad.at(b, h, 0), count, f_.value_depth);
      rows(f_.out, f_.out.at(b, h, 0), count, f_.value_depth);
      rows(a_.dq, a_.dq.at(b, h, 0), count, f_.depth);
      rows(f_.q, f_.q.at(b, h, 0), count, f_.depth);
    }
    const int64_t left = f_.keys - next < kTileKeys ? f_.keys - next : kTileKeys;
    rows(f_.k, f_.k.at(b, g, next), left, f_.depth);
    rows(f_.v, f_.v.at(b, g, next), left, f_.value_depth);
  }
  NNARCH_INLINE void put_row(const Operand& to, int64_t key, const T* from, int64_t n) {
    char* row = to.at(batch_, group_, key);
    for (int64_t d = 0; d < n; d += kLanes<T>)
      store_as<T>(to.storage, row + d * to.column, load(from + d), n - d);
  }
  NNARCH_INLINE void zero_gradients(int64_t key) {
    clear(s_.dk, depth_), clear(s_.dv, value_depth_);
    put_row(a_.dk, key, s_.dk, f_.depth), put_row(a_.dv, key, s_.dv, f_.value_depth);
  }

  NNARCH_NOINLINE void tile(const TilePlace& p, int64_t h) {
    const Seen seen = seen_in_tile(f_, p);
    if (seen == Seen::nothing) return;
    const Band& band = p.band;
    const int64_t at = h * f_.queries + p.query;
    const Rows<T> q =
        dense_rows<T>(f_.q, f_.q.at(batch_, p.head, p.query), band.rows, f_.depth, s_.q);
    const Rows<T> grad = dense_rows<T>(a_.grad, a_.grad.at(batch_, p.head, p.query), band.rows,
                                       f_.value_depth, s_.grad);
    // Tiles of scores that nothing sees are left out; in the other products the steps.
    const auto scores = [&](int64_t depth) {
      return [&band, depth](int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
        const bool seen = band.first_column(m0) < n1 && band.end_column(m1 - 1) > n0;
        return seen ? Steps{0, depth} : kNoTile;
      };
    };
    const auto by_keys = [&](int64_t m0, int64_t m1, int64_t, int64_t) {
      return Steps{band.first_row(m0), band.end_row(m1 - 1)};
    };
    const auto by_queries = [&](int64_t m0, int64_t m1, int64_t, int64_t) {
      return Steps{band.first_column(m0), band.end_column(m1 - 1)};
    };
    const auto over_keys = [&](const Product<T>& product, const Rows<T>& keys, int64_t depth) {
      if (few_)
        few_rows_product<T>(product, keys, band.rows, band.columns, in_vectors<T>(depth));
      else
        multiply_all<T>(product, band.rows, p.width, fetch_, scores(depth));
    };
    over_keys({q.data, q.step, 1, s_.keys_t, kTileKeys, s_.weights, kTileKeys, Finish::store},
              keys_, f_.depth);
    tile_weights(f_, p, seen, RowSums<T>(s_.lse + at, f_, a_.large, p), s_.weights, s_.kept);
    multiply_all<T>({s_.kept, 1, kTileKeys, grad.data, grad.step, dv_, value_depth_, Finish::add},
                    band.columns, value_depth_, fetch_, by_keys);
    const bool mask_gradient = a_.d_mask.data != nullptr;
    const T scale = mask_gradient ? T(1) : f_.scale;
    if (a_.weights_grad.data)
      given_gradient(a_, p, s_.kept, scale, s_.weights, s_.delta + at);
    else
      over_keys({grad.data, grad.step, 1, s_.values_t, kTileKeys, s_.weights, kTileKeys,
                 f_.drops ? Finish::dropped_scores_gradient : Finish::scores_gradient,
                 s_.delta + at, s_.kept, scale},
                values_, f_.value_depth);
    if (mask_gradient) add_mask_gradient(a_, p, s_.weights);
    multiply_all<T>({s_.weights, 1, kTileKeys, q.data, q.step, dk_, depth_, Finish::add},
                    band.columns, depth_, fetch_, by_keys);
    multiply_all<T>({s_.weights, kTileKeys, 1, keys_.data, keys_.step, dq_row(p.head, p.query),
                     a_.dq_sum.row, Finish::add},
                    band.rows, depth_, fetch_, by_queries);
  }

  const AttentionBackward<T>& a_;
  const Attention<T>& f_;
  const int64_t batch_, group_, chunk_, depth_, value_depth_;
  const int64_t next_batch_, next_group_;
  const Buffers<T> s_;
  const bool few_;             // queries of the group
  Rows<T> keys_{}, values_{};  // of the block
  T *dk_ = nullptr, *dv_ = nullptr;
  Fetch fetch_;
};

template <class T>
int64_t scratch_of(const AttentionBackward<T>& a) {
  return Buffers<T>(a, nullptr).size;
}

template <class T>
void run(const AttentionBackward<T>& a, const KeyChunk& keys, T* scratch) {
  KeyBlocks<T>(a, keys, scratch).run(keys.first, keys.end);
}

template <class T>
void finish(const AttentionBackward<T>& a, int64_t batch, int64_t head, int64_t first,
            int64_t end) {
  const int64_t depth = a.forward.depth;
  for (int64_t i = first; i < end; ++i) {
    const T* from = a.dq_sum.at(batch, head, i);
    char* to = a.dq.at(batch, head, i);
    for (int64_t d = 0; d < depth; d += kLanes<T>) {
      Vec<T> sum = load(from + d);
      for (int64_t c = 1; c < a.chunks; ++c) sum += load(from + d + c * a.dq_chunk);
      store_as<T>(a.dq.storage, to + d * a.dq.column, sum, depth - d);
    }
  }
}

}  // namespace

template <class T>
const AttentionBackwardTable<T>& attention_backward_table() {
  static constexpr AttentionBackwardTable<T> table = {kLanes<T>, kTileKeys, scratch_of<T>, run<T>,
                                                      finish<T>};
  return table;
}
template const AttentionBackwardTable<float>& attention_backward_table();
template const AttentionBackwardTable<double>& attention_backward_table();

}  // namespace nnarch::NNARCH_ISA
