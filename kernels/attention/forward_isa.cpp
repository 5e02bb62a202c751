// Attention's forward for any number of queries: online softmax over blocks of keys, by tiles of
// two vectors of queries.
#include "attention/drop_isa.h"
#include "attention/few_isa.h"
#include "attention/tile_isa.h"
#include "attention/tile_rows_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

// Tiles of a task: so often is a block of keys used while it is in cache.
constexpr int kTiles = 4;
// Keys of a block at most; a multiple of kPiece and of 4.
constexpr int64_t kBlock = 132;

// One block of keys: keys [first + begin, first + end) of it may be seen.
template <class T>
struct Block {
  int64_t first, begin, end;
  RowsInMemory<T> k, v;  // from `first` on
  const T* key_bias;     // the same for all queries, or null
};

// What the next task will read, line by line, while this one computes.
template <class T>
struct Upcoming {
  struct Region {
    const T* at;
    int64_t lines;
  };
  Region regions[3];
  int count = 0, now = 0;
  const T* idle;  // a line that is in cache anyway

  void add(const char* at, int64_t bytes) {
    regions[count++] = {reinterpret_cast<const T*>(at), bytes / 64};
  }
  // Lines for a product of so many steps.
  NNARCH_INLINE Fetch<T> take(int64_t steps) {
    while (now < count && regions[now].lines <= 0) ++now;
    if (now == count) return {idle, 0};
    Region& region = regions[now];
    const Fetch<T> fetch{region.at, kLine<T>};
    region.at += steps * kLine<T>, region.lines -= steps;
    return fetch;
  }
};

template <class T>
struct Workspace {
  Power<T> power;
  T* scores = nullptr;           // [kBlock][kTile]
  T* bias = nullptr;             // [kBlock][kTile], or bytes of a boolean mask
  T* key_bias = nullptr;         // [kBlock in whole vectors]
  T *k = nullptr, *v = nullptr;  // copies of a block
  Upcoming<T> upcoming{};
  bool query_masks = false;  // queries have rows of the mask of their own
};

// Adds the biases to scores [begin, end) of a tile and hides what it may not see; the maxima.
template <class T>
struct Conditions {
  const T* bias;      // [key][kTile], or null
  const char* shown;  // [key][kTile]: 0 hides; or null
  const T* key_bias;  // [key], or null
  bool boolean;       // whether `key_bias` only hides
  bool banded;
  alignas(kVectorBytes) T first[kTile<T>], end[kTile<T>];  // of the visible keys, in the block

  bool masked() const { return bias || shown || key_bias; }
  void apply(T* scores, int64_t begin, int64_t count, T* top) const;
};

// score = f(score, key, half) for scores [begin, begin + count), and their maxima.
template <class T, class F>
NNARCH_INLINE void each_score(T* scores, int64_t begin, int64_t count, T* top, const F& f) {
  constexpr int w = kLanes<T>;
  for (int half = 0; half < kTile<T>; half += w) {
    Vec<T> most = load(top + half);
    for (int64_t j = begin; j < begin + count; ++j) {
      const Vec<T> s = f(load(scores + j * kTile<T> + half), j, half);
      store(scores + j * kTile<T> + half, s);
      most = at_least<T>(s, most);
    }
    store(top + half, most);
  }
}

template <class T>
NNARCH_NOINLINE void Conditions<T>::apply(T* scores, int64_t begin, int64_t count, T* top) const {
  const auto hide = [&](Vec<T> s, int64_t j, int half) NNARCH_INLINE_LAMBDA {
    return hide_where_zero<T>(s, shown + j * kTile<T> + half);
  };
  const auto add = [&](Vec<T> s, int64_t j, int half)
                       NNARCH_INLINE_LAMBDA { return s + load(bias + j * kTile<T> + half); };
  if (shown && !banded) return each_score(scores, begin, count, top, hide);
  if (bias && !banded) return each_score(scores, begin, count, top, add);
  const Vec<T> hidden = broadcast(-kInfinity<T>);
  each_score(scores, begin, count, top, [&](Vec<T> s, int64_t j, int half) NNARCH_INLINE_LAMBDA {
    if (shown) s = hide(s, j, half);
    if (bias) s = add(s, j, half);
    if (key_bias) s = boolean && key_bias[j] != T(0) ? hidden : s + key_bias[j];
    if (banded) {
      const Vec<T> at = broadcast(static_cast<T>(j));
      s = at >= load(first + half) ? s : hidden;
      s = at < load(end + half) ? s : hidden;
    }
    return s;
  });
}

