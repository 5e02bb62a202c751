// Memory that is kept, in huge pages where the system has them: for the activations of an
// accelerated model, from one call to the next, for packed weights, and for scratch.
//
// A large tensor fresh from the operating system costs a page fault for every page that is written;
// for MobileNetV2 at batch 8 that was a seventh of the time. Inside a pooled scope outputs take
// their memory from blocks that earlier outputs gave back. A block returns when its tensor dies, on
// whatever thread that happens. In pages of 4 KB a network's weights, activations and scratch are
// more of them than a processor knows the addresses of. With small blocks side by side in huge
// pages MobileNetV2 at batch 1 took 0.7 % less, ResNet-50 0.4; with scratch there, too, 1 to 3 %
// and up to 1 % less again.
#pragma once

#include <cstdint>

namespace nnarch {

// Whether this torch makes tensors of memory that is handed to it with its deleter.
bool torch_adopts_memory();

// Whether the calling thread is inside a pooled scope and this torch supports it (2.11 and newer).
bool pool_serves(int64_t bytes);

// How long a block is held: what lasts a call shares no page with packed weights and scratch.
enum class Held { in_calls, between_calls };

// At least `bytes` bytes on pages of their own, uninitialised. Throws std::bad_alloc.
void* pool_take(int64_t bytes, Held held);
void pool_give_back(void* block, Held held);

// Frees the blocks that nothing holds; returns how many bytes they had.
int64_t pool_clear();

// Asks for huge pages: one fault for 2 MB. Only a hint.
void prefer_huge_pages(void* memory, int64_t bytes);

}  // namespace nnarch
