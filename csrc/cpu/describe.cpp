/* What a kernel must know of each tensor, asked for all of them in one call.
 *
 * Asked from Python, that is five calls a tensor and step. DLPack's exchange API (dlpack.h 1.2 and later) answers the
 * same questions without Python; the structs below are the part of it that is used here, and its ABI is stable. */
#include "../grgauge.h"

namespace {

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*from_object)(void* object, Tensor* out);
  void* current_stream;
};

}  // namespace

extern "C" int grgauge_cpu_describe(const void* exchange_api, void* const* objects, int64_t count, uint64_t* out) {
  const auto& api = *static_cast<const ExchangeApi*>(exchange_api);
  for (int64_t i = 0; i < count; ++i) {
    Tensor t;
    if (api.from_object(objects[i], &t)) return GRGAUGE_NO_TENSOR;
    int64_t elements = 1;
    uint32_t strides = 1;
    bool contiguous = true;
    for (int32_t d = t.dims - 1; d >= 0; --d) {
      if (t.shape[d] == 1) continue;
      contiguous &= t.strides[d] == elements;
      elements *= t.shape[d];
      strides = strides * 16777619u + static_cast<uint32_t>(t.strides[d]) + static_cast<uint32_t>(d);
    }
    contiguous |= elements == 0;
    out[i] = reinterpret_cast<uint64_t>(t.data) + t.byte_offset;
    out[count + i] = static_cast<uint64_t>(elements);
    const uint64_t kind = static_cast<uint64_t>(t.code) << 24 | static_cast<uint64_t>(t.bits) << 16 |
                          static_cast<uint64_t>(t.device_type & 0xff) << 8 | static_cast<uint64_t>(t.device_id & 0xff);
    out[2 * count + i] = kind << 32 | (contiguous ? 0 : (strides | 1));
  }
  return GRGAUGE_OK;
}
