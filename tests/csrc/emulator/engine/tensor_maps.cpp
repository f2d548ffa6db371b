// Tensor maps: what the driver's encoders refuse, and where a copy's elements lie.
#include "tensor_maps.h"

#include <algorithm>

#include "engine.h"

namespace emulator {
namespace {

int bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return 4;
  }
  return 0;
}

// What both kinds have in common; of swizzles the emulator knows none and 128 bytes.
bool begin(TensorMap& map, const CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, const void* address,
           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* steps, CUtensorMapInterleave interleave,
           CUtensorMapSwizzle swizzle, CUtensorMapFloatOOBfill fill) {
  map = TensorMap{};
  map.magic = MAGIC, map.rank = uint8_t(rank), map.element_bytes = uint8_t(bytes_of(type));
  map.swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B, map.address = reinterpret_cast<uint64_t>(address);
  if (reinterpret_cast<uint64_t>(to) % 64 != 0 || rank < 1 || rank > 5 || map.element_bytes == 0) return false;
  if (address == nullptr || map.address % 16 != 0) return false;
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) return false;
  if (!map.swizzled && swizzle != CU_TENSOR_MAP_SWIZZLE_NONE) return false;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > uint64_t{1} << 32 || steps[i] < 1 || steps[i] > 8) return false;
    map.sizes[i] = uint32_t(sizes[i] - 1), map.steps[i] = uint8_t(steps[i]);
  }
  for (cuuint32_t i = 0; i + 1 < rank; ++i) {
    if (strides[i] % 16 != 0 || strides[i] >= uint64_t{1} << 40) return false;
    map.strides[i] = strides[i];
  }
  return true;
}

bool is_line(const TensorMap& map, cuuint32_t elements) {
  const uint32_t bytes = elements * map.element_bytes;
  return elements >= 1 && elements <= 256 && bytes % 16 == 0 && (!map.swizzled || bytes <= 128);
}

CUresult finish(CUtensorMap* to, const TensorMap& map) {
  std::memcpy(to, &map, sizeof map);
  return CUDA_SUCCESS;
}

}  // namespace

CUresult encode_tiled(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  TensorMap map;
  if (!begin(map, to, type, rank, address, sizes, strides, steps, interleave, swizzle, fill)) return CUDA_ERROR_INVALID_VALUE;
  if (!is_line(map, box[0]) || steps[0] != 1) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (box[i] < 1 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    map.box[i] = uint16_t(box[i]);
  }
  return finish(to, map);
}

CUresult encode_im2col(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                       const cuuint64_t* strides, const int* lower, const int* upper, cuuint32_t channels, cuuint32_t pixels,
                       const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  TensorMap map;
  if (rank < 3 || !begin(map, to, type, rank, address, sizes, strides, steps, interleave, swizzle, fill))
    return CUDA_ERROR_INVALID_VALUE;
  if (!is_line(map, channels) || pixels < 1 || pixels > 1024) return CUDA_ERROR_INVALID_VALUE;
  // Seen on an H200: an image may not be shorter than its lines, nor a line than its pixels.
  for (cuuint32_t i = 0; i + 1 < rank; ++i) {
    if (strides[i] < (i == 0 ? map.element_bytes : strides[i - 1]) * sizes[i]) return CUDA_ERROR_INVALID_VALUE;
  }
  // A corner is a byte with two spatial dimensions; what three allow is less, what one allows is more than the emulator needs.
  const int most = rank == 5 ? 16 : 128;
  for (cuuint32_t i = 0; i + 2 < rank; ++i) {
    if (std::min(lower[i], upper[i]) < -most || std::max(lower[i], upper[i]) >= most) return CUDA_ERROR_INVALID_VALUE;
    map.lower[i] = int8_t(lower[i]), map.upper[i] = int8_t(upper[i]);
  }
  map.im2col = 1, map.box[0] = uint16_t(channels), map.box[1] = uint16_t(pixels);
  return finish(to, map);
}

TensorMap read_map(const CUtensorMap* from, bool im2col, int rank) {
  if (reinterpret_cast<uintptr_t>(from) % 64 != 0) fail("a tensor map at an address that 64 does not divide");
  TensorMap map;
  std::memcpy(&map, from, sizeof map);
  if (map.magic != MAGIC) fail("a tensor map that was never encoded");
  if (bool(map.im2col) != im2col || map.rank != rank) {
    fail("an instruction for %s tensors of rank %d with a map of %s, rank %d", im2col ? "im2col" : "tiled", rank,
         map.im2col ? "im2col" : "tiles", map.rank);
  }
  if (map.swizzled && map.line_bytes() != 128) fail("128-byte swizzle of shorter lines is not emulated");
  return map;
}

uint32_t TensorMap::lines() const {
  if (im2col) return box[1];
  uint32_t count = 1;
  for (int i = 1; i < rank; ++i) count *= (box[i] + steps[i] - 1) / steps[i];
  return count;
}

Line find_line(const TensorMap& map, const Position& position, uint32_t line) {
  int64_t at[5];
  at[0] = position.at[0];
  if (map.im2col) {
    // The run goes on from its first pixel in steps; behind a line's last pixel it begins the next line, and so with images.
    int64_t left = line;
    for (int i = 1; i + 1 < map.rank; ++i) {
      const int64_t low = map.lower[i - 1], high = int64_t(map.size(i)) - 1 + map.upper[i - 1], step = map.steps[i];
      const int64_t first = position.at[i], here = first > high ? 0 : (high - first) / step + 1;
      if (left < here) {
        at[i] = first + left * step;
        left = 0;
      } else {
        const int64_t count = std::max<int64_t>((high - low) / step + 1, 1);
        at[i] = low + (left - here) % count * step;
        left = 1 + (left - here) / count;
      }
      at[i] += position.offsets[i - 1];
    }
    at[map.rank - 1] = position.at[map.rank - 1] + left;
  } else {
    for (int i = 1; i < map.rank; ++i) {
      const uint32_t count = (map.box[i] + map.steps[i] - 1) / map.steps[i];
      at[i] = position.at[i] + int64_t{line % count} * map.steps[i];
      line /= count;
    }
  }
  char* where = reinterpret_cast<char*>(map.address);
  for (int i = 1; i < map.rank; ++i) {
    if (at[i] < 0 || at[i] >= int64_t(map.size(i))) return {nullptr, 0, 0};
    where += at[i] * int64_t(map.strides[i - 1]);
  }
  const int64_t size = int64_t(map.size(0)), first = std::clamp<int64_t>(at[0], 0, size);
  const int64_t last = std::clamp<int64_t>(at[0] + map.box[0], 0, size);
  return {where + first * map.element_bytes, uint32_t(std::min<int64_t>(first - at[0], map.box[0])), uint32_t(last - first)};
}

}  // namespace emulator
