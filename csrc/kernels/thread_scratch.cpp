// Scratch memory that each thread keeps between calls.
#include <stdexcept>
#include <stdlib.h>
#include <string>
#include <sys/mman.h>

#include "cpu_kernels.h"

namespace resnet_fused {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;

// Grows and never shrinks; freed when its thread ends. After fork() the child keeps the forking thread's
// buffers as ordinary private copies, and its new threads start with none, so there is nothing to reset.
struct Buffer {
  void* data = nullptr;
  size_t size = 0;

  ~Buffer() { free(data); }

  void grow(size_t bytes) {
    // Huge pages for large buffers: 512 times fewer page faults and TLB entries. The system may refuse: no
    // matter.
    const bool large = bytes >= kHugePage;
    const size_t alignment = large ? kHugePage : kLine;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    free(data);  // before the new one is taken: contents need not survive, and the peak stays at one buffer
    data = nullptr;
    size = 0;
    if (rounded >= bytes) data = aligned_alloc(alignment, rounded);
    if (data == nullptr) {
      throw std::runtime_error("resnet_fused: could not allocate " + std::to_string(bytes) +
                               " bytes of scratch memory");
    }
    size = rounded;
    if (large) madvise(data, rounded, MADV_HUGEPAGE);
  }
};

thread_local Buffer buffers[kScratchSlots];

}  // namespace

void* thread_scratch(ScratchSlot slot, size_t bytes) {
  Buffer& buffer = buffers[slot];
  if (bytes > buffer.size) buffer.grow(bytes);
  return buffer.data;
}

}  // namespace resnet_fused
