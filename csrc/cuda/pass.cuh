/* What the CUDA files share. */
#pragma once

#include <cuda_runtime.h>

#include "../grgauge.h"

namespace grgauge {

/* A pass as the kernels take it, by value: whatever the host can work out once stands here ready. */
struct Task {
  grgauge_pass pass;
  const float* lr_f32; /* at most one of these two is given; else the rate is pass.lr */
  const double* lr_f64;
  float* partials; /* [GRGAUGE_SUMS, chunks]; null: no sums */
  double log_beta1, log_beta2;
  float weight1, beta2, weight2, eps;
  float beta, one_minus_beta;
};

/* Visit the chunks, one file a gradient dtype. */
cudaError_t visit_f32(const Task& task, cudaStream_t stream);
cudaError_t visit_bf16(const Task& task, cudaStream_t stream);
cudaError_t visit_f16(const Task& task, cudaStream_t stream);

/* Add the chunks' sums up to the segments'. */
cudaError_t add_chunks(const Task& task, cudaStream_t stream);

/* cudaSuccess if the current device can run what this library was compiled for. */
cudaError_t can_add();

}  // namespace grgauge
