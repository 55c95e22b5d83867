// Launchers of norm.cu, for bindings.cpp. Raw device pointers, no torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace megads {

enum class Float { f32, f16, bf16 };

struct NormShape {
  int64_t rows;
  int64_t hidden;
};

// y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps), row by row.
//   x, y [rows, hidden], weight [hidden] of `type`; rstd [rows] float.
// Errors: cudaErrorInvalidValue for rows that are too long, or the launch's own.
cudaError_t rms_norm_forward(Float type, NormShape shape, const void* x, const void* weight, float eps, void* y,
                             float* rstd, cudaStream_t stream);

// Most rows of partial sums that `rms_norm_backward` needs on the current device, whatever the shape.
cudaError_t rms_norm_max_partials(int* count);

// Gradients of the above: dx [rows, hidden], dweight [hidden] of `type`.
//   partials: [rms_norm_max_partials, hidden] float of scratch. Sums run in a fixed order: the same bits at each call.
cudaError_t rms_norm_backward(Float type, NormShape shape, const void* dy, const void* x, const void* weight,
                              const float* rstd, void* dx, void* dweight, float* partials, cudaStream_t stream);

}  // namespace megads
