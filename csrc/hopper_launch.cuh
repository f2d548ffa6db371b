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

inline CUtensorMapDataType data_type(Element element) {
  return element == Element::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// Boxes are 128 bytes wide in 128-byte swizzle; what lies outside a tensor arrives as zero and is not written.
inline bool encode_tiled(CUtensorMap* map, Element element, const void* base, int rank, const cuuint64_t* sizes,
                         const cuuint64_t* strides_bytes, const cuuint32_t* box) {
  static const auto encode = driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled");
  const cuuint32_t ones[3] = {1, 1, 1};
  return encode && encode(map, data_type(element), rank, const_cast<void*>(base), sizes, strides_bytes, box, ones,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

inline bool encode_matrix(CUtensorMap* map, Element element, const void* base, int64_t rows, int64_t columns, int64_t stride,
                          int box_rows) {
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[2] = {64, cuuint32_t(box_rows)};
  return encode_tiled(map, element, base, 2, sizes, strides, box);
}

// [n, taps, channels]. Taps are a dimension of their own, so that a width that 64 does not divide ends in zeros and not in the
// next tap.
inline bool encode_taps(CUtensorMap* map, Element element, const void* base, int64_t n, int64_t taps, int64_t channels,
                        int box_rows) {
  const cuuint64_t sizes[3] = {cuuint64_t(channels), cuuint64_t(taps), cuuint64_t(n)};
  const cuuint64_t strides[2] = {cuuint64_t(channels) * 2, cuuint64_t(taps * channels) * 2};
  const cuuint32_t box[3] = {64, 1, cuuint32_t(box_rows)};
  return encode_tiled(map, element, base, 3, sizes, strides, box);
}

// Pixels (x, y, b) in steps of a window's side. Both corners are 0: every pixel of the image may be a window's first; those of
// windows that the image does not fill have taps outside, which arrive as zeros.
inline bool encode_im2col(CUtensorMap* map, Element element, const void* base, const Tokens& t, int height, int width, int pixels) {
  static const auto encode = driver_function<PFN_cuTensorMapEncodeIm2col_v12000>("cuTensorMapEncodeIm2col");
  const cuuint64_t sizes[4] = {cuuint64_t(t.channels), cuuint64_t(width), cuuint64_t(height), cuuint64_t(t.batch)};
  // One image may come with any stride; the encoder wants at least its size.
  const int64_t image = std::max(t.stride_b, int64_t(height) * width * t.stride_t);
  const cuuint64_t strides[3] = {cuuint64_t(t.stride_t) * 2, cuuint64_t(width) * t.stride_t * 2, cuuint64_t(image) * 2};
  const int corner[2] = {0, 0};
  const cuuint32_t steps[4] = {1, cuuint32_t(t.side), cuuint32_t(t.side), 1};
  return encode && encode(map, data_type(element), 4, const_cast<void*>(base), sizes, strides, corner, corner, 64, pixels, steps,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Maps of 64 channels x `box_rows` rows, one a source.
inline bool encode_rows(CUtensorMap* maps, Rows& rows, Element element, const Tokens& t, int box_rows) {
  const int64_t tokens = int64_t(t.height) * t.width;
  const bool one_matrix = t.side == 1 && (t.batch == 1 || t.stride_b == tokens * t.stride_t);
  // Tokens by themselves are a line: an image's lines follow each other.
  const int height = t.side == 1 ? 1 : t.height, width = t.side == 1 ? int(tokens) : t.width;
  rows = Rows{!one_matrix, int(t.rows_per_image()), (width + t.side - 1) / t.side, t.side};
  for (int i = 0; i < t.num_sources; ++i) {
    const bool ok = one_matrix ? encode_matrix(&maps[i], element, t.sources[i], t.rows(), t.channels, t.stride_t, box_rows)
                               : encode_im2col(&maps[i], element, t.sources[i], t, height, width, box_rows);
    if (!ok) return false;
  }
  return true;
}

template <class K>
const char* launch_kernel(GemmParams& p, const Launch& how) {
  using T = typename K::T;
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const auto kernel = hopper_gemm_kernel<K>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::SHARED_BYTES) != cudaSuccess) {
    return cudaGetErrorString(cudaGetLastError());
  }
  p.group = GROUP, p.splits = K::SPLIT ? how.splits : 1;
  const int64_t tiles = int64_t((p.m + T::BM - 1) / T::BM) * ((p.chunks + T::CHUNKS - 1) / T::CHUNKS);
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
  if (K::SPLIT) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {unsigned(p.splits), 1, 1};
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, p);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T, Element ELEMENT, Product PRODUCT, Activation ACTIVATION = Activation::none, bool COPIED = false>
const char* launch_split(GemmParams& p, const Launch& how) {
  if constexpr (T::SPLITS && !COPIED) {
    if (how.splits > 1 && p.steps < 4 * how.splits) return "a depth this short cannot be shared";
    if (how.splits > 1) return launch_kernel<Kernel<T, ELEMENT, PRODUCT, ACTIVATION, false, true>>(p, how);
  }
  return launch_kernel<Kernel<T, ELEMENT, PRODUCT, ACTIVATION, COPIED, false>>(p, how);
}

template <class T, Element ELEMENT>
const char* launch_typed(const Forward& q, const Launch& how) {
  GemmParams p{};
  p.m = int(q.x.rows()), p.n = q.n, p.bias = static_cast<const uint16_t*>(q.bias);
  p.sources_count = q.x.num_sources, p.channel_steps = int(steps_of(q.x.channels));
  p.steps = int(q.x.num_sources * q.x.taps() * p.channel_steps);
  p.taps = 1, p.chunks = p.chunks_a_tap = int(chunks_of(1, q.n));
  p.out_tokens = static_cast<uint16_t*>(q.out), p.out_prefix = q.out_prefix, p.has_second = q.pre != nullptr;
  p.residual_kind = q.residual_kind;
  if (!encode_rows(p.sources, p.rows, ELEMENT, q.x, T::BM)) return "no tensor map for a source";
  if (!encode_taps(&p.other, ELEMENT, q.weight, q.n, q.x.num_sources * q.x.taps(), q.x.channels, T::BN)) {
    return "no tensor map for the weight";
  }
  if (!encode_matrix(&p.out, ELEMENT, q.out, p.m, q.n, q.n, PIECE_ROWS)) return "no tensor map for the output";
  if (q.pre && !encode_matrix(&p.second, ELEMENT, q.pre, p.m, q.n, q.n, PIECE_ROWS)) return "no tensor map for the pre-activation";
  if (q.residual_kind != Residual::none) p.residual = Image(residual_tokens(q));
  if (q.residual_kind == Residual::mean && how.splits == 1) {
    const int64_t window = q.residual.taps() * q.n;
    p.added_rows = Rows{0, int(q.residual.rows_per_image()), q.residual.out_width(), q.residual.side};
    const bool ok = q.residual_block ? encode_matrix(&p.added, ELEMENT, q.residual.sources[0], p.m, window, window, T::BM)
                                     : encode_rows(&p.added, p.added_rows, ELEMENT, q.residual, T::BM);
    if (!ok) return "no tensor map for the residual";
    return launch_kernel<Kernel<T, ELEMENT, Product::forward, Activation::none, true, false>>(p, how);
  }
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
const char* launch_typed(const InputGradient& q, const Launch& how) {
  GemmParams p{};
  const int64_t taps = int64_t(q.side) * q.side;
  p.m = int(q.gradient.rows()), p.n = q.channels;
  p.sources_count = 1, p.steps = p.channel_steps = int(steps_of(q.gradient.channels));
  p.taps = int(taps), p.chunks_a_tap = int(chunks_of(1, q.channels)), p.chunks = int(chunks_of(taps, q.channels));
  if (!encode_rows(p.sources, p.rows, ELEMENT, q.gradient, T::BM)) return "no tensor map for the gradient";
  if (!encode_taps(&p.other, ELEMENT, q.weight, q.gradient.channels, taps, q.channels, BK)) return "no tensor map for the weight";
  if (q.pre) {
    p.sums = q.sums, p.has_second = q.act != nullptr;
    p.added_rows = Rows{0, p.m, p.m, 1};
    if (!encode_matrix(&p.added, ELEMENT, q.pre, p.m, p.n, p.n, T::BM)) return "no tensor map for the pre-activation";
    if (!encode_matrix(&p.out, ELEMENT, q.out, p.m, p.n, p.n, PIECE_ROWS)) return "no tensor map for the output";
    if (q.act && !encode_matrix(&p.second, ELEMENT, q.act, p.m, p.n, p.n, PIECE_ROWS)) return "no tensor map for the activation";
    return q.activation == Activation::erf
               ? launch_kernel<Kernel<T, ELEMENT, Product::input_gradient, Activation::erf, true, false>>(p, how)
               : launch_kernel<Kernel<T, ELEMENT, Product::input_gradient, Activation::tanh, true, false>>(p, how);
  }
  p.out_tokens = static_cast<uint16_t*>(q.out), p.out_prefix = q.out_prefix;
  p.grid = Image(Tokens{{}, 1, q.gradient.batch, q.height, q.width, 0, 0, q.side, q.channels});
  p.residual_kind = q.residual_kind;
  if (q.residual_kind != Residual::none) p.residual = Image(q.residual_gradient);
  return launch_kernel<Kernel<T, ELEMENT, Product::input_gradient, Activation::none, false, false>>(p, how);
}

template <class T, Element ELEMENT>
const char* launch_typed(const WeightGradient& q, const Launch& how) {
  GemmParams p{};
  const int64_t taps = q.x.num_sources * q.x.taps();
  p.m = q.gradient.channels, p.n = q.x.channels;
  p.sources_count = q.x.num_sources, p.steps = p.channel_steps = int(steps_of(q.x.rows()));
  p.taps = int(taps), p.chunks_a_tap = int(chunks_of(1, q.x.channels)), p.chunks = int(chunks_of(taps, q.x.channels));
  if (!encode_rows(&p.other, p.other_rows, ELEMENT, q.gradient, BK)) return "no tensor map for the gradient";
  if (!encode_rows(p.sources, p.rows, ELEMENT, q.x, BK)) return "no tensor map for a source";
  if (!encode_taps(&p.out, ELEMENT, q.out, p.m, taps, q.x.channels, PIECE_ROWS)) return "no tensor map for the output";
  return launch_split<T, ELEMENT, Product::weight_gradient>(p, how);
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

template <class T, class Problem>
const char* launch(const Problem& q, const Launch& how) {
  if (const char* error = refusal(q)) return error;
  if (how.splits != 1 && !(T::SPLITS && (how.splits == 2 || how.splits == 4))) return "this tile's depth cannot be shared so";
  if (is_empty(q)) return launch_empty(q, how);
  return q.element == Element::bfloat16 ? launch_typed<T, Element::bfloat16>(q, how)
                                        : launch_typed<T, Element::float16>(q, how);
}

}  // namespace laco
