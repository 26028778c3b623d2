// torch.ops.resnet_fused_cuda_emulated.{set_schedule, set_multiprocessors, set_tree_groups, launches,
// largest_shared, damaged_margins}
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "emulated_memory.h"
#include "emulator.h"
#include "kernels/cuda/index.h"

namespace resnet_fused {
namespace cuda {

extern int emulated_multiprocessors;
int emulated_multiprocessors = 4;

namespace {
void set_schedule(int64_t order, bool late) { emulator::set_schedule(static_cast<int>(order), late); }
void set_multiprocessors(int64_t count) { emulated_multiprocessors = static_cast<int>(count); }
void set_tree_groups(int64_t groups) { tree_groups = groups; }
int64_t launches() { return emulator::launches(); }
int64_t largest_shared() { return emulator::largest_shared(); }
int64_t damaged_margins() { return emulator::damaged_margins(); }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda_emulated, m) {
  m.def("set_schedule(int order, bool late) -> ()");
  m.def("set_multiprocessors(int count) -> ()");
  m.def("set_tree_groups(int groups) -> ()");
  m.def("launches() -> int");
  m.def("largest_shared() -> int");
  m.def("damaged_margins() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda_emulated, CompositeExplicitAutograd, m) {
  m.impl("set_schedule", TORCH_BOX(&set_schedule));
  m.impl("set_multiprocessors", TORCH_BOX(&set_multiprocessors));
  m.impl("set_tree_groups", TORCH_BOX(&set_tree_groups));
  m.impl("launches", TORCH_BOX(&launches));
  m.impl("largest_shared", TORCH_BOX(&largest_shared));
  m.impl("damaged_margins", TORCH_BOX(&damaged_margins));
}

}  // namespace cuda
}  // namespace resnet_fused
