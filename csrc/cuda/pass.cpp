/* The entry points: two launches a pass, nothing waited for. */
#include "pass.cuh"

#include <math.h>

namespace grgauge {
namespace {

int code_of(cudaError_t error) { return error == cudaSuccess ? GRGAUGE_OK : GRGAUGE_CUDA_ERROR + int(error); }

bool known(int32_t dtype) { return dtype == GRGAUGE_F32 || dtype == GRGAUGE_BF16 || dtype == GRGAUGE_F16; }

cudaError_t visit(const Task& task, cudaStream_t stream) {
  switch (task.pass.grad_dtype) {
    case GRGAUGE_F32: return visit_f32(task, stream);
    case GRGAUGE_BF16: return visit_bf16(task, stream);
    default: return visit_f16(task, stream);
  }
}

}  // namespace
}  // namespace grgauge

extern "C" {

int grgauge_abi(void) { return GRGAUGE_ABI; }

const char* grgauge_error(int code) {
  switch (code) {
    case GRGAUGE_OK: return "no error";
    case GRGAUGE_BAD_DTYPE: return "gradients and parameters must be float32, bfloat16 or float16, moments float32 or bfloat16";
  }
  return code >= GRGAUGE_CUDA_ERROR ? cudaGetErrorString(cudaError_t(code - GRGAUGE_CUDA_ERROR)) : "unknown error";
}

int grgauge_cuda_check(int device) {
  using namespace grgauge;
  if (const cudaError_t error = cudaSetDevice(device)) return code_of(error);
  return code_of(can_add());
}

int grgauge_cuda_pass(const grgauge_pass* pass, const float* lr_f32, const double* lr_f64, float* partials, int device,
                      void* stream_) {
  using namespace grgauge;
  if (!known(pass->grad_dtype) || (pass->params && !known(pass->param_dtype))) return GRGAUGE_BAD_DTYPE;
  if (pass->moment_dtype != GRGAUGE_F32 && pass->moment_dtype != GRGAUGE_BF16) return GRGAUGE_BAD_DTYPE;
  const auto stream = static_cast<cudaStream_t>(stream_);
  Task task{};
  task.pass = *pass;
  task.lr_f32 = lr_f32, task.lr_f64 = lr_f64;
  task.partials = pass->stats ? partials : nullptr;
  task.log_beta1 = log(pass->beta1), task.log_beta2 = log(pass->beta2);
  task.weight1 = float(1.0 - pass->beta1);
  task.beta2 = float(pass->beta2), task.weight2 = float(1.0 - pass->beta2);
  task.eps = float(pass->eps);
  task.beta = float(pass->beta), task.one_minus_beta = float(1.0 - pass->beta);

  if (const cudaError_t error = cudaSetDevice(device)) return code_of(error);
  if (pass->chunks)
    if (const cudaError_t error = visit(task, stream)) return code_of(error);
  if (pass->stats && pass->segments) return code_of(add_chunks(task, stream));
  return GRGAUGE_OK;
}
}
