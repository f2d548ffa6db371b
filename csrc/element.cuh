// The two 16-bit types, two elements in a register.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "problem.h"

namespace laco {

template <Element ELEMENT>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (ELEMENT == Element::bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <Element ELEMENT>
__device__ __forceinline__ float low(uint32_t pair) {
  if constexpr (ELEMENT == Element::bfloat16) return __uint_as_float(pair << 16);
  return __half2float(__ushort_as_half(static_cast<uint16_t>(pair)));
}

template <Element ELEMENT>
__device__ __forceinline__ float high(uint32_t pair) {
  if constexpr (ELEMENT == Element::bfloat16) return __uint_as_float(pair & 0xFFFF0000u);
  return __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> 16)));
}

}  // namespace laco
