// Host side of the matrix product for compute capability 8.x.
#pragma once

#include <cuda_runtime.h>

#include <climits>

#include "ampere_products.cuh"
#include "plan.h"

namespace laco::ampere {

template <class PRODUCT>
const char* launch(const PRODUCT& product, const Launch& how) {
  const auto kernel = gemm_kernel<PRODUCT>;
  const int64_t tiles = int64_t(product.schedule.rows) * product.schedule.columns;
  if (tiles > INT_MAX) return "too many tiles for one launch";
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(tiles));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = SHARED_BYTES;
  config.stream = how.stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, product);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <Element ELEMENT>
const char* forward(const Forward& q, const Launch& how) {
  switch (q.activation) {
    case Activation::erf:
      return launch(ForwardProduct<ELEMENT, Activation::erf>(q), how);
    case Activation::tanh:
      return launch(ForwardProduct<ELEMENT, Activation::tanh>(q), how);
    default:
      return launch(ForwardProduct<ELEMENT, Activation::none>(q), how);
  }
}

template <Element ELEMENT>
const char* input_gradient(const InputGradient& q, const Launch& how) {
  switch (q.activation) {
    case Activation::erf:
      return launch(InputGradientProduct<ELEMENT, Activation::erf>(q), how);
    case Activation::tanh:
      return launch(InputGradientProduct<ELEMENT, Activation::tanh>(q), how);
    default:
      return launch(InputGradientProduct<ELEMENT, Activation::none>(q), how);
  }
}

template <Element ELEMENT>
const char* weight_gradient(const WeightGradient& q, const Launch& how) {
  return launch(WeightGradientProduct<ELEMENT>(q), how);
}

}  // namespace laco::ampere
