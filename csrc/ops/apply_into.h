// Whose memory the result of preact_apply may take.
#pragma once

namespace resnet_fused {

enum class ApplyInto { neither, dz, x };

}  // namespace resnet_fused
