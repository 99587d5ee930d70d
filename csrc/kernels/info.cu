// What the runtime finds: never an error, a machine without a driver is a machine without devices.
#include <cuda_runtime.h>

#include "kernels/cuda.h"

namespace kvquant::cuda {

int device_count(const char** error) {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  *error = result == cudaSuccess ? nullptr : cudaGetErrorString(result);
  return result == cudaSuccess ? count : 0;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace kvquant::cuda
