/* Stands in for CUDA's header of this name: a C++ compiler then makes the kernels run on the processor, the blocks one
 * after another, the threads of a block in turn from one barrier to the next. What it cannot show: races, and speed. */
#pragma once

#include <cuda_runtime_api.h> /* types, and what the header declares without defining */

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

struct Place {
  unsigned x;
};
extern Place threadIdx, blockIdx, blockDim;

void launch(unsigned blocks, int threads, int, cudaStream_t, const std::function<void()>& kernel);
void __syncthreads();
int __syncthreads_count(bool mine);
float __shfl_xor_sync(unsigned, float mine, int lane);
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel* kernel) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline void* __cvta_global_to_generic(size_t address) { return reinterpret_cast<void*>(address); }

using std::min;
