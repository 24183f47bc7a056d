/* The chunks' sums, float, added up to the segments', double: a block for each number of the result. */
#include <math.h>

#include "pass.cuh"

namespace grgauge {
namespace {

constexpr int kMost = 1024; /* threads */

/* The first row from `begin` on that is not of a segment before `segment`: every thread looks at one row, then they
 * share out what lies between two of them. */
__device__ int64_t first_row(const grgauge_pass& pass, int64_t begin, int64_t segment) {
  int64_t end = pass.chunks;
  while (begin < end) {
    const int64_t apart = (end - begin + blockDim.x - 1) / blockDim.x;
    const int64_t mine = begin + threadIdx.x * apart;
    const int before = __syncthreads_count(mine < end && pass.rows[mine].segment < segment);
    if (!before) return begin;
    end = min(end, begin + before * apart);
    begin += (before - 1) * apart + 1;
  }
  return begin;
}

__global__ void __launch_bounds__(kMost) add(const __grid_constant__ Task task) {
  const grgauge_pass& pass = task.pass;
  const int64_t segment = blockIdx.x / GRGAUGE_SUMS;
  const float* column = task.partials + blockIdx.x % GRGAUGE_SUMS * pass.chunks;
  double* out = pass.stats + blockIdx.x;
  if (pass.found_inf && *pass.found_inf != 0.0f) {
    if (threadIdx.x == 0) *out = nan("");
    return;
  }
  const int64_t begin = first_row(pass, 0, segment), end = first_row(pass, begin, segment + 1);

  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) sum += column[i];

  __shared__ double sums[kMost];
  sums[threadIdx.x] = sum;
  for (int half = blockDim.x / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *out = sums[0];
}

}  // namespace
}  // namespace grgauge

cudaError_t grgauge::add_chunks(const Task& task, cudaStream_t stream) {
  const grgauge_pass& pass = task.pass;
  if (pass.segments > INT32_MAX / GRGAUGE_SUMS) return cudaErrorInvalidConfiguration;
  /* Wide blocks for long segments; narrow ones, of which more run at a time, for many short ones. */
  const int threads = pass.chunks / pass.segments > 256 ? kMost : 256;
  add<<<unsigned(pass.segments * GRGAUGE_SUMS), threads, 0, stream>>>(task);
  return cudaGetLastError();
}

cudaError_t grgauge::can_add() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, add);
}
