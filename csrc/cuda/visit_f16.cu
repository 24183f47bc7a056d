#include "chunk.cuh"

cudaError_t grgauge::visit_f16(const Task& task, cudaStream_t stream) { return visit_chunks<f16>(task, stream); }
