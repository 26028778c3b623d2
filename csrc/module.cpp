// The module resnet_fused._C: what was built, and what this CPU can run. It is linked to nothing of torch, so
// that it can tell about a build whose libraries do not load.
#include <pybind11/pybind11.h>

#include <string>

#include "build_facts.h"
#include "kernels/cpu_levels.h"

namespace py = pybind11;

namespace {

// The names in a list separated by one character.
py::tuple split(const std::string& list, char separator) {
  py::list names;
  for (size_t begin = 0; begin < list.size();) {
    size_t end = list.find(separator, begin);
    if (end == std::string::npos) end = list.size();
    names.append(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return py::tuple(names);
}

py::dict build_info() {
  py::dict info;
  info["version"] = RF_BUILD_VERSION;
  info["torch"] = RF_BUILD_TORCH;
  info["compiler"] = RF_BUILD_COMPILER;
  info["cpu_variants"] = split(RF_BUILD_VARIANTS, ',');
  info["cuda"] = *RF_BUILD_CUDA ? py::object(py::str(RF_BUILD_CUDA)) : py::object(py::none());
  info["cuda_architectures"] = split(RF_BUILD_CUDA_ARCHITECTURES, ';');
  info["cuda_reason"] = RF_BUILD_NO_CUDA;
  return info;
}

py::tuple cpu_levels() {
  py::list names;
  const int highest = resnet_fused::detect_simd_level();
  for (int level = 0; level <= highest && level < resnet_fused::kBuiltLevels; ++level) {
    names.append(resnet_fused::kLevelNames[level]);
  }
  return py::tuple(names);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What was built, and what this CPU can run.";
  m.def("build_info", &build_info,
        "dict: version, torch and compiler of the build (str); cpu_variants, the SIMD levels compiled, lowest "
        "first; cuda, the toolkit's version or None; cuda_architectures; cuda_reason, why CUDA was not built "
        "('' if it was).");
  m.def("cpu_levels", &cpu_levels,
        "The compiled SIMD levels that this CPU and operating system can run, lowest first.");
}