// What the masks of queries do to keys [begin, end) of the block.
template <class T>
NNARCH_NOINLINE Seen mask_tile(const Attention<T>& a, const Tile<T>& t, const Block<T>& block,
                               int64_t begin, int64_t end, T* room, Conditions<T>& c) {
  const int64_t first = block.first + begin, n = end - begin, at = begin * kTile<T>;
  if (!a.mask.boolean) {
    turn_added<T>(a.mask, t.mask, t.count, first, n, room + at);
    c.bias = room;
    return Seen::some;
  }
  const int64_t column = a.mask.values.column;
  const Seen seen = seen_of_tile(t.mask, t.count, first, n, column);
  if (seen != Seen::some) return seen;
  char* bytes = reinterpret_cast<char*>(room);
  turn_boolean<T>(t.mask, t.count, first, n, column, bytes + at);
  c.shown = bytes;
  return seen;
}

// What the mask and the band do to keys [begin, end) of the block.
template <class T>
NNARCH_INLINE Seen conditions_of(const Attention<T>& a, const Tile<T>& t, const Block<T>& block,
                                 int64_t begin, int64_t end, Workspace<T>& work, Conditions<T>& c) {
  c.bias = nullptr, c.shown = nullptr;
  c.key_bias = block.key_bias;
  c.boolean = a.mask.boolean;
  if (work.query_masks && mask_tile<T>(a, t, block, begin, end, work.bias, c) == Seen::nothing)
    return Seen::nothing;
  c.banded = t.most_first > block.first + begin || t.least_end < block.first + end;
  if (c.banded)
    for (int i = 0; i < kTile<T>; ++i) {
      const int64_t first = t.first_key[i] - block.first, last = t.end_key[i] - block.first;
      c.first[i] = static_cast<T>(first < 0 ? 0 : first > kBlock ? kBlock : first);
      c.end[i] = static_cast<T>(last < 0 ? 0 : last > kBlock ? kBlock : last);
    }
  return Seen::some;
}

// Scores to weights: scores[j] = 2^(unit · (scores[j] - top)), and their sums.
template <class T, Used Use>
NNARCH_NOINLINE void weigh(T* scores, int64_t count, Power<T> power, const T* top, T* sums) {
  constexpr int w = kLanes<T>;
  const Vec<T> t0 = load(top), t1 = load(top + w);
  Vec<T> s0{}, s1{};
#pragma GCC unroll 2
  for (int64_t j = 0; j < count; ++j, scores += 2 * w) {
    const Vec<T> p0 = power(load(scores) - t0);
    s0 += p0;
    store(scores, p0);
    if constexpr (Use == kBothVectors) {
      const Vec<T> p1 = power(load(scores + w) - t1);
      s1 += p1;
      store(scores + w, p1);
    }
  }
  store(sums, s0), store(sums + w, s1);
}

template <class T>
NNARCH_NOINLINE void drop(const Attention<T>& a, const Tile<T>& t, const Block<T>& block,
                          int64_t begin, int64_t end, T* scores) {
  constexpr int words = kLanes<float>;
  constexpr int64_t lanes = kTile<T> < words ? words : kTile<T>;
  static_assert(lanes == kTile<T>);
  alignas(kVectorBytes) T factors[4 * lanes];
  for (int64_t j = (block.first + begin) / 4 * 4; j < block.first + end; j += 4) {
    quad_factors<T>(a, j / 4, t.query, t.outer, lanes, factors);
    for (int64_t key = 0; key < 4; ++key) {
      const int64_t at = j + key - block.first;
      if (at < begin || at >= end) continue;
      for (int64_t i = 0; i < lanes; i += kLanes<T>) {
        T* p = scores + at * kTile<T> + i;
        store(p, load(p) * load(factors + key * lanes + i));
      }
    }
  }
}

// The running maximum and sum go on; `rescale` is what earlier sums are multiplied by.
template <class T, Used Use>
NNARCH_INLINE void soften(Tile<T>& t, const Power<T>& power, const T* block_top, T* scores,
                          int64_t count, T* rescale) {
  constexpr int w = kLanes<T>;
  alignas(kVectorBytes) T top[kTile<T>], sums[kTile<T>];
  for (int half = 0; half < kTile<T>; half += w) {
    const Vec<T> before = load(t.top + half);
    const Vec<T> most = at_least<T>(load(block_top + half), before);
    const Vec<T> used = most == -kInfinity<T> ? Vec<T>{} : most;  // -inf - -inf would be NaN
    store(t.top + half, most);
    store(top + half, used);
    store(rescale + half, power(before - used));
  }
  weigh<T, Use>(scores, count, power, top, sums);
  for (int half = 0; half < kTile<T>; half += w)
    store(t.sum + half, load(t.sum + half) * load(rescale + half) + load(sums + half));
}

