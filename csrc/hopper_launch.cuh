// Host side of the Hopper matrix products: tensor maps, parameters, the launch.
#pragma once

#include <cuda_runtime.h>
#include <cudaTypedefs.h>

#include <algorithm>

#include "hopper_gemm.cuh"

namespace laco {

// Taken from the driver at run time: nothing links against libcuda, so the module also loads where there is none.
template <class Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found) != cudaSuccess) return nullptr;
  return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(function) : nullptr;
}

// Boxes are 128 bytes wide in 128-byte swizzle.
inline bool encode(CUtensorMap* encoded, Element element, const Map& map) {
  static const auto tiled = driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled");
  static const auto im2col = driver_function<PFN_cuTensorMapEncodeIm2col_v12000>("cuTensorMapEncodeIm2col");
  if (!tiled || !im2col) return false;
  cuuint64_t sizes[4], strides[3];
  std::copy_n(map.sizes, map.rank, sizes);
  std::transform(map.strides, map.strides + map.rank - 1, strides, [](int64_t stride) { return cuuint64_t(stride) * 2; });
  const cuuint32_t step = cuuint32_t(map.side), steps[4] = {1, map.side ? step : 1, map.side ? step : 1, 1};
  const auto type = element == Element::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  void* base = const_cast<void*>(map.base);
  if (map.side) {
    const int corner[2] = {0, 0};  // both, so that every pixel may be a window's first
    return im2col(encoded, type, map.rank, base, sizes, strides, corner, corner, map.box[0], map.box[1], steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  }
  cuuint32_t box[3];
  std::copy_n(map.box, map.rank, box);
  return tiled(encoded, type, map.rank, base, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// What a kernel is launched with, or what is wrong.
inline const char* encode(GemmParams& p, Element element, const Description& d) {
  static_cast<Arguments&>(p) = d.arguments;
  for (int i = 0; i < d.arguments.sources_count; ++i) {
    if (!encode(&p.sources[i], element, d.maps.sources[i])) return "no tensor map for a source";
  }
  if (!encode(&p.other, element, d.maps.other)) return "no tensor map for the second operand";
  if (d.maps.out.rank && !encode(&p.out, element, d.maps.out)) return "no tensor map for the output";
  if (d.maps.second.rank && !encode(&p.second, element, d.maps.second)) return "no tensor map for the second output";
  if (d.copied && !encode(&p.added, element, d.maps.added)) return "no tensor map for what is added";
  return nullptr;
}

inline cudaLaunchAttribute cluster_of(int blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(blocks), 1, 1};
  return attribute;
}

template <class K>
cudaError_t allow_shared_memory() {
  return cudaFuncSetAttribute(hopper_gemm_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, K::T::SHARED_BYTES);
}

// Clusters of so many blocks that run at once, or 0.
template <class K>
int clusters_of(int blocks) {
  cudaLaunchAttribute attribute = cluster_of(blocks);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(K::T::THREADS), config.dynamicSmemBytes = K::T::SHARED_BYTES;
  config.attrs = &attribute, config.numAttrs = 1;
  int found = 0;
  if (allow_shared_memory<K>() != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&found, hopper_gemm_kernel<K>, &config) != cudaSuccess) {
    cudaGetLastError();  // a plan without clusters is a plan
    return 0;
  }
  return found;
}

template <class K>
const char* launch_kernel(const GemmParams& p, const Launch& how) {
  using T = typename K::T;
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (allow_shared_memory<K>() != cudaSuccess) return cudaGetErrorString(cudaGetLastError());
  const int64_t tiles = int64_t((p.m + T::BM - 1) / T::BM) * ((p.columns + T::BN - 1) / T::BN);
  if (tiles * p.splits >= int64_t(1) << 31) return "too many tiles";
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  // Clusters hold one tile each, others work on several.
  config.gridDim = dim3(unsigned(K::SPLIT ? tiles * p.splits : std::min<int64_t>(tiles, multiprocessors)));
  config.blockDim = dim3(T::THREADS);
  config.dynamicSmemBytes = T::SHARED_BYTES;
  config.stream = how.stream;
  config.attrs = attributes;
  if (how.dependent) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (K::SPLIT) attributes[config.numAttrs++] = cluster_of(p.splits);
  const cudaError_t error = cudaLaunchKernelEx(&config, hopper_gemm_kernel<K>, p);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T, Element ELEMENT, Product PRODUCT, Activation ACTIVATION = Activation::none, bool COPIED = false>
const char* launch_split(const GemmParams& p, const Launch& how) {
  if constexpr (T::SPLITS && !COPIED) {
    if (how.splits > 1) return launch_kernel<Kernel<T, ELEMENT, PRODUCT, ACTIVATION, false, true>>(p, how);
  }
  return launch_kernel<Kernel<T, ELEMENT, PRODUCT, ACTIVATION, COPIED, false>>(p, how);
}

template <class T, Element ELEMENT>
const char* launch_product(const Forward& q, const GemmParams& p, bool copied, const Launch& how) {
  if (copied) return launch_kernel<Kernel<T, ELEMENT, Product::forward, Activation::none, true, false>>(p, how);
  switch (q.activation) {
    case Activation::erf:
      return launch_split<T, ELEMENT, Product::forward, Activation::erf>(p, how);
    case Activation::tanh:
      return launch_split<T, ELEMENT, Product::forward, Activation::tanh>(p, how);
    default:
      return launch_split<T, ELEMENT, Product::forward>(p, how);
  }
}

template <class T, Element ELEMENT>
const char* launch_product(const InputGradient& q, const GemmParams& p, bool, const Launch& how) {
  switch (q.activation) {
    case Activation::erf:
      return launch_kernel<Kernel<T, ELEMENT, Product::input_gradient, Activation::erf, true, false>>(p, how);
    case Activation::tanh:
      return launch_kernel<Kernel<T, ELEMENT, Product::input_gradient, Activation::tanh, true, false>>(p, how);
    default:
      return launch_kernel<Kernel<T, ELEMENT, Product::input_gradient, Activation::none, false, false>>(p, how);
  }
}

template <class T, Element ELEMENT>
const char* launch_product(const WeightGradient&, const GemmParams& p, bool, const Launch& how) {
  return launch_split<T, ELEMENT, Product::weight_gradient>(p, how);
}

template <class T, Element ELEMENT, class Problem>
const char* launch_typed(const Problem& q, const Launch& how) {
  const Description d = describe(q, T::BM, T::BN, how.splits);
  GemmParams p{};
  if (const char* error = encode(p, ELEMENT, d)) return error;
  return launch_product<T, ELEMENT>(q, p, d.copied, how);
}

inline bool is_empty(const Forward& q) { return q.x.batch == 0 || q.n == 0; }
inline bool is_empty(const InputGradient& q) { return q.gradient.batch == 0; }
inline bool is_empty(const WeightGradient& q) { return q.x.batch == 0; }

// What there is to do where there are no rows.
inline const char* launch_empty(const Forward&, const Launch&) { return nullptr; }
inline const char* launch_empty(const InputGradient&, const Launch&) { return nullptr; }
inline const char* launch_empty(const WeightGradient& q, const Launch& how) {
  const cudaError_t error = cudaMemsetAsync(q.out, 0, 2 * q.x.depth() * q.gradient.channels, how.stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Of what plan.h does not refuse.
template <class T, class Problem>
const char* launch(const Problem& q, const Launch& how) {
  if (is_empty(q)) return launch_empty(q, how);
  return q.element == Element::bfloat16 ? launch_typed<T, Element::bfloat16>(q, how)
                                        : launch_typed<T, Element::float16>(q, how);
}

}  // namespace laco
