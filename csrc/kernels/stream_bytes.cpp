// From which size on outputs are written past the caches.
#include <stdlib.h>
#include <unistd.h>

#include <atomic>

#include "cpu_kernels.h"

namespace resnet_fused {
namespace {

// A quarter of the last cache, which other tensors and other cores share. Measured on a Xeon whose last cache has 480 MB: of the
// 8 to 17 MB that a convolution gives, the next kernel reads most there.
int64_t default_stream_bytes() {
  if (const char* text = getenv("RESNET_FUSED_CPU_STREAM_MB")) {
    char* end = nullptr;
    const long long megabytes = strtoll(text, &end, 10);
    if (end != text && *end == '\0' && megabytes >= 0 && megabytes < (1ll << 40)) return int64_t(megabytes) << 20;
  }
  int64_t cache = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
  cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  constexpr int64_t kLeast = int64_t(8) << 20;  // also where the system does not say
  return cache / 4 > kLeast ? cache / 4 : kLeast;
}

std::atomic<int64_t>& bytes_in_force() {
  static std::atomic<int64_t> bytes{default_stream_bytes()};
  return bytes;
}

}  // namespace

int64_t stream_bytes() { return bytes_in_force().load(std::memory_order_relaxed); }
void set_stream_bytes(int64_t bytes) { bytes_in_force().store(bytes < 0 ? default_stream_bytes() : bytes); }

}  // namespace resnet_fused
