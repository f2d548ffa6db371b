// What CUDA C++ adds to C++, as far as csrc uses it; engine/warps.cpp and engine/fibers.cpp carry it out.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)

using std::max, std::min;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {
uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();

enum class Shuffle { from, exclusive_or, down, up };
uint32_t shuffle(Shuffle, uint32_t mask, uint32_t value, int operand, int width);
void sync_warp(uint32_t mask);
void sync_block();

template <class T>
T shuffle(Shuffle kind, uint32_t mask, T value, int operand, int width) {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof(T));
  for (uint32_t& word : words) word = shuffle(kind, mask, word, operand, width);
  std::memcpy(&value, words, sizeof(T));
  return value;
}
}  // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())

// No macros, as cudaLaunchConfig_t has members of these names.
template <dim3 (*SIZE)()>
struct EmulatedSize {
  template <unsigned dim3::*MEMBER>
  struct Number {
    operator unsigned() const { return SIZE().*MEMBER; }
  };
  Number<&dim3::x> x;
  Number<&dim3::y> y;
  Number<&dim3::z> z;
};
constexpr EmulatedSize<emulator::block_size> blockDim{};
constexpr EmulatedSize<emulator::grid_size> gridDim{};

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulator::shuffle(emulator::Shuffle::from, mask, value, lane, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return emulator::shuffle(emulator::Shuffle::exclusive_or, mask, value, bits, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  return emulator::shuffle(emulator::Shuffle::down, mask, value, int(distance), width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  return emulator::shuffle(emulator::Shuffle::up, mask, value, int(distance), width);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFF) { emulator::sync_warp(mask); }
inline void __syncthreads() { emulator::sync_block(); }

inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, 4);
  return y;
}
