// float16, as far as csrc uses it.
#pragma once

#include "cuda_runtime.h"

using __half = _Float16;
struct __half2 {
  __half x, y;
};

inline __half __float2half_rn(float x) { return static_cast<__half>(x); }
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  std::memcpy(&x, &bits, 2);
  return x;
}
