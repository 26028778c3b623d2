#include "pool.h"

#include <torch/csrc/stable/library.h>

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <deque>
#include <list>
#include <map>
#include <mutex>
#include <tuple>
#include <unordered_map>

// Added to the shim in 2.11, after our target version: null under an older torch.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
                int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace resnet_fused {

namespace {

constexpr size_t kSmallest = size_t(256) << 10;  // below, malloc keeps its memory anyway
constexpr size_t kClass = size_t(64) << 10;      // sizes are rounded up to this
constexpr size_t kHugePage = size_t(2) << 20;
constexpr int64_t kHitsPerHugeBlock = 6;

// A cap on the cached (not the used) bytes: RESNET_FUSED_CPU_POOL_MB, or an eighth of the machine's memory.
size_t capacity_from_environment() {
  if (const char* text = std::getenv("RESNET_FUSED_CPU_POOL_MB")) {
    char* end = nullptr;
    const long long megabytes = std::strtoll(text, &end, 10);
    if (end != text && *end == '\0' && megabytes >= 0) return static_cast<size_t>(megabytes) << 20;
  }
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE)) / 8;
}

// Of ordinary pages at first; large ones begin where a huge page may. Null when the system has no more.
void* map_block(size_t bytes) {
  const bool huge = bytes >= kHugePage;
  const size_t mapped = huge ? bytes + kHugePage : bytes;
  void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  if (!huge) return base;
  const uintptr_t start = reinterpret_cast<uintptr_t>(base);
  const uintptr_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > start) munmap(base, aligned - start);
  const size_t tail = start + mapped - (aligned + bytes);
  if (tail > 0) munmap(reinterpret_cast<void*>(aligned + bytes), tail);
  return reinterpret_cast<void*>(aligned);
}

// Huge pages spare a step in float32 2-3 % of its time. But where the host of a virtual machine has taken free memory back,
// the first touch of each takes milliseconds (330 ms for a first step instead of 160). So a block gets them when it is used
// again, when nothing in it is needed, one block at a time, and not before memory is reused more than it is mapped: in a
// training's first step.
void use_huge_pages([[maybe_unused]] void* block, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  if (madvise(block, bytes, MADV_HUGEPAGE) == 0) madvise(block, bytes, MADV_DONTNEED);
#endif
}

class Pool {
 public:
  // Never destroyed: tensors may outlive every static object.
  static Pool& instance() {
    static Pool* pool = [] {
      Pool* p = new Pool;
      // A child must not inherit a mutex that a thread it does not have holds.
      pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                     [] { instance().mutex_.unlock(); });
      return p;
    }();
    return *pool;
  }

  bool enabled() const { return capacity_ > 0 && !refused_.load(std::memory_order_relaxed); }
  // torch did not take a block: no more attempts.
  void disable() { refused_.store(true, std::memory_order_relaxed); }

  // A block of at least `bytes`. Null when there is no memory.
  void* acquire(size_t bytes) {
    bytes = (bytes + kClass - 1) / kClass * kClass;
    Block taken{nullptr, 0, false};
    bool enlarge = false;  // its pages
    {
      std::lock_guard<std::mutex> lock(mutex_);
      // The block of this size that was released last (its lines may still be in the cache), or of the next
      // larger size.
      const auto found = classes_.lower_bound(bytes);
      if (found != classes_.end() && found->first <= bytes + bytes / 4) {
        const auto block = found->second.back();
        taken = *block;
        ++hits_;
        enlarge = !taken.huge && taken.bytes >= kHugePage && hits_ > misses_ && hits_ >= next_huge_;
        if (enlarge) next_huge_ = hits_ + kHitsPerHugeBlock;
        taken.huge = taken.huge || enlarge;
        used_.emplace(taken.data, taken);
        found->second.pop_back();
        if (found->second.empty()) classes_.erase(found);
        cached_.erase(block);
        cached_bytes_ -= taken.bytes;
        used_bytes_ += taken.bytes;
      } else {
        ++misses_;
      }
    }
    if (enlarge) use_huge_pages(taken.data, taken.bytes);
    if (taken.data != nullptr) return taken.data;
    void* data = map_block(bytes);
    if (data == nullptr) {
      clear();
      data = map_block(bytes);
    }
    if (data != nullptr) {
      std::lock_guard<std::mutex> lock(mutex_);
      used_.emplace(data, Block{data, bytes, false});
      used_bytes_ += bytes;
    }
    return data;
  }

  // Does nothing where the block is not in use (any more).
  void release(void* data) noexcept {
    bool kept = false;
    size_t bytes = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto used = used_.find(data);
      if (used == used_.end()) return;
      const Block block = used->second;
      bytes = block.bytes;
      used_.erase(used);
      used_bytes_ -= bytes;
      if (bytes <= capacity_) {
        try {
          cached_.push_back(block);
          try {
            classes_[bytes].push_back(std::prev(cached_.end()));
            cached_bytes_ += bytes;
            kept = true;
          } catch (...) {
            cached_.pop_back();
          }
        } catch (...) {
        }
      }
      while (cached_bytes_ > capacity_) drop_oldest();
    }
    if (!kept) munmap(data, bytes);
  }

  void clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    while (!cached_.empty()) drop_oldest();
  }

  std::tuple<int64_t, int64_t, int64_t, int64_t> stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {static_cast<int64_t>(used_bytes_), static_cast<int64_t>(cached_bytes_), hits_, misses_};
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
    bool huge;  // has been given huge pages
  };

  // Within a class, blocks stand in the order of their release too: the oldest of all is the first of its
  // class.
  void drop_oldest() noexcept {
    const Block block = cached_.front();
    const auto found = classes_.find(block.bytes);
    found->second.pop_front();
    if (found->second.empty()) classes_.erase(found);
    cached_.pop_front();
    cached_bytes_ -= block.bytes;
    munmap(block.data, block.bytes);
  }

  std::mutex mutex_;
  std::list<Block> cached_;  // in the order of release
  std::map<size_t, std::deque<std::list<Block>::iterator>> classes_;
  std::unordered_map<void*, Block> used_;
  size_t used_bytes_ = 0, cached_bytes_ = 0;
  std::atomic<bool> refused_{false};
  int64_t hits_ = 0, misses_ = 0, next_huge_ = kHitsPerHugeBlock;
  const size_t capacity_ = capacity_from_environment();
};

