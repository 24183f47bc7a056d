#include "chunk.cuh"

cudaError_t grgauge::visit_bf16(const Task& task, cudaStream_t stream) { return visit_chunks<bf16>(task, stream); }
