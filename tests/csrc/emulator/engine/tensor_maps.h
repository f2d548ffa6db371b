// What the emulator keeps in a CUtensorMap, and the walk over the elements that a copy touches.
#pragma once

#include <cstdint>

#include "cuda.h"

namespace emulator {

constexpr uint32_t MAGIC = 0x7EA50F1D;

struct TensorMap {
  uint32_t magic;
  uint8_t im2col, rank, element_bytes, swizzled;
  uint64_t address;
  uint64_t strides[4];  // bytes, of dimensions 1 ...
  uint32_t sizes[5];    // less one
  uint16_t box[5];      // im2col: channels, pixels
  uint8_t steps[5];
  int8_t lower[3], upper[3];  // im2col

  uint64_t size(int dimension) const { return uint64_t{sizes[dimension]} + 1; }
  uint32_t line_bytes() const { return uint32_t{box[0]} * element_bytes; }
  uint32_t lines() const;  // of the box in shared memory
  uint32_t bytes() const { return lines() * line_bytes(); }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

TensorMap read_map(const CUtensorMap* map, bool im2col, int rank);

// A line of a box: `inside` of its elements, from `skipped` on, are in the tensor.
struct Line {
  char* where;               // of element `skipped`
  uint32_t skipped, inside;  // elements
};
struct Position {
  int at[5], offsets[3];
};
Line find_line(const TensorMap& map, const Position& position, uint32_t line);

// 16 bytes of a 128-byte line change places with others of its 1024-byte atom.
inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

CUresult encode_tiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                      const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill);
CUresult encode_im2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const int*,
                       const int*, cuuint32_t, cuuint32_t, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

}  // namespace emulator