// The block's size is looked up by its address, not passed as the context: the first form of torch_from_blob
// had none.
void release_block(void* data, void*) { Pool::instance().release(data); }

}  // namespace

int32_t shim_dtype(DType dtype) {
  static const int32_t codes[kDTypes] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                         aoti_torch_dtype_bfloat16()};
  return codes[static_cast<int>(dtype)];
}

namespace {

torch::stable::Tensor empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides,
                                    int32_t code, size_t element_size) {
  const int32_t cpu = aoti_torch_device_type_cpu();
  size_t bytes = element_size;
  for (int64_t d = 0; d < dimensions; ++d) bytes *= static_cast<size_t>(sizes[d]);
  AtenTensorHandle handle = nullptr;
  if (bytes >= kSmallest && torch_from_blob != nullptr && Pool::instance().enabled()) {
    if (void* data = Pool::instance().acquire(bytes)) {
      // Device index -1, as a CPU tensor has it.
      const AOTITorchError error =
          torch_from_blob(data, dimensions, sizes, strides, 0, code, cpu, -1, &handle,
                          aoti_torch_layout_strided(), nullptr, 0, &release_block, nullptr);
      if (error == AOTI_TORCH_SUCCESS) return torch::stable::Tensor(handle);
      Pool::instance().release(data);
      Pool::instance().disable();
    }
  }
  // Also where memory ran out: torch's allocator raises with its usual message.
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dimensions, sizes, strides, code, cpu, 0, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace

torch::stable::Tensor empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides,
                                    DType dtype) {
  const size_t element_size = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  return empty_strided(dimensions, sizes, strides, shim_dtype(dtype), element_size);
}

torch::stable::Tensor empty_strided_bytes(int64_t dimensions, const int64_t* sizes, const int64_t* strides) {
  return empty_strided(dimensions, sizes, strides, aoti_torch_dtype_uint8(), 1);
}

namespace {

std::tuple<int64_t, int64_t, int64_t, int64_t> pool_stats() { return Pool::instance().stats(); }
void pool_clear() { Pool::instance().clear(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("pool_stats() -> (int used_bytes, int cached_bytes, int hits, int misses)");
  m.def("pool_clear() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  m.impl("pool_stats", TORCH_BOX(&pool_stats));
  m.impl("pool_clear", TORCH_BOX(&pool_clear));
}

}  // namespace resnet_fused
