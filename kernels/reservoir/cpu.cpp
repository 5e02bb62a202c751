// Sparse reservoirs on the CPU: checks, packing, and the tasks that a batch is cut into.
#include <algorithm>
#include <tuple>

#include "cpu/arena.h"
#include "cpu/machine.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"
#include "reservoir/cpu_kernels.h"
#include "reservoir/cpu_pack.h"

namespace nnarch {
namespace {

constexpr const char* kBadMatrix = "reservoir_pack: values, columns and rows are no square matrix";

template <class T>
Tensor pack_as(const Tensor& values, const Tensor& columns, const Tensor& rows) {
  return pack_rows(checked_rows(values, columns, rows, kBadMatrix), data<T>(values),
                   values.scalar_type());
}

Tensor reservoir_pack(const Tensor& values, const Tensor& columns, const Tensor& rows) {
  require(columns.scalar_type() == ScalarType::Int && rows.scalar_type() == ScalarType::Int &&
              values.dim() == 1 && columns.dim() == 1 && rows.dim() == 1 && rows.numel() > 0,
          kBadMatrix);
  const Tensor v = as_contiguous(to_compute_type(values));
  const Tensor c = torch::stable::contiguous(columns), r = torch::stable::contiguous(rows);
  return with_scalar_type(v.scalar_type(), "reservoir_pack",
                          [&](auto scalar) { return pack_as<decltype(scalar)>(v, c, r); });
}

// ------------------------------------------------------------------------------- both scans

// Fewer batch rows than this are faster one by one than as a block of vectors: a nonzero of a block
// takes three times as long as one of a row, for up to 16 rows (README.md).
constexpr int64_t kFewRows = 4;

template <class T>
void run(Scan<T>& a) {
  const auto& table = NNARCH_SELECT(scan_table<T>());
  const int64_t rest = a.batch % table.lanes;
  const int64_t alone = rest < kFewRows ? rest : 0;
  const int64_t blocks = ceil_div(a.batch - alone, table.lanes);
  set_algorithm(blocks ? "block" : "row");
  parallel_tasks(blocks + alone, [&](int64_t task) {
    if (task < blocks) {
      const Scratch<T> scratch(scan_scratch(a, table.lanes));
      const int64_t first = task * table.lanes;
      table.block(a, first, std::min(table.lanes, a.batch - alone - first), scratch.get());
    } else {
      const Scratch<T> scratch(scan_scratch(a, 1));
      table.row(a, a.batch - alone + (task - blocks), scratch.get());
    }
  });
}

// A contiguous tensor of the type that is computed in; zeros where there is none.
template <class T>
class Operand {
 public:
  explicit Operand(const Tensor& t) : tensor_(as_contiguous(to_compute_type(t))) {}
  Operand(const OptTensor& t, int64_t zeros) {
    if (t)
      tensor_ = as_contiguous(to_compute_type(*t));
    else
      zeros_.assign(static_cast<size_t>(zeros), T(0));
  }
  const T* get() const { return tensor_ ? data<T>(*tensor_) : zeros_.data(); }

