// The CUDA solver as plain functions, so that the kernels compile without torch's headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "wavefront.h"

namespace inv_conv {

// Elements of global memory that a solve on the current device needs beside its inputs and outputs; usually 0.
template <typename T>
int64_t workspace_count(const wave::Shape& shape);

// Solve on the current device, on `stream`; nothing waits for the device. One launch, or two when the folded weights do not
// fit in shared memory. y, x (batch, groups * size, height, width), w (groups * size, size, kh, kw), contiguous.
template <typename T>
cudaError_t solve_cuda(const wave::Shape& shape, const wave::Orders& orders, const T* y, const T* w, T* x, T* workspace,
                       cudaStream_t stream);

}  // namespace inv_conv
