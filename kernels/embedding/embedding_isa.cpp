// Rows of tables: gathered, summed, normalized; and gradients back to them.
#include "embedding/cpu_kernels.h"
#include "embedding/rows_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
void sum(const EmbeddingSum<T>& e, const DropoutRule* rule, T* factors, T* y, int64_t first,
         int64_t last, bool past_caches) {
  const int64_t columns = e.columns;
  over_rows(e, first, last, [&](int64_t row) NNARCH_INLINE_LAMBDA {
    const Sources<T> from(e, row);
    T* to = y + row * columns;
    if (rule) {
      dropout_factors<T>(*rule, 0, static_cast<uint32_t>(row), columns, factors);
      over_columns<T>(columns, [&](int64_t c, int64_t n, int) NNARCH_INLINE_LAMBDA {
        put(to + c, from.at(c, n) * load(factors + c), n, past_caches);
      });
    } else {
      over_columns<T>(columns, [&](int64_t c, int64_t n, int) NNARCH_INLINE_LAMBDA {
        put(to + c, from.at(c, n), n, past_caches);
      });
    }
  });
  if (past_caches) finish_streaming();
}

// Ones for the first n lanes, zeros after them.
template <class T>
NNARCH_INLINE Vec<T> first_lanes(int64_t n) {
  alignas(kVectorBytes) T ones[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) ones[i] = T{1};
  return load(ones);
}

// The sum of a row goes to `work`, rounded up to whole vectors; returns its mean and 1/σ.
template <class T>
NNARCH_INLINE void row_statistics(const Sources<T>& from, int64_t columns, T eps, T* work, T& mean,
                                  T& invstd) {
  RowSum<T> sums, squares;
  over_columns<T>(columns, [&](int64_t c, int64_t n, int k) NNARCH_INLINE_LAMBDA {
    const Vec<T> h = from.at(c, n);
    store(work + c, h);
    sums.add(k, h);
  });
  mean = sums.total() / static_cast<T>(columns);
  const Vec<T> middle = broadcast(mean);
  over_columns<T>(columns, [&](int64_t c, int64_t n, int k) NNARCH_INLINE_LAMBDA {
    Vec<T> d = load(work + c) - middle;
    if (n < kLanes<T>) d *= first_lanes<T>(n);
    squares.add(k, d * d);
  });
  const T var = squares.total() / static_cast<T>(columns);
  invstd = T{1} / static_cast<T>(__builtin_sqrt(static_cast<double>(var + eps)));
}

template <class T>
void normalize(const EmbeddingSum<T>& e, const RowNorm<T>& norm, const DropoutRule* rule, T* work,
               T* y, T* means, T* invstds, int64_t first, int64_t last, bool past_caches) {
  const int64_t columns = e.columns;
  // Locals stay in registers: a store of floats may change what a reference refers to.
  const T *weight = norm.weight, *bias = norm.bias;
  T* factors = work + (columns + kRowPad - 1) / kRowPad * kRowPad;
  over_rows(e, first, last, [&](int64_t row) NNARCH_INLINE_LAMBDA {
    T mean, invstd;
    row_statistics<T>(Sources<T>(e, row), columns, norm.eps, work, mean, invstd);
    means[row] = mean, invstds[row] = invstd;
    if (rule) dropout_factors<T>(*rule, 0, static_cast<uint32_t>(row), columns, factors);
    T* to = y + row * columns;
    const Vec<T> middle = broadcast(mean), scale = broadcast(invstd);
    over_columns<T>(columns, [&](int64_t c, int64_t n, int) NNARCH_INLINE_LAMBDA {
      Vec<T> v = (load(work + c) - middle) * scale;
      if (weight) v *= load_n(weight + c, n);
      if (bias) v += load_n(bias + c, n);
      if (rule) v *= load(factors + c);
      put(to + c, v, n, past_caches);
    });
  });
  if (past_caches) finish_streaming();
}

