// The CUDA kernels' launchers. Each guards the device, launches on the stream, checks the launch;
// none allocates or synchronises.
#pragma once

#include "params.h"
#include "status.h"

namespace kvquant::cuda {

struct Launch {
  int device;
  void* stream;  // cudaStream_t
};

Status append(const AppendParams& params, Launch launch);
Status attention(const AttentionParams& params, Launch launch);
// An append to dense sequences and the attention of its tokens: in one launch where they are few.
Status attend(const AppendParams& append, const AttentionParams& params, Launch launch);
Status gather(const GatherParams& params, Launch launch);
Status quantize(const QuantizeParams& params, Launch launch);
Status dequantize(const DequantizeParams& params, Launch launch);
Status qk_matmul(const MatmulParams& params, Launch launch);
Status pv_matmul(const MatmulParams& params, Launch launch);

bool is_capturing(void* stream);
int device_count(const char** error);  // 0 and the reason where there is no driver or GPU
int runtime_version();
int driver_version();

}  // namespace kvquant::cuda
