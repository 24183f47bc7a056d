#include "chunk.cuh"

cudaError_t grgauge::visit_f32(const Task& task, cudaStream_t stream) { return visit_chunks<float>(task, stream); }
