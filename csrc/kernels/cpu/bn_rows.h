// What the kernels of BN -> activation share: BN's rows of a unit by slot, and adding up into slots.
#pragma once

#include "channel_blocks.h"

namespace resnet_fused {
namespace RF_VARIANT {

template <typename T> struct BnRows {
  typedef Acc<T> A;
  A mean[kGroupSlots], scale[kGroupSlots], shift[kGroupSlots];

  // bn: [4, C], mean, invstd, scale, shift.
  BnRows(const void* bn, const Units& units, const Unit& unit) {
    const auto row = [&](int r) { return static_cast<const A*>(bn) + r * units.channels + unit.first_channel; };
    gather_slots<T>(row(0), units.channels, unit.columns, mean);
    gather_slots<T>(row(2), units.channels, unit.columns, scale);
    gather_slots<T>(row(3), units.channels, unit.columns, shift);
  }
};

// slots += the sums of all U rows that a loop takes at once.
template <typename A, int U, int N, typename B> RF_INLINE void add_to_slots(A* slots, Vec<A> (&sum)[U][N], B block) {
  Vec<A> total[N];
  block.load_slots(slots, total);
  for (int v = 0; v < N; ++v) {
    for (int u = 1; u < U; ++u) sum[0][v] += sum[u][v];
    total[v] += sum[0][v];
  }
  block.store_slots(slots, total);
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
