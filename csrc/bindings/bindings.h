// Integers to Params. Every function takes (device, queue) last: device -1 is the CPU and queue its
// thread limit; otherwise a CUDA device and its stream. The GIL is released around kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/cpu.h"
#include "kernels/attention/regimes.h"
#include "kernels/cuda.h"

namespace py = pybind11;

namespace kvquant::bindings {

void define_cache(py::module_& m);
void define_pieces(py::module_& m);
void define_plain(py::module_& m);
void define_info(py::module_& m);

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void check(Status status, const char* op) {
  if (status.code == Status::kOk) return;
  throw std::runtime_error(std::string("kvquant.") + op + ": " +
                           (status.what ? status.what : "unknown error"));
}

#ifdef KVQUANT_WITH_CUDA
#define KVQUANT_CUDA_OR_REFUSE(call) call
#else
#define KVQUANT_CUDA_OR_REFUSE(call) Status::unsupported("built without CUDA")
#endif

// One op's Status on the device that a call names.
#define KVQUANT_ON(op, params, device, queue) \
  ((device) < 0 ? cpu::op(params, int(queue)) \
                : KVQUANT_CUDA_OR_REFUSE(cuda::op(params, {device, pointer<void>(queue)})))

// Runs one op without the GIL.
#define KVQUANT_RUN(op, params, device, queue)        \
  do {                                                \
    Status status;                                    \
    {                                                 \
      py::gil_scoped_release release;                 \
      status = KVQUANT_ON(op, params, device, queue); \
    }                                                 \
    check(status, #op);                               \
  } while (false)

}  // namespace kvquant::bindings
