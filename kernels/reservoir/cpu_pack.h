// Sparse matrices in slices, in one tensor: what reservoir_pack makes and a scan reads.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/tensor.h"
#include "reservoir/cpu_kernels.h"

namespace nnarch {

// At the start of the memory; the arrays follow, each at a multiple of 64 bytes.
struct PackedHeader {
  static constexpr int64_t kMagic = 0x72657376'6f697201;
  int64_t magic, neurons, slices, entries, value_bytes, column_bytes, lengths, rows, values,
      columns, end;

  static PackedHeader of(int64_t neurons, int64_t entries, int64_t value_bytes) {
    PackedHeader h{};
    h.magic = kMagic;
    h.neurons = neurons;
    h.slices = ceil_div(neurons, kSlice);
    h.entries = entries;
    h.value_bytes = value_bytes;
    h.column_bytes = neurons < 65536 ? 2 : 4;  // column `neurons` must have a number too
    h.lengths = round_up(sizeof(PackedHeader), 64);
    h.rows = round_up(h.lengths + h.slices * 4, 64);
    h.values = round_up(h.rows + h.slices * kSlice * 4, 64);
    h.columns = round_up(checked_sum(h.values, checked_product(entries, value_bytes)), 64);
    h.end = checked_sum(h.columns, round_up(checked_product(entries, h.column_bytes), 64));
    return h;
  }
};

// A sparse square matrix as torch and scipy have it, int32 indices.
struct Rows {
  int64_t neurons, nonzeros;
  const int32_t *columns, *starts;

  int64_t length(int64_t row) const { return starts[row + 1] - starts[row]; }
};

inline Rows checked_rows(const Tensor& values, const Tensor& columns, const Tensor& starts,
                         const char* message) {
  const int64_t neurons = starts.numel() - 1, nonzeros = values.numel();
  require(neurons >= 0 && columns.numel() == nonzeros, message);
  const Rows m{neurons, nonzeros, data<int32_t>(columns), data<int32_t>(starts)};
  bool good = m.starts[0] == 0 && m.starts[neurons] == nonzeros;
  for (int64_t r = 0; r < neurons; ++r) good &= m.length(r) >= 0;
  require(good, message);
  for (int64_t e = 0; e < nonzeros; ++e) good &= m.columns[e] >= 0 && m.columns[e] < neurons;
  require(good, message);
  return m;
}

// Row numbers, the rows with the most nonzeros first; equal ones stay in order.
inline std::vector<int32_t> by_length(const Rows& m) {
  int64_t longest = 0;
  for (int64_t r = 0; r < m.neurons; ++r) longest = std::max(longest, m.length(r));
  std::vector<int64_t> place(static_cast<size_t>(longest) + 2, 0);
  for (int64_t r = 0; r < m.neurons; ++r) ++place[static_cast<size_t>(longest - m.length(r)) + 1];
  for (size_t i = 1; i < place.size(); ++i) place[i] += place[i - 1];
  std::vector<int32_t> order(static_cast<size_t>(m.neurons));
  for (int64_t r = 0; r < m.neurons; ++r)
    order[static_cast<size_t>(place[static_cast<size_t>(longest - m.length(r))]++)] =
        static_cast<int32_t>(r);
  return order;
}

template <class T, class I>
void fill_entries(const Rows& m, const T* values, const int32_t* lengths, const int32_t* rows,
                  T* to, I* columns) {
  const int64_t slices = ceil_div(m.neurons, kSlice);
  for (int64_t s = 0; s < slices; ++s)
    for (int64_t k = 0; k < lengths[s]; ++k)
      for (int j = 0; j < kSlice; ++j) {
        const int64_t row = rows[s * kSlice + j];
        const bool there = row < m.neurons && k < m.length(row);
        const int64_t e = there ? m.starts[row] + k : 0;
        *to++ = there ? values[e] : T(0);
        *columns++ = static_cast<I>(there ? m.columns[e] : m.neurons);
      }
}

// A matrix in slices, in a tensor of its own dtype, whose elements mean nothing.
template <class T>
Tensor pack_rows(const Rows& m, const T* values, ScalarType type) {
  const std::vector<int32_t> order = by_length(m);
  int64_t entries = 0;
  for (int64_t s = 0; s < m.neurons; s += kSlice)
    entries = checked_sum(entries, m.length(order[static_cast<size_t>(s)]) * kSlice);
  const PackedHeader h = PackedHeader::of(m.neurons, entries, sizeof(T));
  const Tensor packed = new_packed(h.end / static_cast<int64_t>(sizeof(T)), type);
  auto* bytes = reinterpret_cast<char*>(mutable_data<T>(packed));
  // The gaps too: equal matrices have equal bytes.
  std::memset(bytes, 0, static_cast<size_t>(h.values));
  const int64_t values_end = h.values + entries * h.value_bytes;
  std::memset(bytes + values_end, 0, static_cast<size_t>(h.columns - values_end));
  const int64_t columns_end = h.columns + entries * h.column_bytes;
  std::memset(bytes + columns_end, 0, static_cast<size_t>(h.end - columns_end));
  std::memcpy(bytes, &h, sizeof h);
  auto* lengths = reinterpret_cast<int32_t*>(bytes + h.lengths);
  auto* rows = reinterpret_cast<int32_t*>(bytes + h.rows);
  for (int64_t s = 0; s < h.slices; ++s)
    lengths[s] = static_cast<int32_t>(m.length(order[static_cast<size_t>(s * kSlice)]));
  for (int64_t i = 0; i < h.slices * kSlice; ++i)
    rows[i] = i < m.neurons ? order[static_cast<size_t>(i)] : static_cast<int32_t>(m.neurons);
  auto* to = reinterpret_cast<T*>(bytes + h.values);
  if (h.column_bytes == 2)
    fill_entries(m, values, lengths, rows, to, reinterpret_cast<uint16_t*>(bytes + h.columns));
  else
    fill_entries(m, values, lengths, rows, to, reinterpret_cast<int32_t*>(bytes + h.columns));
  return packed;
}

// What a scan reads out of it.
template <class T>
Sliced<T> sliced(const Tensor& packed, int64_t neurons, ScalarType type, const char* message) {
  PackedHeader h;
  const auto bytes_there = packed.numel() * static_cast<int64_t>(sizeof(T));
  require(packed.scalar_type() == type && packed.is_contiguous() &&
              bytes_there >= static_cast<int64_t>(sizeof h),
          message);
  const auto* bytes = reinterpret_cast<const char*>(data<T>(packed));
  std::memcpy(&h, bytes, sizeof h);
  require(h.magic == PackedHeader::kMagic && h.neurons == neurons && h.value_bytes == sizeof(T) &&
              h.end == bytes_there,
          message);
  const void* columns = bytes + h.columns;
  return {neurons,
          h.slices,
          reinterpret_cast<const int32_t*>(bytes + h.lengths),
          reinterpret_cast<const int32_t*>(bytes + h.rows),
          reinterpret_cast<const T*>(bytes + h.values),
          h.column_bytes == 2 ? static_cast<const uint16_t*>(columns) : nullptr,
          h.column_bytes == 4 ? static_cast<const int32_t*>(columns) : nullptr};
}

}  // namespace nnarch
