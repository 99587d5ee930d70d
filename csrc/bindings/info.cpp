// What this build is and what it finds on this machine.
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "cpu/threads.h"

namespace kvquant::bindings {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = KVQUANT_VERSION;
  info["cpu_isa"] = cpu::isa();
  info["cpu_isas"] = cpu::isas();
  info["cpu_threads"] = cpu::has_threads() ? "OpenMP" : "the caller's: no OpenMP runtime";
#ifdef KVQUANT_WITH_CUDA
  const char* error = nullptr;
  info["cuda"] = true;
  info["devices"] = cuda::device_count(&error);
  info["cuda_error"] = error ? py::object(py::str(error)) : py::object(py::none());
  info["cuda_archs"] = KVQUANT_CUDA_ARCHS;
  info["cuda_runtime"] = cuda::runtime_version();
  info["cuda_driver"] = cuda::driver_version();
#else
  info["cuda"] = false;
  info["devices"] = 0;
  info["cuda_error"] = "built without CUDA";
  info["cuda_archs"] = "";
  info["cuda_runtime"] = 0;
  info["cuda_driver"] = 0;
#endif
  return info;
}

}  // namespace

void define_info(py::module_& m) {
  m.def("build_info", &build_info);
  m.def("force_cpu_isa", &cpu::force_isa);
  m.def("use_openmp", [](uintptr_t gomp_parallel) {
    cpu::use_openmp(reinterpret_cast<cpu::Parallel>(gomp_parallel));
  });
}

}  // namespace kvquant::bindings