template <class T, Used Use>
NNARCH_NOINLINE void visit(const Attention<T>& a, Tile<T>& t, const Block<T>& block,
                           Workspace<T>& work) {
  int64_t begin = t.least_first - block.first, end = t.most_end - block.first;
  begin = begin < block.begin ? block.begin : begin;
  end = end > block.end ? block.end : end;
  if (begin >= end) return;
  Conditions<T> conditions;
  if (conditions_of(a, t, block, begin, end, work, conditions) == Seen::nothing) return;
  const int64_t all_from = t.most_first - block.first, all_to = t.least_end - block.first;
  const bool masked = conditions.masked();
  alignas(kVectorBytes) T top[kTile<T>], unused[kTile<T>], rescale[kTile<T>];
  for (int i = 0; i < kTile<T>; ++i) top[i] = unused[i] = -kInfinity<T>;
  in_pieces(begin, end, [&](auto size, int64_t j) NNARCH_INLINE_LAMBDA {
    constexpr int n = size.value;
    const bool plain = !masked && j >= all_from && j + n <= all_to;
    score_piece<T, Use, n>(t.q, a.depth, block.k.data + j * block.k.step, block.k.step,
                           work.upcoming.take(a.depth), work.scores + j * kTile<T>,
                           plain ? top : unused);
    if (!plain) conditions.apply(work.scores, j, n, top);
  });
  T* const scores = work.scores + begin * kTile<T>;
  soften<T, Use>(t, work.power, top, scores, end - begin, rescale);
  if (a.drops) drop(a, t, block, begin, end, work.scores);
  const T* v = block.v.data + begin * block.v.step;
  in_pieces(0, a.value_depth, [&](auto size, int64_t d) NNARCH_INLINE_LAMBDA {
    weigh_piece<T, Use, size.value>(scores, end - begin, v + d, block.v.step,
                                    work.upcoming.take(end - begin), t.started ? rescale : nullptr,
                                    t.out + d * kTile<T>);
  });
  t.started = true;
}

// Whether all queries of a task have one row of the mask.
template <class T>
NNARCH_INLINE bool shares_mask(const Attention<T>& a, const QueryRows& rows) {
  const Operand& m = a.mask.values;
  const bool one_head = rows.first / a.queries == (rows.first + rows.count - 1) / a.queries;
  return (m.head == 0 || one_head) && (m.row == 0 || a.queries == 1);
}

// A mask of keys: trims the block to what it lets see, and sets its biases where some are left.
template <class T>
NNARCH_INLINE void mask_keys(const Attention<T>& a, const char* row, int64_t keys, T* bias,
                             Block<T>& block) {
  bias_row<T>(a.mask, row + block.first * a.mask.values.column, keys, bias);
  while (block.begin < block.end && bias[block.begin] == -kInfinity<T>) ++block.begin;
  while (block.begin < block.end && bias[block.end - 1] == -kInfinity<T>) --block.end;
  for (int64_t j = block.begin; j < block.end; ++j)
    if (bias[j] != T(0)) block.key_bias = bias;
}

// K, V and Q of the head that comes next, where the last rows of one are at work and the next is
// dense and not too long: 128 keys of 64 run at 76 GFLOP/s without.
template <class T>
NNARCH_INLINE void look_ahead(const Attention<T>& a, const QueryRows& rows, Upcoming<T>& upcoming) {
  constexpr int64_t most = 64 << 10;  // bytes of one operand
  const int64_t stacked = (rows.first + rows.count - 1) / a.queries + 1;
  if (rows.first + rows.count < stacked * a.queries) return;
  int64_t batch = rows.batch, head = rows.head + stacked;
  if (head >= a.heads) ++batch, head = 0;
  if (batch >= a.batch) return;
  const auto add = [&](const Operand& o, int64_t h, int64_t n, int64_t depth) NNARCH_INLINE_LAMBDA {
    const int64_t row = depth * static_cast<int64_t>(sizeof(T));
    if (o.in_place && o.row == row && n * row <= most) upcoming.add(o.at(batch, h, 0), n * row);
  };
  const int64_t group = head / a.heads_each();
  if (batch != rows.batch || group != rows.head / a.heads_each()) {
    add(a.k, group, a.keys, a.depth);
    add(a.v, group, a.keys, a.value_depth);
  }
  add(a.q, head, a.queries < 128 ? a.queries : 128, a.depth);
}

template <class T>
struct ScratchPlan {
  int64_t k, v, scores, bias, key_bias, tile_q, tile_out;

