// The CUDA kernels' launchers. Each guards the device, launches on the stream, checks the launch;
// none allocates or synchronizes but graph_workspace.
#pragma once

#include <cstddef>
#include <cstdint>

#include "params.h"
#include "status.h"

namespace kvquant::cuda {

struct Launch {
  int device;
  void* stream;  // cudaStream_t
};

Status append(const AppendParams& params, Launch launch);
Status attention(const AttentionParams& params, Launch launch);
// An append to dense sequences and the attention of its tokens, in one launch or in two that
// overlap.
Status attend(const AppendParams& append, const AttentionParams& params, Launch launch);
Status gather(const GatherParams& params, Launch launch);
Status read_pieces(const PieceParams& params, Launch launch);
Status merge(const MergeParams& params, Launch launch);
Status quantize(const QuantizeParams& params, Launch launch);
Status dequantize(const DequantizeParams& params, Launch launch);
Status qk_matmul(const MatmulParams& params, Launch launch);
Status pv_matmul(const MatmulParams& params, Launch launch);

// Of the capture that the stream takes part in; 0: none.
uint64_t capture_id(void* stream);
// Room for the launches of a capture on a stream.
struct Scratch {
  float* partial;  // as AttentionParams has them
  int32_t* counters;
};
Status graph_workspace(Launch launch, size_t floats, size_t counters, Scratch& scratch);
int device_count(const char** error);  // 0 and the reason where there is no driver or GPU
int runtime_version();
int driver_version();

}  // namespace kvquant::cuda
