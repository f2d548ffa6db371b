// GELU in a matrix product's epilogue, where every instruction an element costs half a per cent of the product.
#pragma once

#include "hopper_gemm.h"

namespace laco {

enum class Activation : int { none = 0, erf = 1, tanh = 2 };  // as torch.nn.functional.gelu's `approximate`

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The logarithm of the normal tail Phi(-|x|) is nearly a parabola, so a polynomial of degree five under one exponential gives
// the tail itself to 4.2e-4 of its value (|x| < 4; 5e-3 to 6, beyond which it is under 1e-9): a fifth of bfloat16's rounding.
// The leading coefficient is negative: infinities give what x Phi(x) gives, and NaN stays NaN.
__device__ __forceinline__ float gelu_erf_approx(float x) {
  const float z = fabsf(x);
  float log_tail = fmaf(z, -1.8149780623940193e-4f, 4.237289391445628e-3f);
  log_tail = fmaf(z, log_tail, -4.192510391045577e-2f);
  log_tail = fmaf(z, log_tail, -4.7423335517518767e-1f);
  log_tail = fmaf(z, log_tail, -1.1435965980582272f);
  log_tail = fmaf(z, log_tail, -1.000602539129757f);
  const float tail = exp2_approx(log_tail);
  return x * (x > 0.f ? 1.f - tail : tail);
}

// For float16, whose rounding is as large as the error of the above.
__device__ __forceinline__ float gelu_erf(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }

// (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3); constants carry log2(e).
__device__ __forceinline__ float gelu_tanh(float x) {
  const float minus_2u = x * fmaf(x * x, -0.10294324f, -2.3022082f);
  return x * reciprocal_approx(1.f + exp2_approx(minus_2u));
}

template <Element ELEMENT, Activation ACTIVATION>
__device__ __forceinline__ float activate(float x) {
  if constexpr (ACTIVATION == Activation::erf) return ELEMENT == Element::bfloat16 ? gelu_erf_approx(x) : gelu_erf(x);
  if constexpr (ACTIVATION == Activation::tanh) return gelu_tanh(x);
  return x;
}

}  // namespace laco