  explicit ScratchPlan(const Attention<T>& a)
      : k(a.k.in_place ? 0 : kBlock * whole_vectors<T>(a.depth)),
        v(a.v.in_place ? 0 : kBlock * whole_vectors<T>(a.value_depth)),
        scores(kBlock * kTile<T>),
        bias(a.mask.values.data ? scores : 0),
        key_bias(a.mask.values.data ? whole_vectors<T>(kBlock) : 0),
        tile_q(a.depth * kTile<T>),
        tile_out(whole_vectors<T>(a.value_depth) * kTile<T>) {}
  int64_t total(int64_t tiles) const {
    return k + v + scores + bias + key_bias + tiles * (tile_q + tile_out + 2 * kTile<T>);
  }
};

template <class T>
NNARCH_INLINE T* take(T*& scratch, int64_t count) {
  T* at = scratch;
  scratch += count;
  return at;
}

template <class T>
void run_tiles(const Attention<T>& a, const QueryRows& rows, const KeyRange<T>& keys, T* scratch) {
  const ScratchPlan<T> plan(a);
  Workspace<T> work{.power = power_of(a)};
  work.scores = take(scratch, plan.scores);
  work.bias = take(scratch, plan.bias);
  work.key_bias = take(scratch, plan.key_bias);
  work.k = take(scratch, plan.k), work.v = take(scratch, plan.v);
  work.upcoming.idle = work.scores;
  look_ahead(a, rows, work.upcoming);
  Tile<T> tiles[kTiles];
  const int64_t count = (rows.count + kTile<T> - 1) / kTile<T>;
  int64_t first = INT64_MAX, end = 0;
  for (int64_t i = 0; i < count; ++i) {
    Tile<T>& t = tiles[i];
    t.first = i * kTile<T>;
    t.count = rows.count - t.first < kTile<T> ? rows.count - t.first : kTile<T>;
    t.started = false;
    t.q = take(scratch, plan.tile_q), t.out = take(scratch, plan.tile_out);
    t.top = take(scratch, kTile<T>), t.sum = take(scratch, kTile<T>);
    for (int lane = 0; lane < kTile<T>; ++lane) t.top[lane] = -kInfinity<T>, t.sum[lane] = T(0);
    see_keys(a, rows, keys, t);
    pack_queries(a, rows, t);
    first = t.least_first < first ? t.least_first : first;
    end = t.most_end > end ? t.most_end : end;
  }
  const int64_t group = rows.head / a.heads_each();
  const bool key_mask = a.mask.values.data && shares_mask(a, rows);
  work.query_masks = a.mask.values.data && !key_mask;
  // Blocks of equal size, from a multiple of 4 on (dropout).
  first = first / 4 * 4;
  const int64_t blocks = first < end ? (end - first + kBlock - 1) / kBlock : 0;
  const int64_t size = blocks > 0 ? ((end - first + blocks - 1) / blocks + 3) / 4 * 4 : 0;
  for (int64_t j = first; j < end; j += size) {
    const int64_t n = end - j < size ? end - j : size;
    Block<T> block{j, 0, n, {}, {}, nullptr};
    if (key_mask) mask_keys(a, tiles[0].mask[0], n, work.key_bias, block);
    if (block.begin >= block.end) continue;
    block.k = readable_rows(a.k, a.k.at(rows.batch, group, j), n, a.depth, work.k);
    block.v = readable_rows(a.v, a.v.at(rows.batch, group, j), n, a.value_depth, work.v);
    for (int64_t i = 0; i < count; ++i) {
      if (tiles[i].narrow())
        visit<T, kOneVector>(a, tiles[i], block, work);
      else
        visit<T, kBothVectors>(a, tiles[i], block, work);
    }
  }
  for (int64_t i = 0; i < count; ++i) write_rows(a, rows, keys, tiles[i]);
}

template <class T>
int64_t scratch_elements(const Attention<T>& a, int64_t rows) {
  const int64_t tiles = ScratchPlan<T>(a).total((rows + kTile<T> - 1) / kTile<T>);
  const int64_t few = few_scratch(a);
  return tiles > few ? tiles : few;
}

template <class T>
constexpr AttentionTable<T> kTable = {kTile<T>,     kTiles,     kFewRows<T>, scratch_elements<T>,
                                      run_tiles<T>, run_few<T>, combine<T>};

}  // namespace

template <>
const AttentionTable<float>& attention_table<float>() {
  return kTable<float>;
}
template <>
const AttentionTable<double>& attention_table<double>() {
  return kTable<double>;
}

}  // namespace nnarch::NNARCH_ISA
