// Exceptions with PyTorch's wording, for the wrappers of every backend.
#pragma once

#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace resnet_fused {

using torch::headeronly::IntHeaderOnlyArrayRef;

// STD_TORCH_CHECK puts the function, the file and the line before its message; users of PyTorch expect the
// message alone.
template <typename... Args> [[noreturn]] void raise(const Args&... args) {
  std::ostringstream message;
  ((message << args), ...);
  throw std::runtime_error(message.str());
}

#define RF_CHECK(condition, ...)          \
  do {                                    \
    if (!(condition)) [[unlikely]]        \
      ::resnet_fused::raise(__VA_ARGS__); \
  } while (false)

// "[2, 3, 8, 8]"
inline std::string to_string(IntHeaderOnlyArrayRef values) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << ']';
  return out.str();
}

}  // namespace resnet_fused
