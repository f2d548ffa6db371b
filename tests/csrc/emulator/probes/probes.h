// Small kernels by which tests look at one instruction after the other. Each returns what is wrong with its launch, or "".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ptx.cuh"

namespace probes {

constexpr int SHARED = 128 * 1024;

inline uint32_t aligned_shared() { return (laco::ptx::shared_memory() + 1023) / 1024 * 1024; }

template <class... Parameters>
std::string launch(void (*kernel)(Parameters...), int blocks, int threads, int cluster, Parameters... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads), config.dynamicSmemBytes = SHARED;
  config.attrs = &attribute, config.numAttrs = 1;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// steps.cpp: every thread follows a list of steps.
using Step = std::tuple<std::string, int64_t, int64_t>;
using Programs = std::vector<std::vector<Step>>;  // by thread of the cluster
using Log = std::vector<std::tuple<int, int64_t>>;
std::pair<std::string, Log> run(const Programs& programs, int blocks, uintptr_t memory);

// boxes.cpp. A map is text, "" where none can be encoded. `corners`: none of tiles, lower then upper ones of im2col, whose
// `box` is channels and pixels. Boxes come from, or to, `memory` as they lie in shared memory.
std::string encode(uintptr_t address, int element_bytes, const std::vector<uint64_t>& sizes,
                   const std::vector<uint64_t>& strides, const std::vector<uint32_t>& box, const std::vector<uint32_t>& steps,
                   const std::vector<int>& corners, bool swizzled);
std::string move_box(const std::string& map, const std::vector<int>& at, const std::vector<int>& offsets, uint32_t bytes,
                     uintptr_t memory, bool store);

// products.cpp. Of wgmma 64 of depth, d as the threads hold it: operands of 64 and n rows, the second 16 KB behind the first.
std::string product(bool half, bool a_mn, bool b_mn, int n, uintptr_t operands, uintptr_t d, bool accumulate);
std::string warp_product(bool half, uintptr_t a, uintptr_t b, uintptr_t d);
std::string matrices(uintptr_t in, uintptr_t registers, uintptr_t stored, bool transposed);

}  // namespace probes
