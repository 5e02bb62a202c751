// Where the memory of outputs comes from.
#include "cpu/pool.h"
#include "cpu/tensor.h"

// Of torch 2.11 and newer; null where an older torch lacks it.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* deleter_context);

namespace nnarch {

bool torch_adopts_memory() { return torch_from_blob != nullptr; }

Tensor new_strided(const IntList& sizes, const IntList& strides, ScalarType type) {
  const auto dims = static_cast<int64_t>(sizes.size());
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const int32_t cpu = aoti_torch_device_type_cpu();
  auto bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  for (int64_t size : sizes) bytes = checked_product(bytes, size);
  AtenTensorHandle handle;
  if (pool_serves(bytes)) {
    void* block = pool_take(bytes);
    const auto give_back = [](void* memory, void*) { pool_give_back(memory); };
    constexpr int32_t no_index = -1;  // from_blob takes no other for the CPU
    if (torch_from_blob(block, dims, sizes.data(), strides.data(), 0, dtype, cpu, no_index, &handle,
                        aoti_torch_layout_strided(), nullptr, 0, give_back, nullptr)) {
      pool_give_back(block);
      throw std::runtime_error("nnarch: torch did not take the memory of a new tensor");
    }
    return Tensor(handle);
  }
  if (aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype, cpu, 0, &handle))
    throw std::runtime_error("not enough memory: a tensor of " + std::to_string(bytes) +
                             " bytes is needed");
  Tensor result(handle);
  if (bytes >= (int64_t{4} << 20)) prefer_huge_pages(result.data_ptr(), bytes);
  return result;
}

}  // namespace nnarch
