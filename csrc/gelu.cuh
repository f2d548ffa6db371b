// GELU in a matrix product's epilogue, where every instruction an element costs half a per cent of the product.
#pragma once

#include "problem.h"
#include "ptx.cuh"

namespace laco {

// The logarithm of the normal tail Phi(-|x|) is nearly a parabola, so a polynomial of degree five under one exponential gives
// the tail itself to 4.2e-4 of its value (|x| < 4; 5e-3 to 6, beyond which it is under 1e-9): a fifth of bfloat16's rounding.
// The leading coefficient is negative: infinities give what x Phi(x) gives, and NaN stays NaN.
__device__ __forceinline__ float normal_approx(float x) {
  const float z = fabsf(x);
  float log_tail = fmaf(z, -1.8149780623940193e-4f, 4.237289391445628e-3f);
  log_tail = fmaf(z, log_tail, -4.192510391045577e-2f);
  log_tail = fmaf(z, log_tail, -4.7423335517518767e-1f);
  log_tail = fmaf(z, log_tail, -1.1435965980582272f);
  log_tail = fmaf(z, log_tail, -1.000602539129757f);
  const float tail = ptx::exp2_approx(log_tail);
  return x > 0.f ? 1.f - tail : tail;
}

// Phi(x); exact for float16, whose rounding is as large as the error of the above.
template <Element ELEMENT>
__device__ __forceinline__ float normal(float x) {
  return ELEMENT == Element::bfloat16 ? normal_approx(x) : 0.5f * (1.f + erff(x * 0.70710678118654752f));
}

// (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3); constants carry log2(e).
__device__ __forceinline__ float sigmoid_of_tanh(float x) {
  return ptx::reciprocal_approx(1.f + ptx::exp2_approx(x * fmaf(x * x, -0.10294324f, -2.3022082f)));
}

template <Element ELEMENT, Activation ACTIVATION>
__device__ __forceinline__ float activate(float x) {
  if constexpr (ACTIVATION == Activation::erf) return x * normal<ELEMENT>(x);
  if constexpr (ACTIVATION == Activation::tanh) return x * sigmoid_of_tanh(x);
  return x;
}

// The activation and, in `slope`, its derivative.
template <Element ELEMENT, Activation ACTIVATION>
__device__ __forceinline__ float activate_with_slope(float x, float& slope) {
  static_assert(ACTIVATION != Activation::none);
  if constexpr (ACTIVATION == Activation::erf) {
    // The density is exp(-x^2 / 2) / sqrt(2 pi).
    const float phi = normal<ELEMENT>(x), density = 0.39894228f * ptx::exp2_approx(x * x * -0.72134752f);
    slope = fmaf(x, density, phi);
    return x * phi;
  } else {
    // d(x s) = s + x s (1 - s) (2 u)'
    const float s = sigmoid_of_tanh(x), inner = fmaf(x * x, 0.21406445f, 1.5957691f);
    slope = fmaf(x * s * (1.f - s), inner, s);
    return x * s;
  }
}

}  // namespace laco
