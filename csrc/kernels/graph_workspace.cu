// Scratch for launches that are being captured. A graph may be replayed on any stream, beside any
// launch: it has its own for as long as anything is left of it. Filled before the graph runs, so
// that no replay fills it again. Never freed: the next graph takes it.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/device.cuh"

namespace kvquant::cuda {
namespace {

constexpr size_t kMinFloats = 1 << 18, kMinCounters = 1 << 12;

struct Loan {
  int device;
  size_t floats, counters;
  Scratch scratch{};
  void* stream = nullptr;
  unsigned long long capture = 0;
  std::atomic<bool> over{true};

  bool suffices(int on, size_t most_floats, size_t most_counters) const {
    return device == on && floats >= most_floats && counters >= most_counters;
  }
  cudaError_t allocate() {
    char* data = nullptr;
    const size_t bytes = floats * sizeof(float);
    // This thread's own stream: nothing is captured from it. Relaxed: other streams may be
    // captured.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaError_t error = cudaMalloc(&data, bytes + counters * sizeof(int32_t));
    scratch = {reinterpret_cast<float*>(data), reinterpret_cast<int32_t*>(data + bytes)};
    const auto set = [&](void* to, int value, size_t size) {
      if (error == cudaSuccess) error = cudaMemsetAsync(to, value, size, cudaStreamPerThread);
    };
    set(scratch.partial, 255, bytes);
    set(scratch.counters, 0, counters * sizeof(int32_t));
    if (error == cudaSuccess) error = cudaStreamSynchronize(cudaStreamPerThread);
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaGetLastError();  // it is returned: the next launch is not to report it
    return error;
  }
  cudaError_t lend(cudaGraph_t graph) {
    const auto end = [](void* loan) { static_cast<Loan*>(loan)->over = true; };
    cudaUserObject_t life = nullptr;
    over = false;
    cudaError_t error = cudaUserObjectCreate(&life, this, end, 1, cudaUserObjectNoDestructorSync);
    if (error != cudaSuccess) {
      over = true;
      return error;
    }
    error = cudaGraphRetainUserObject(graph, life, 1, cudaGraphUserObjectMove);
    if (error != cudaSuccess) cudaUserObjectRelease(life, 1);
    return error;
  }
};

}  // namespace

uint64_t capture_id(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const auto error = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id);
  return error == cudaSuccess && status == cudaStreamCaptureStatusActive ? id : 0;
}

Status graph_workspace(Launch launch, size_t floats, size_t counters, Scratch& scratch) {
  // Neither is ever destroyed: graphs may end after static objects do.
  static auto& mutex = *new std::mutex;
  static auto& loans = *new std::vector<std::unique_ptr<Loan>>;
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return to_status(guard.error());
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
  cudaError_t error =
      cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(launch.stream), &status, &id, &graph);
  if (error != cudaSuccess) return to_status(error);
  const std::lock_guard lock(mutex);
  Loan* found = nullptr;
  for (const auto& loan : loans) {
    if (!loan->suffices(launch.device, floats, counters)) continue;
    if (!loan->over && loan->capture == id && loan->stream == launch.stream) {
      scratch = loan->scratch;
      return Status::ok();
    }
    if (loan->over) found = loan.get();
  }
  if (!found) {
    auto loan = std::make_unique<Loan>();
    loan->device = launch.device;
    loan->floats = std::max(floats, kMinFloats);
    loan->counters = std::max(counters, kMinCounters);
    error = loan->allocate();
    if (error != cudaSuccess) return to_status(error);
    found = loans.emplace_back(std::move(loan)).get();
  }
  found->stream = launch.stream;
  found->capture = id;
  scratch = found->scratch;
  return to_status(found->lend(graph));
}

}  // namespace kvquant::cuda