template <class T>
void normalize_grad(const EmbeddingSum<T>& e, const RowNorm<T>& norm, const DropoutRule* rule,
                    T* work, const T* grad, const T* means, const T* invstds, T* dx, T* d_weight,
                    T* d_bias, int64_t first, int64_t last) {
  const int64_t columns = e.columns;
  const T* weight = norm.weight;
  T* factors = work + (columns + kRowPad - 1) / kRowPad * kRowPad;
  over_rows(e, first, last, [&](int64_t row) NNARCH_INLINE_LAMBDA {
    const Sources<T> from(e, row);
    const T* dy = grad + row * columns;
    T* to = dx + row * columns;
    const Vec<T> middle = broadcast(means[row]), scale = broadcast(invstds[row]);
    if (rule) dropout_factors<T>(*rule, 0, static_cast<uint32_t>(row), columns, factors);
    RowSum<T> along_one, along_x;
    over_columns<T>(columns, [&](int64_t c, int64_t n, int k) NNARCH_INLINE_LAMBDA {
      const Vec<T> x = (from.at(c, n) - middle) * scale;
      Vec<T> g = load_n(dy + c, n);  // zero past the end
      if (rule) g *= load(factors + c);
      store(d_weight + c, load(d_weight + c) + g * x);
      store(d_bias + c, load(d_bias + c) + g);
      if (weight) g *= load_n(weight + c, n);
      along_one.add(k, g);
      along_x.add(k, g * x);
      store(work + c, x);
      store_n(to + c, g, n);
    });
    const Vec<T> one = broadcast(along_one.total() / static_cast<T>(columns));
    const Vec<T> slope = broadcast(along_x.total() / static_cast<T>(columns));
    over_columns<T>(columns, [&](int64_t c, int64_t n, int) NNARCH_INLINE_LAMBDA {
      store_n(to + c, (load_n(to + c, n) - one - load(work + c) * slope) * scale, n);
    });
  });
}

// Columns [c, c + Count vectors) of the sum of the gradients that lie at order[0] … order[n - 1].
template <class T, int... I>
NNARCH_INLINE void scatter_columns(Indices<I...>, const EmbeddingScatter<T>& s,
                                   const int64_t* order, int64_t n, T factor, int64_t c, T* to) {
  constexpr int w = kLanes<T>;
  Vec<T> acc[sizeof...(I)] = {(static_cast<void>(I), Vec<T>{})...};
  for (int64_t i = 0; i < n; ++i) {
    const T* from = s.grad + order[i] * s.columns + c;
    ((acc[I] += load(from + I * w)), ...);
  }
  if (s.stream)
    (stream(to + I * w, acc[I] * factor), ...);
  else
    (store(to + I * w, acc[I] * factor), ...);
}

template <class T>
void scatter(const EmbeddingScatter<T>& s, T* table_grad, int64_t first, int64_t last, int64_t from,
             int64_t to) {
  constexpr int64_t w = kLanes<T>, at_once = 8;
  for (int64_t v = first; v < last; ++v) {
    const int64_t n = v == s.skipped ? 0 : s.start[v + 1] - s.start[v];
    if (n == 0 && s.zeros) continue;
    const int64_t* order = s.order + s.start[v];
    const T factor = s.mean && n > 0 ? s.scale / static_cast<T>(n) : s.scale;
    T* row = table_grad + v * s.columns;
    int64_t c = from;
    for (; c + at_once * w <= to; c += at_once * w)
      scatter_columns<T>(MakeIndices<at_once>{}, s, order, n, factor, c, row + c);
    for (; c + w <= to; c += w)
      scatter_columns<T>(MakeIndices<1>{}, s, order, n, factor, c, row + c);
    if (c < to) {
      Vec<T> acc{};
      for (int64_t i = 0; i < n; ++i) acc += load_n(s.grad + order[i] * s.columns + c, to - c);
      store_n(row + c, acc * factor, to - c);
    }
  }
  if (s.stream) finish_streaming();
}

void copy_rows(const char* weight, const int64_t* tokens, char* y, int64_t rows, int64_t bytes,
               bool past_caches) {
  if (!past_caches || bytes % kVectorBytes != 0) {
    for (int64_t r = 0; r < rows; ++r)
      __builtin_memcpy(y + r * bytes, weight + tokens[r] * bytes, static_cast<size_t>(bytes));
    return;
  }
  const int64_t n = bytes / static_cast<int64_t>(sizeof(float));
  for (int64_t r = 0; r < rows; ++r) {
    const auto* from = reinterpret_cast<const float*>(weight + tokens[r] * bytes);
    auto* to = reinterpret_cast<float*>(y + r * bytes);
    if (r + 1 < rows) prefetch_row(weight + tokens[r + 1] * bytes, bytes);
    for (int64_t c = 0; c < n; c += kLanes<float>) stream(to + c, load(from + c));
  }
  finish_streaming();
}

template <class T>
constexpr EmbeddingTable<T> kTable = {sum<T>, normalize<T>, normalize_grad<T>, scatter<T>};

}  // namespace

template <>
const EmbeddingTable<float>& embedding_table<float>() {
  return kTable<float>;
}
template <>
const EmbeddingTable<double>& embedding_table<double>() {
  return kTable<double>;
}
CopyRowsFn copy_rows_fn() { return copy_rows; }

}  // namespace nnarch::NNARCH_ISA
