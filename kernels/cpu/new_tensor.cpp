// Where the memory of outputs comes from.
#include "cpu/lazy_zeros.h"
#include "cpu/pool.h"
#include "cpu/tensor.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

// Of torch 2.11 and newer; null where an older torch lacks it.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* deleter_context);

namespace nnarch {

bool torch_adopts_memory() { return torch_from_blob != nullptr; }

namespace {

int32_t dtype_of(ScalarType type) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}

int64_t bytes_of(const IntList& sizes, ScalarType type) {
  auto bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_of(type)));
  for (int64_t size : sizes) bytes = checked_product(bytes, size);
  return bytes;
}

template <Held held>
Tensor pooled(const IntList& sizes, const IntList& strides, ScalarType type) {
  void* block = pool_take(bytes_of(sizes, type), held);
  const auto give_back = [](void* memory, void*) { pool_give_back(memory, held); };
  constexpr int32_t no_index = -1;  // from_blob takes no other for the CPU
  AtenTensorHandle handle;
  if (torch_from_blob(block, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
                      dtype_of(type), aoti_torch_device_type_cpu(), no_index, &handle,
                      aoti_torch_layout_strided(), nullptr, 0, give_back, nullptr)) {
    pool_give_back(block, held);
    throw std::runtime_error("nnarch: torch did not take the memory of a new tensor");
  }
  return Tensor(handle);
}

}  // namespace

Tensor new_packed(int64_t size, ScalarType type) {
  constexpr int64_t smallest = 4096;  // bytes
  if (!torch_adopts_memory() || bytes_of({size}, type) < smallest)
    return new_contiguous({size}, type);
  return pooled<Held::between_calls>({size}, {1}, type);
}

Tensor new_strided(const IntList& sizes, const IntList& strides, ScalarType type) {
  const int64_t bytes = bytes_of(sizes, type);
  if (pool_serves(bytes)) return pooled<Held::in_calls>(sizes, strides, type);
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype_of(type), aoti_torch_device_type_cpu(), 0, &handle))
    throw std::runtime_error("not enough memory: a tensor of " + std::to_string(bytes) +
                             " bytes is needed");
  Tensor result(handle);
  if (bytes >= (int64_t{4} << 20)) prefer_huge_pages(result.data_ptr(), bytes);
  return result;
}

OptTensor new_lazy_zeros([[maybe_unused]] const IntList& sizes, [[maybe_unused]] ScalarType type) {
#ifdef __linux__
  if (!torch_adopts_memory()) return std::nullopt;
  const int64_t bytes = bytes_of(sizes, type);
  constexpr int64_t huge = int64_t{2} << 20;
  const auto length = static_cast<size_t>(round_up(bytes, huge));
  void* room =
      mmap(nullptr, length + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return std::nullopt;
  const auto head = static_cast<size_t>(-reinterpret_cast<intptr_t>(room) & (huge - 1));
  char* block = static_cast<char*>(room) + head;
  if (head > 0) munmap(room, head);
  munmap(block + length, huge - head);
  prefer_huge_pages(block, static_cast<int64_t>(length));
  const auto give_back = [](void* memory, void* size) {
    munmap(memory, reinterpret_cast<size_t>(size));
  };
  const IntList strides = contiguous_strides(sizes);
  AtenTensorHandle handle;
  if (torch_from_blob(block, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
                      dtype_of(type), aoti_torch_device_type_cpu(), -1, &handle,
                      aoti_torch_layout_strided(), nullptr, 0, give_back,
                      reinterpret_cast<void*>(length))) {
    munmap(block, length);
    return std::nullopt;
  }
  return Tensor(handle);
#else
  return std::nullopt;
#endif
}

}  // namespace nnarch
