// Scratch memory that each thread keeps between calls.
#include <stdexcept>
#include <stdlib.h>
#include <string>
#include <sys/mman.h>
#include <vector>

#include "cpu_kernels.h"

namespace resnet_fused {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;

void* allocate(size_t alignment, size_t bytes) {
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* const data = rounded >= bytes ? aligned_alloc(alignment, rounded) : nullptr;
  if (data == nullptr) {
    throw std::runtime_error("resnet_fused: could not allocate " + std::to_string(bytes) +
                             " bytes of scratch memory");
  }
  // Fewer page faults and TLB entries; and in pages of 4 KB, wherever the system found them, a buffer of half a
  // cache's size does not keep to its half (measured: a quarter of a kernel's time). The system may refuse: no
  // matter.
  if (alignment == kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
  return data;
}

// Pieces of huge pages for the buffers that are smaller than one. A piece is given up when its buffer grows.
class Pieces {
 public:
  ~Pieces() {
    for (void* page : pages_) free(page);
  }
  void* take(size_t bytes) {
    if (bytes > left_) {
      pages_.reserve(pages_.size() + 1);
      next_ = static_cast<char*>(allocate(kHugePage, kHugePage));
      pages_.push_back(next_);
      left_ = kHugePage;
    }
    void* const piece = next_;
    next_ += bytes;
    left_ -= bytes;
    return piece;
  }

 private:
  std::vector<void*> pages_;
  char* next_ = nullptr;
  size_t left_ = 0;
};

// Grows and never shrinks; freed when its thread ends. After fork() the child keeps the forking thread's
// buffers as ordinary private copies, and its new threads start with none, so there is nothing to reset.
struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  bool owned = false;

  ~Buffer() { release(); }

  void release() {
    if (owned) free(data);
    data = nullptr;
    size = 0;
    owned = false;
  }

  void grow(size_t bytes, Pieces& pieces) {
    // Twice the old size at least, so that given-up pieces stay below the one in use.
    const size_t wanted = 2 * size > bytes && 2 * size <= kHugePage / 2 ? 2 * size : bytes;
    release();  // before the new one is taken: contents need not survive, and the peak stays at one buffer
    if (wanted <= kPage) {
      data = allocate(kLine, kPage);
      size = kPage;
      owned = true;
    } else if (wanted <= kHugePage / 2) {
      const size_t rounded = (wanted + kPage - 1) / kPage * kPage;
      data = pieces.take(rounded);
      size = rounded;
    } else {
      data = allocate(kHugePage, bytes);
      size = bytes;
      owned = true;
    }
  }
};

struct ThreadBuffers {
  Pieces pieces;
  Buffer slots[kScratchSlots];
};
thread_local ThreadBuffers buffers;

}  // namespace

void* thread_scratch(ScratchSlot slot, size_t bytes) {
  Buffer& buffer = buffers.slots[slot];
  if (bytes > buffer.size) buffer.grow(bytes, buffers.pieces);
  return buffer.data;
}

}  // namespace resnet_fused
