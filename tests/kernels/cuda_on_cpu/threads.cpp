/* The threads of a block as fibers. */
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda_runtime.h"

Place threadIdx, blockIdx, blockDim;

namespace {

constexpr size_t kStack = 1 << 16;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  bool done;
  float lane;
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
const std::function<void()>* body;
int counting, counted;

void run() {
  (*body)();
  Fiber& me = fibers[threadIdx.x];
  me.done = true;
  swapcontext(&me.context, &scheduler);
}

}  // namespace

void __syncthreads() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

int __syncthreads_count(bool mine) {
  counting += mine;
  __syncthreads();
  const int result = counted;
  __syncthreads();
  return result;
}

float __shfl_xor_sync(unsigned, float mine, int lane) {
  fibers[threadIdx.x].lane = mine;
  __syncthreads();
  const float other = fibers[threadIdx.x ^ lane].lane;
  __syncthreads();
  return other;
}

void launch(unsigned blocks, int threads, int, cudaStream_t, const std::function<void()>& kernel) {
  body = &kernel;
  blockDim.x = threads;
  fibers.resize(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (Fiber& fiber : fibers) {
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = kStack;
      makecontext(&fiber.context, run, 0);
    }
    for (int left = threads; left;) { /* each round ends with all at the same barrier, or all at the end */
      counting = 0;
      for (threadIdx.x = 0; int(threadIdx.x) < threads; ++threadIdx.x) {
        swapcontext(&scheduler, &fibers[threadIdx.x].context);
        left -= fibers[threadIdx.x].done;
      }
      counted = counting;
      if (left && left < threads) {
        std::fputs("some threads of a block ended while others wait for them\n", stderr);
        std::abort();
      }
    }
  }
}

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device < 0 ? cudaErrorInvalidDevice : cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
}
