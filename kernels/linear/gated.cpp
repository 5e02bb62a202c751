// gated_linear on the CPU: y = act(x·gateᵀ + gate_bias) ⊙ (x·upᵀ + up_bias).
//
// A block of both products is made in a scratch that stays in the second-level cache, and the gate
// closes over it there: neither product ever is in memory, and x is read once for both.
#include <algorithm>
#include <type_traits>

#include "activation/cpu_kernels.h"
#include "cpu/epilogue_fold.h"
#include "cpu/gather_gemm.h"
#include "cpu/pack_weight.h"
#include "cpu/registry.h"
#include "cpu/tensor.h"
#include "linear/cpu_half.h"
#include "linear/cpu_rows.h"

namespace nnarch {
namespace {

// One of the two products.
template <class T>
struct Branch {
  const Tensor& weight;  // [n, depth]
  const T* packed;       // or null
  Epilogue<T> bias;
};

template <class T>
struct GatedProblem {
  const Rows& x;
  Branch<T> gate, up;
  Stored y;  // [m, n]
  int64_t n, code;
  T alpha;

  // Rows of x in the type that is computed in.
  Reading<T> rows(int64_t row, int64_t count) const {
    return {Stored(x.tensor), {row * x.stride, x.depth, count, x.stride}};
  }

