// Host side of the Hopper matrix product: tensor maps, parameters, the launch.
#pragma once

#include <cuda_runtime.h>
#include <cudaTypedefs.h>

#include <algorithm>

#include "hopper_gemm.cuh"
#include "hopper_gemm.h"

namespace laco {

// Taken from the driver at run time: nothing links against libcuda, so the module also loads where there is none.
template <class Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found) != cudaSuccess) return nullptr;
  return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(function) : nullptr;
}

inline CUtensorMapDataType data_type(Element element) {
  return element == Element::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// Boxes are 128 bytes wide in 128-byte swizzle; what lies outside a tensor arrives as zero and is not written.
inline bool encode_tiled(CUtensorMap* map, Element element, const void* base, int rank, const cuuint64_t* sizes, const cuuint64_t* strides_bytes,
                         const cuuint32_t* box) {
  static const auto encode = driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled");
  const cuuint32_t ones[3] = {1, 1, 1};
  return encode && encode(map, data_type(element), rank, const_cast<void*>(base), sizes, strides_bytes, box, ones,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

inline bool encode_matrix(CUtensorMap* map, Element element, const void* base, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[2] = {BK, cuuint32_t(box_rows)};
  return encode_tiled(map, element, base, 2, sizes, strides, box);
}

// Taps are a dimension of their own, so that a width that BK does not divide ends in zeros and not in the next tap.
inline bool encode_weight(CUtensorMap* map, Element element, const void* base, int64_t n, int64_t taps, int64_t channels, int box_rows) {
  const cuuint64_t sizes[3] = {cuuint64_t(channels), cuuint64_t(taps), cuuint64_t(n)};
  const cuuint64_t strides[2] = {cuuint64_t(channels) * 2, cuuint64_t(taps * channels) * 2};
  const cuuint32_t box[3] = {BK, 1, cuuint32_t(box_rows)};
  return encode_tiled(map, element, base, 3, sizes, strides, box);
}

// Pixels (x, y, b) in steps of a window's side. Both corners are 0: every pixel of the image may be a window's first; those of
// windows that the image does not fill have taps outside, which arrive as zeros.
inline bool encode_im2col(CUtensorMap* map, Element element, const void* base, int64_t channels, int64_t width, int64_t height, int64_t batch,
                          int64_t stride_t, int64_t stride_b, int side, int pixels) {
  static const auto encode = driver_function<PFN_cuTensorMapEncodeIm2col_v12000>("cuTensorMapEncodeIm2col");
  const cuuint64_t sizes[4] = {cuuint64_t(channels), cuuint64_t(width), cuuint64_t(height), cuuint64_t(batch)};
  // One image may come with any stride; the encoder wants at least its size.
  const int64_t image = std::max(stride_b, height * width * stride_t);
  const cuuint64_t strides[3] = {cuuint64_t(stride_t) * 2, cuuint64_t(width * stride_t) * 2, cuuint64_t(image) * 2};
  const int corner[2] = {0, 0};
  const cuuint32_t steps[4] = {1, cuuint32_t(side), cuuint32_t(side), 1};
  return encode && encode(map, data_type(element), 4, const_cast<void*>(base), sizes, strides, corner, corner, BK,
                          pixels, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class T>
const char* fill(GemmParams& p, const GemmProblem& q) {
  const int64_t tokens = int64_t(q.height) * q.width;
  const int64_t rows = q.rows(), m = rows * q.batch;
  p.m = int(m), p.n = q.n, p.group = GROUP;
  p.sources = q.num_sources, p.channel_steps = (q.channels + BK - 1) / BK;
  p.bias = static_cast<const uint16_t*>(q.bias);
  p.out_tokens = static_cast<uint16_t*>(q.out), p.out_prefix = q.out_prefix;
  const bool one_matrix = q.side == 1 && (q.batch == 1 || q.stride_b == tokens * q.stride_t);
  // Tokens by themselves are a line: an image's lines follow each other.
  const int height = q.side == 1 ? 1 : q.height, width = q.side == 1 ? int(tokens) : q.width;
  p.rows = Rows{!one_matrix, int(rows), (width + q.side - 1) / q.side, q.side};
  for (int i = 0; i < q.num_sources; ++i) {
    const auto* base = static_cast<const uint16_t*>(q.sources[i]) + q.prefix * q.stride_t;
    const bool ok = one_matrix ? encode_matrix(&p.a[i], q.element, base, m, q.channels, q.stride_t, T::BM)
                               : encode_im2col(&p.a[i], q.element, base, q.channels, width, height, q.batch, q.stride_t,
                                               q.stride_b, q.side, T::BM);
    if (!ok) return one_matrix ? "no tensor map for a source" : "no im2col tensor map for a source";
  }
  if (!encode_weight(&p.w, q.element, q.weight, q.n, int64_t(q.num_sources) * q.side * q.side, q.channels, T::BN)) {
    return "no tensor map for the weight";
  }
  if (!encode_matrix(&p.out, q.element, q.out, m, q.n, q.n, 16)) return "no tensor map for the output";
  if (q.pre && !encode_matrix(&p.pre, q.element, q.pre, m, q.n, q.n, 16)) return "no tensor map for the pre-activation";
  if (q.residual) {
    const int h = q.residual_height, w = q.residual_width, side = q.residual_side;
    const auto* base = static_cast<const uint16_t*>(q.residual) + q.residual_prefix * q.residual_stride_t;
    p.height = h, p.width = w;
    p.residual_rows = Rows{!q.residual_block, int(rows), (w + side - 1) / side, side};
    const int64_t window = int64_t(side) * side * q.n;
    const bool ok = q.residual_block ? encode_matrix(&p.residual, q.element, base, m, window, window, T::BM)
                                     : encode_im2col(&p.residual, q.element, base, q.n, w, h, q.batch, q.residual_stride_t,
                                                     q.residual_stride_b, side, T::BM);
    if (!ok) return "no tensor map for the residual";
  }
  return nullptr;
}

template <class T, Element ELEMENT, Activation ACTIVATION, bool SAVE_PRE, bool RESIDUAL>
const char* launch_kernel(const GemmParams& p, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const auto kernel = hopper_gemm_kernel<T, ELEMENT, ACTIVATION, SAVE_PRE, RESIDUAL>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::SHARED_BYTES) != cudaSuccess) {
    return cudaGetErrorString(cudaGetLastError());
  }
  const int64_t tiles = int64_t((p.m + T::BM - 1) / T::BM) * ((p.n + T::BN - 1) / T::BN);
  kernel<<<int(std::min<int64_t>(tiles, multiprocessors)), T::THREADS, T::SHARED_BYTES, stream>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T, Element ELEMENT>
const char* launch_epilogue(const GemmParams& p, const GemmProblem& q, cudaStream_t stream) {
  if (q.residual) return launch_kernel<T, ELEMENT, Activation::none, false, true>(p, stream);
  switch (static_cast<Activation>(q.activation)) {
    case Activation::erf:
      return q.pre ? launch_kernel<T, ELEMENT, Activation::erf, true, false>(p, stream)
                   : launch_kernel<T, ELEMENT, Activation::erf, false, false>(p, stream);
    case Activation::tanh:
      return q.pre ? launch_kernel<T, ELEMENT, Activation::tanh, true, false>(p, stream)
                   : launch_kernel<T, ELEMENT, Activation::tanh, false, false>(p, stream);
    default:
      return launch_kernel<T, ELEMENT, Activation::none, false, false>(p, stream);
  }
}

template <class T>
const char* launch(const GemmProblem& q, cudaStream_t stream) {
  if (const char* error = refusal(q)) return error;
  if (q.batch == 0 || q.n == 0) return nullptr;
  GemmParams p{};
  if (const char* error = fill<T>(p, q)) return error;
  return q.element == Element::bfloat16 ? launch_epilogue<T, Element::bfloat16>(p, q, stream)
                                        : launch_epilogue<T, Element::float16>(p, q, stream);
}

}  // namespace laco