 private:
  OptTensor tensor_;
  std::vector<T> zeros_;
};

template <class T>
std::vector<T> transposed(const T* w, int64_t rows, int64_t columns) {
  std::vector<T> result(static_cast<size_t>(checked_product(rows, columns)));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      result[static_cast<size_t>(c * rows + r)] = w[r * columns + c];
  return result;
}

bool is(const Tensor& t, const IntList& sizes) { return sizes_of(t) == sizes; }

using Pair = std::tuple<Tensor, Tensor>;

constexpr const char* kBadScan = "reservoir_scan: arguments do not fit each other";
constexpr const char* kBadRun = "reservoir_generate: arguments do not fit each other";

Pair reservoir_scan(const Tensor& x, const OptTensor& w_in, const OptTensor& bias,
                    const Tensor& values, const Tensor& columns, const Tensor& rows,
                    const OptTensor& packed, const Tensor& state0, double leak, int64_t activation,
                    int64_t skip) {
  require(x.dim() == 3 && state0.dim() == 2 && rows.dim() == 1, kBadScan);
  const int64_t n = rows.numel() - 1, steps = x.size(0), batch = x.size(1), given = x.size(2);
  const auto type = x.scalar_type();
  require(is(state0, {batch, n}) && (w_in ? is(*w_in, {n, given}) : given == n) &&
              (!bias || is(*bias, {n})) && skip >= 0 && values.scalar_type() == type &&
              state0.scalar_type() == type && (!w_in || w_in->scalar_type() == type) &&
              (!bias || bias->scalar_type() == type),
          kBadScan);
  const Tensor matrix = packed ? *packed : reservoir_pack(values, columns, rows);
  const int64_t kept = std::max<int64_t>(0, steps - skip);
  return with_scalar_type(type, "reservoir_scan", [&](auto scalar) -> Pair {
    using T = decltype(scalar);
    const ScalarType compute = is_half(type) ? ScalarType::Float : type;
    const Tensor states = new_contiguous({kept, batch, n}, compute);
    const Tensor last = new_contiguous({batch, n}, compute);
    const Operand<T> input(x), start(state0), offset(bias, n), weight(w_in, 0);
    const std::vector<T> w_in_t = w_in ? transposed(weight.get(), n, given) : std::vector<T>{};
    Scan<T> a{};
    a.matrix = sliced<T>(matrix, n, compute, kBadScan);
    a.gathers = fast_gathers();
    a.steps = steps, a.batch = batch, a.given = given;
    a.x = input.get(), a.driven = !w_in;
    a.w_in = weight.get(), a.w_in_t = w_in_t.data(), a.bias = offset.get();
    a.leak = static_cast<T>(leak), a.activation = static_cast<int>(activation);
    a.state0 = start.get(), a.skip = skip;
    a.states = kept ? mutable_data<T>(states) : nullptr, a.last = mutable_data<T>(last);
    if (n > 0) run(a);
    return {to_type(states, type), to_type(last, type)};
  });
}

Pair reservoir_generate(const Tensor& x, const Tensor& y0, const Tensor& w_in,
                        const OptTensor& bias, const Tensor& values, const Tensor& columns,
                        const Tensor& rows, const OptTensor& packed, const Tensor& state0,
                        const Tensor& w_out, const OptTensor& b_out, double leak,
                        int64_t activation) {
  require(x.dim() == 3 && y0.dim() == 2 && state0.dim() == 2 && w_out.dim() == 2, kBadRun);
  const int64_t n = rows.numel() - 1, steps = x.size(0), batch = x.size(1), given = x.size(2);
  const int64_t fed = y0.size(1);
  const auto type = x.scalar_type();
  require(is(state0, {batch, n}) && is(w_in, {n, given + fed}) && is(y0, {batch, fed}) &&
              (is(w_out, {fed, n}) || is(w_out, {fed, n + given + fed})) &&
              (!bias || is(*bias, {n})) && (!b_out || is(*b_out, {fed})),
          kBadRun);
  for (const Tensor* t : {&y0, &w_in, &values, &state0, &w_out})
    require(t->scalar_type() == type, kBadRun);
  require((!bias || bias->scalar_type() == type) && (!b_out || b_out->scalar_type() == type),
          kBadRun);
  const Tensor matrix = packed ? *packed : reservoir_pack(values, columns, rows);
  return with_scalar_type(type, "reservoir_generate", [&](auto scalar) -> Pair {
    using T = decltype(scalar);
    const ScalarType compute = is_half(type) ? ScalarType::Float : type;
    const Tensor y = new_contiguous({steps, batch, fed}, compute);
    const Tensor last = new_contiguous({batch, n}, compute);
    const Operand<T> input(x), first(y0), start(state0), weight(w_in), readout(w_out);
    const Operand<T> offset(bias, n), readout_offset(b_out, fed);
    const std::vector<T> w_in_t = transposed(weight.get(), n, given + fed);
    Scan<T> a{};
    a.matrix = sliced<T>(matrix, n, compute, kBadRun);
    a.gathers = fast_gathers();
    a.steps = steps, a.batch = batch, a.given = given, a.fed = fed;
    a.x = input.get();
    a.w_in = weight.get(), a.w_in_t = w_in_t.data(), a.bias = offset.get();
    a.leak = static_cast<T>(leak), a.activation = static_cast<int>(activation);
    a.state0 = start.get(), a.skip = steps, a.last = mutable_data<T>(last);
    a.y0 = first.get(), a.w_out = readout.get(), a.readout = w_out.size(1);
    a.b_out = readout_offset.get(), a.y = mutable_data<T>(y);
    run(a);
    return {to_type(y, type), to_type(last, type)};
  });
}

}  // namespace

NNARCH_OPS(reservoir, ops) {
  ops.impl("reservoir_pack", TORCH_BOX(&reservoir_pack));
  ops.impl("reservoir_scan", TORCH_BOX(&reservoir_scan));
  ops.impl("reservoir_generate", TORCH_BOX(&reservoir_generate));
}

}  // namespace nnarch