  // y from `at` on, of rows of both products that lie `stride` apart.
  void close(const T* gates, const T* ups, int64_t stride, int64_t rows, int64_t at,
             int64_t columns) const {
    const auto& table = NNARCH_SELECT(activation_table<T>());
    const Writing<T> out(y, {at, columns, rows, n});
    for (int64_t r = 0; r < rows; ++r)
      table.gate(gates + r * stride, ups + r * stride, out.get() + r * out.step(), columns, code,
                 alpha);
  }
};

// Columns of a weight packed, whatever type it is stored in.
template <class T>
void pack_stored_columns(const Tensor& w, int64_t first, int64_t n, T* packed) {
  if constexpr (std::is_same_v<T, float>)
    if (is_half(w.scalar_type())) return pack_half_columns(half_view(w), first, n, packed);
  pack_columns<T>(weight_view<T>(w).columns_from(first, n), packed);
}

// What that reads, to be fetched ahead; of float weights.
template <class T>
Later<T> stored_lines(const Tensor& w, int64_t first, int64_t n) {
  if (is_half(w.scalar_type())) return {};
  return lines_of(weight_view<T>(w).columns_from(first, n));
}

// Few rows: every weight is read once, in place.
template <class T>
void few_gated_rows(const GatedProblem<T>& p) {
  set_algorithm("gated_gemv");
  constexpr int64_t run = 64;
  const Reading<T> x = p.rows(0, p.x.m);
  parallel_tasks(ceil_div(p.n, run), [&](int64_t task) {
    const int64_t first = task * run, columns = std::min(run, p.n - first);
    T products[2][kFewRows * run];
    const Branch<T>* branches[] = {&p.gate, &p.up};
    for (int i = 0; i < 2; ++i) {
      const Stored w(branches[i]->weight);
      const int64_t step = branches[i]->weight.stride(0);
      const Epilogue<T> bias = branches[i]->bias.from_channel(first);
      if constexpr (std::is_same_v<T, float>)
        if (w.half) {
          w.half->few_rows(x.get(), x.step(), p.x.m, w.bits() + first * step, step, p.x.depth,
                           columns, products[i], run, bias);
          continue;
        }
      gemm<T>().few_rows(x.get(), x.step(), p.x.m, w.at<T>(first * step), step, p.x.depth, columns,
                         products[i], run, bias);
    }
    p.close(products[0], products[1], run, p.x.m, first, columns);
  });
}

// Panels of both weights; where they were packed just now, and what is packed after them.
template <class T>
struct BothPanels {
  const T *gate, *up;
  bool near = false;
  Later<T> gate_after = {}, up_after = {};
};

// Outputs [row, row + rows) × [column, column + columns).
template <class T>
void gated_block(const GatedProblem<T>& p, int64_t row, int64_t rows, int64_t column,
                 int64_t columns, const BothPanels<T>& panels) {
  const GemmTable<T>& table = gemm<T>();
  const int64_t stride = round_up(columns, table.nr);
  Scratch<T> gates(rows * stride), ups(rows * stride);
  const Reading<T> x = p.rows(row, rows);
  const Strip<T> strip{x.get(), 0, rows};
  GemmBlock<T> g{.depth = p.x.depth,
                 .b = panels.gate,
                 .b_after = panels.up,
                 .after = panels.gate_after,
                 .b_is_near = panels.near,
                 .c = gates.get(),
                 .n = columns,
                 .epilogue = p.gate.bias.from_channel(column),
                 .strips = &strip,
                 .strip_count = 1,
                 .a_step = x.step(),
                 .c_step = stride};
  table.run(g);
  g.b = panels.up, g.b_after = nullptr, g.after = panels.up_after, g.c = ups.get();
  g.epilogue = p.up.bias.from_channel(column);
  table.run(g);
  p.close(gates.get(), ups.get(), stride, rows, row * p.n + column, columns);
}

// As many rows of x as stay in cache beside the block's products.
template <class T>
int64_t rows_of_block(int64_t depth) {
  constexpr int64_t row_cache = int64_t{200} << 10;
  const int64_t row_bytes = std::clamp<int64_t>(depth, 1, 1024) * int64_t{sizeof(T)};
  return round_up(std::clamp<int64_t>(row_cache / row_bytes, 48, 196), gemm<T>().mr);
}

// Each task packs panels of both weights into cache and takes all rows past them.
template <class T>
void pack_and_gate(const GatedProblem<T>& p) {
  set_algorithm("gated_gemm");
  constexpr int64_t cache = int64_t{96} << 10;
  const int64_t nr = gemm<T>().nr, depth = p.x.depth, rows = rows_of_block<T>(depth);
  const int64_t panel_bytes = std::max<int64_t>(1, depth * nr * int64_t{sizeof(T)});
  const int64_t columns = nr * std::clamp<int64_t>(cache / panel_bytes, 1, 4);
  parallel_tasks(ceil_div(p.n, columns), [&](int64_t task) {
    const int64_t first = task * columns, n = std::min(columns, p.n - first);
    Scratch<T> gate_panels(packed_size<T>(n, 1, depth)), up_panels(packed_size<T>(n, 1, depth));
    pack_stored_columns<T>(p.gate.weight, first, n, gate_panels.get());
    pack_stored_columns<T>(p.up.weight, first, n, up_panels.get());
    const Later<T> gate_after = stored_lines<T>(p.gate.weight, first + n, columns),
                   up_after = stored_lines<T>(p.up.weight, first + n, columns);
    const int64_t blocks = ceil_div(p.x.m, rows);
    for (int64_t i = 0, row = 0; i < blocks; ++i, row += rows)
      gated_block<T>(p, row, std::min(rows, p.x.m - row), first, n,
                     {gate_panels.get(), up_panels.get(), gate_after.at != nullptr,
                      gate_after.part(i, i + 1, blocks), up_after.part(i, i + 1, blocks)});
  });
}

template <class T>
void packed_gated(const GatedProblem<T>& p) {
  set_algorithm("gated_gemm_packed");
  constexpr int64_t most_columns = 128;
  const int64_t nr = gemm<T>().nr, rows = rows_of_block<T>(p.x.depth);
  const int64_t columns = round_up(ceil_div(p.n, ceil_div(p.n, most_columns)), nr);
  const int64_t column_blocks = ceil_div(p.n, columns), row_blocks = ceil_div(p.x.m, rows);
  // Rows pass a block of both weights in L2 where that reads less, as in gather_gemm.
  const bool rows_inside = 2 * columns * p.x.depth * int64_t{sizeof(T)} <= l2_bytes() / 2 &&
                           column_blocks * p.x.m < row_blocks * 2 * p.n;
  parallel_tasks(row_blocks * column_blocks, [&](int64_t task) {
    const int64_t row = rows * (rows_inside ? task % row_blocks : task / column_blocks);
    const int64_t column = columns * (rows_inside ? task / row_blocks : task % column_blocks);
    gated_block<T>(p, row, std::min(rows, p.x.m - row), column, std::min(columns, p.n - column),
                   {p.gate.packed + column * p.x.depth, p.up.packed + column * p.x.depth});
  });
}

template <class T>
Tensor pack_both(const Tensor& gate, const Tensor& up) {
  const int64_t n = gate.size(0), depth = gate.size(1), nr = gemm<T>().nr;
  const int64_t size = packed_size<T>(n, 1, depth), panels = ceil_div(n, nr);
  Tensor packed = new_packed(checked_product(2, size), compute_type(gate.scalar_type()));
  T* to = mutable_data<T>(packed);
  parallel_tasks(2 * panels, [&](int64_t task) {
    const int64_t first = task % panels * nr;
    pack_stored_columns<T>(task < panels ? gate : up, first, std::min(nr, n - first),
                           to + task / panels * size + first * depth);
  });
  return packed;
}

// Half types are packed along a dense dimension.
Tensor one_dense(const Tensor& w) { return is_half(w.scalar_type()) ? dense_weight(w) : w; }

void check_weights(const Tensor& gate, const Tensor& up, const char* message) {
  require(gate.dim() == 2 && up.dim() == 2 && gate.size(0) == up.size(0) &&
              gate.size(1) == up.size(1) && gate.scalar_type() == up.scalar_type(),
          message);
}

Tensor gated_linear_pack(const Tensor& gate_in, const Tensor& up_in) {
  check_weights(gate_in, up_in, "gated_linear_pack: the weights must be matrices of one shape");
  const Tensor gate = one_dense(gate_in), up = one_dense(up_in);
  return with_scalar_type(gate.scalar_type(), "gated_linear_pack",
                          [&](auto scalar) { return pack_both<decltype(scalar)>(gate, up); });
}

template <class T>
void run_gated(GatedProblem<T> p, const OptTensor& given) {
  const Tensor &gate = p.gate.weight, &up = p.up.weight;
  if (p.x.m == 0 || p.n == 0) return;
  const bool dense = gate.stride(1) == 1 && up.stride(1) == 1;
  if (p.x.m <= kFewRows && dense && p.x.depth > 0) return few_gated_rows<T>(p);
  const int64_t size = packed_size<T>(p.n, 1, p.x.depth);
  if (given)
    require(given->numel() == 2 * size && given->is_contiguous() &&
                given->scalar_type() == compute_type(gate.scalar_type()),
            "gated_linear: packed does not belong to these weights");
  if (!given && p.x.m <= kManyRows) return pack_and_gate<T>(p);
  const Tensor packed = given ? *given : pack_both<T>(gate, up);
  p.gate.packed = data<T>(packed), p.up.packed = p.gate.packed + size;
  packed_gated<T>(p);
}

Tensor gated_linear(const Tensor& x_in, const Tensor& gate_in, const Tensor& up_in,
                    const OptTensor& gate_bias_in, const OptTensor& up_bias_in,
                    const OptTensor& packed, int64_t activation, double alpha) {
  const ScalarType type = x_in.scalar_type();
  check_weights(gate_in, up_in, "gated_linear: the weights must be matrices of one shape");
  require(x_in.dim() >= 1 && gate_in.scalar_type() == type, "gated_linear: dtypes differ");
  require(x_in.size(x_in.dim() - 1) == gate_in.size(1), "gated_linear: sizes do not match");
  IntList out = sizes_of(x_in);
  out.back() = gate_in.size(0);
  const OptTensor none;
  check_epilogue({gate_bias_in, up_bias_in, none, none, activation, alpha}, out.back(), type);
  const Tensor gate = one_dense(gate_in), up = one_dense(up_in);
  const OptTensor gate_bias = to_compute_type(gate_bias_in), up_bias = to_compute_type(up_bias_in);
  const Rows x = as_rows(x_in);
  const Tensor y = new_contiguous(out, type);
  with_scalar_type(type, "gated_linear", [&](auto scalar) {
    using T = decltype(scalar);
    const FoldedEpilogue<T> of_gate({gate_bias, none, none, none, kNone, 0}, out.back());
    const FoldedEpilogue<T> of_up({up_bias, none, none, none, kNone, 0}, out.back());
    run_gated<T>({x,
                  {gate, nullptr, of_gate.get()},
                  {up, nullptr, of_up.get()},
                  Stored(y),
                  out.back(),
                  activation,
                  static_cast<T>(alpha)},
                 packed);
  });
  return y;
}

}  // namespace
}  // namespace nnarch

NNARCH_OPS(gated_linear, ops) {
  ops.impl("gated_linear", TORCH_BOX(&nnarch::gated_linear));
  ops.impl("gated_linear_pack", TORCH_BOX(&nnarch::gated_linear_pack));
}
