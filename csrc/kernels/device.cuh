// Host side of a launch: the device guard, and the launch's error as a Status.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "kernels/cuda.h"

namespace kvquant::cuda {

// Makes a device current for one launch.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) error_ = cudaSetDevice(device);
    restore_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (restore_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool restore_ = false;
  cudaError_t error_;
};

inline Status to_status(cudaError_t error) {
  return error == cudaSuccess ? Status::ok() : Status::device(cudaGetErrorString(error));
}

// Runs `launch(stream)` on the launch's device and reports what it left.
template <class F>
Status launch_on(Launch launch, F&& body) {
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return to_status(guard.error());
  body(static_cast<cudaStream_t>(launch.stream));
  return to_status(cudaGetLastError());
}

// Sets multiprocessors up as for kernels that take most of the shared memory: a kernel's blocks run
// beside theirs then. A hint, given once a kernel and device.
template <auto kKernel>
void share_multiprocessors(int device) {
  constexpr int kDevices = 64;
  static std::atomic<bool> is_set[kDevices];
  if (device >= kDevices || is_set[device]) return;
  is_set[device] = true;
  const cudaError_t error = cudaFuncSetAttribute(
      kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) cudaGetLastError();  // or it would be taken for the launch's
}

inline unsigned ceil_div(int64_t a, int64_t b) { return unsigned((a + b - 1) / b); }

}  // namespace kvquant::cuda
