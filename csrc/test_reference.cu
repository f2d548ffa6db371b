// The specification of the Hopper product as a slow kernel that shares nothing with it, and the comparison with it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include <unistd.h>

#include "test_hopper.h"

using laco::Element;

namespace {

void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  printf("ERROR %s: %s\n", what, cudaGetErrorString(error));
  fflush(stdout);
  _exit(4);
}

// Elements by their type, which is known at run time only: slow and plain.
__device__ float to_float(uint16_t x, Element element) {
  return element == Element::float16 ? __half2float(__ushort_as_half(x)) : __bfloat162float(__ushort_as_bfloat16(x));
}

__device__ uint16_t from_float(float x, Element element) {
  return element == Element::float16 ? __half_as_ushort(__float2half(x)) : __bfloat16_as_ushort(__float2bfloat16(x));
}

__global__ void fill_random(uint16_t* x, size_t size, Element element, unsigned seed, float scale) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < size; i += size_t(gridDim.x) * blockDim.x) {
    unsigned h = unsigned(i) * 2654435761u ^ (seed * 40503u + 0x9E3779B9u);
    h ^= h >> 16, h *= 0x85EBCA6Bu, h ^= h >> 13, h *= 0xC2B2AE35u, h ^= h >> 16;
    x[i] = from_float((float(h) / 4294967296.f - 0.5f) * 3.4641016f * scale, element);  // variance scale^2
  }
}

// NaN, in either type, into the first `prefix` tokens of every image.
__global__ void poison_prefix(uint16_t* x, int64_t stride_b, int64_t stride_t, int prefix) {
  for (int64_t i = threadIdx.x; i < prefix * stride_t; i += blockDim.x) x[blockIdx.x * stride_b + i] = 0xFFFF;
}

struct Geometry {
  laco::GemmProblem q;
  int rows, line, m, k;
};

__device__ float entry(const Geometry& g, int m, int k) {
  const int b = m / g.rows, r = m % g.rows, c = k % g.q.channels, source = k / g.q.channels;
  const int side = g.q.side, tap = source % (side * side);
  const int y = r / g.line * side + tap / side, x = r % g.line * side + tap % side;
  if (y >= g.q.height || x >= g.q.width) return 0.f;
  const uint16_t* a = static_cast<const uint16_t*>(g.q.sources[source / (side * side)]);
  return to_float(a[b * g.q.stride_b + (g.q.prefix + y * g.q.width + x) * g.q.stride_t + c], g.q.element);
}

__device__ float residual(const Geometry& g, int m, int n) {
  const uint16_t* x = static_cast<const uint16_t*>(g.q.residual);
  const int side = g.q.residual_side, b = m / g.rows, r = m % g.rows, line = (g.q.residual_width + side - 1) / side;
  float sum = 0.f;
  int count = 0;
  for (int tap = 0; tap < side * side; ++tap) {
    const int y = r / line * side + tap / side, w = r % line * side + tap % side;
    if (y >= g.q.residual_height || w >= g.q.residual_width) continue;
    const int token = g.q.residual_block ? r * side * side + tap : y * g.q.residual_width + w;
    sum += to_float(x[b * g.q.residual_stride_b + (g.q.residual_prefix + token) * g.q.residual_stride_t + n], g.q.element);
    ++count;
  }
  return sum / count;
}

// 64 x 64 outputs a block, 16 a thread.
__global__ void reference_kernel(Geometry g, float* out, float* pre) {
  __shared__ float a[16][65], w[16][65];
  const int m0 = blockIdx.y * 64, n0 = blockIdx.x * 64, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const uint16_t* weight = static_cast<const uint16_t*>(g.q.weight);
  float acc[4][4] = {};
  for (int k0 = 0; k0 < g.k; k0 += 16) {
    for (int i = threadIdx.x; i < 1024; i += 256) {
      const int row = i / 16, k = k0 + i % 16;
      a[i % 16][row] = m0 + row < g.m && k < g.k ? entry(g, m0 + row, k) : 0.f;
      w[i % 16][row] = n0 + row < g.q.n && k < g.k ? to_float(weight[int64_t(n0 + row) * g.k + k], g.q.element) : 0.f;
    }
    __syncthreads();
    for (int k = 0; k < 16; ++k) {
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) acc[i][j] += a[k][ty + 16 * i] * w[k][tx + 16 * j];
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int m = m0 + ty + 16 * i, n = n0 + tx + 16 * j;
      if (m >= g.m || n >= g.q.n) continue;
      float v = acc[i][j];
      if (g.q.bias) v += to_float(static_cast<const uint16_t*>(g.q.bias)[n], g.q.element);
      pre[int64_t(m) * g.q.n + n] = v;
      if (g.q.activation == 1) v = 0.5f * v * (1.f + erff(v * 0.70710678f));
      if (g.q.activation == 2) v = 0.5f * v * (1.f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
      if (g.q.residual) v += residual(g, m, n);
      out[int64_t(m) * g.q.n + n] = v;
    }
  }
}

struct Verdict {
  double error2, size2;
  unsigned long long bad, touched;
  float worst;
};

// `got` has `prefix` rows in front of every `rows`.
__global__ void compare_kernel(const uint16_t* got, Element element, const float* expected, int m, int n, int rows, int prefix, Verdict* verdict) {
  double error2 = 0, size2 = 0;
  unsigned long long bad = 0;
  float worst = 0;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < int64_t(m) * n; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = i / n, at = (row + (row / rows + 1) * prefix) * n + i % n;
    const float g = to_float(got[at], element), e = expected[i], d = fabsf(g - e);
    if (!(d <= 0.01f + 0.01f * fabsf(e))) ++bad;
    error2 += double(d) * d, size2 += double(e) * e, worst = fmaxf(worst, d);
  }
  for (int o = 16; o; o /= 2) {
    error2 += __shfl_xor_sync(~0u, error2, o), size2 += __shfl_xor_sync(~0u, size2, o);
    bad += __shfl_xor_sync(~0u, bad, o), worst = fmaxf(worst, __shfl_xor_sync(~0u, worst, o));
  }
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&verdict->error2, error2), atomicAdd(&verdict->size2, size2), atomicAdd(&verdict->bad, bad);
    atomicMax(reinterpret_cast<int*>(&verdict->worst), __float_as_int(worst));
  }
}

// Counts what was written where nothing may be: prefix rows, and everything behind the last row.
__global__ void untouched_kernel(const uint16_t* got, int64_t elements, int64_t used, int n, int rows, int prefix, Verdict* verdict) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < elements; i += int64_t(gridDim.x) * blockDim.x) {
    const bool inside = i < used && (i / n) % (rows + prefix) >= prefix;
    if (!inside && got[i] != 0xFFFF) atomicAdd(&verdict->touched, 1ULL);
  }
}

constexpr size_t GUARD = 65536;

// Which 64 x 64 blocks are wrong, and the first few wrong values.
void describe(const uint16_t* got, Element element, const float* expected, int m, int n, int rows, int prefix) {
  const size_t total = (m + size_t(prefix) * (m / rows)) * n;
  std::vector<uint16_t> g(total);
  std::vector<float> e(size_t(m) * n);
  must(cudaMemcpy(g.data(), got, total * 2, cudaMemcpyDeviceToHost), "copy");
  must(cudaMemcpy(e.data(), expected, e.size() * 4, cudaMemcpyDeviceToHost), "copy");
  const auto at = [&](int i, int j) {
    const uint16_t x = g[(i + size_t(i / rows + 1) * prefix) * n + j];
    return element == Element::float16 ? __half2float(__ushort_as_half(x)) : __bfloat162float(__ushort_as_bfloat16(x));
  };
  int shown = 0;
  for (int row0 = 0; row0 < std::min(m, 64 * 12); row0 += 64) {
    printf("    rows %5d: ", row0);
    for (int n0 = 0; n0 < std::min(n, 64 * 64); n0 += 64) {
      int bad = 0, all = 0;
      for (int i = row0; i < std::min(m, row0 + 64); ++i) {
        for (int j = n0; j < std::min(n, n0 + 64); ++j, ++all) {
          const float x = at(i, j), y = e[size_t(i) * n + j];
          bad += !(std::fabs(x - y) <= 0.01f + 0.01f * std::fabs(y));
        }
      }
      putchar(bad == 0 ? '.' : bad == all ? '#' : char('0' + std::min(9, bad * 10 / all)));
    }
    printf("\n");
  }
  for (int i = 0; i < m && shown < 24; ++i) {
    for (int j = 0; j < n && shown < 24; ++j) {
      const float x = at(i, j), y = e[size_t(i) * n + j];
      if (std::fabs(x - y) <= 0.01f + 0.01f * std::fabs(y)) continue;
      printf("    [%d, %d] got %g, expected %g\n", i, j, x, y);
      ++shown;
      j += shown > 8 ? 7 : 0;
    }
    if (shown > 8) i += 6;
  }
}

}  // namespace

uint16_t* Tensors::allocate(size_t elements, unsigned seed, float scale) {
  void* pointer;
  must(cudaMalloc(&pointer, (elements + GUARD) * 2), "allocate");
  must(cudaMemset(pointer, 0xFF, (elements + GUARD) * 2), "poison");
  if (scale > 0) fill_random<<<512, 256>>>(static_cast<uint16_t*>(pointer), elements, gemm.element, seed, scale);
  memory.push_back(pointer);
  return static_cast<uint16_t*>(pointer);
}

Tensors::Tensors(const Problem& given) : problem(given), gemm{} {
  const Problem& p = problem;
  const int tokens = p.prefix + p.height * p.width;
  gemm.element = p.element, gemm.num_sources = p.sources, gemm.batch = p.batch, gemm.height = p.height, gemm.width = p.width;
  gemm.stride_t = p.channels, gemm.stride_b = int64_t(tokens) * p.channels, gemm.prefix = p.prefix;
  gemm.side = p.side, gemm.channels = p.channels, gemm.n = p.n, gemm.activation = p.activation;
  for (int i = 0; i < p.sources; ++i) {
    uint16_t* x = allocate(p.batch * gemm.stride_b, 17 + i, 1.f);
    if (p.prefix) poison_prefix<<<p.batch, 256>>>(x, gemm.stride_b, gemm.stride_t, p.prefix);
    gemm.sources[i] = x;
  }
  gemm.weight = allocate(size_t(p.n) * p.k(), 5, 1.5f / std::sqrt(float(p.k())));
  gemm.bias = p.bias ? allocate(p.n, 3, 0.5f) : nullptr;
  gemm.out_prefix = p.out_prefix;
  out_elements = size_t(p.m() + p.batch * p.out_prefix) * p.n;
  pre_elements = size_t(p.m()) * p.n;
  gemm.out = allocate(out_elements, 0, 0.f);
  gemm.pre = p.save ? allocate(pre_elements, 0, 0.f) : nullptr;
  if (p.residual) {
    const int fine = p.residual_height * p.residual_width + (p.residual == 1 ? p.prefix + 1 : 0);
    gemm.residual_prefix = p.residual == 1 ? p.prefix + 1 : 0;
    gemm.residual_stride_t = p.n, gemm.residual_stride_b = int64_t(fine) * p.n;
    uint16_t* x = allocate(p.batch * gemm.residual_stride_b, 99, 1.f);
    poison_prefix<<<p.batch, 256>>>(x, gemm.residual_stride_b, gemm.residual_stride_t, gemm.residual_prefix);
    gemm.residual = x, gemm.residual_block = p.residual == 2;
    gemm.residual_side = p.residual_side;
    gemm.residual_height = p.residual_height, gemm.residual_width = p.residual_width;
  }
  void* pointer;
  must(cudaMalloc(&pointer, pre_elements * 4), "allocate");
  memory.push_back(pointer), expected = static_cast<float*>(pointer);
  must(cudaMalloc(&pointer, pre_elements * 4), "allocate");
  memory.push_back(pointer), expected_pre = static_cast<float*>(pointer);
  must(cudaDeviceSynchronize(), "fill");
}

Tensors::~Tensors() {
  for (void* pointer : memory) cudaFree(pointer);
}

void Tensors::poison_outputs() {
  must(cudaMemset(gemm.out, 0xFF, (out_elements + GUARD) * 2), "poison");
  if (gemm.pre) must(cudaMemset(gemm.pre, 0xFF, (pre_elements + GUARD) * 2), "poison");
  must(cudaDeviceSynchronize(), "poison");
}

void compute_reference(const Tensors& t) {
  const Problem& p = t.problem;
  const Geometry g{t.gemm, p.rows(), (p.width + p.side - 1) / p.side, p.m(), p.k()};
  reference_kernel<<<dim3((p.n + 63) / 64, (p.m() + 63) / 64), 256>>>(g, t.expected, t.expected_pre);
  must(cudaDeviceSynchronize(), "reference");
}

bool check(const Tensors& t, const std::string& label, bool only_failures) {
  const Problem& p = t.problem;
  bool good = true;
  for (int which = 0; which < (t.gemm.pre ? 2 : 1); ++which) {
    const uint16_t* got = static_cast<const uint16_t*>(which ? t.gemm.pre : t.gemm.out);
    const float* expected = which ? t.expected_pre : t.expected;
    const int prefix = which ? 0 : p.out_prefix;
    const size_t used = which ? t.pre_elements : t.out_elements;
    Verdict *verdict, v{};
    must(cudaMalloc(&verdict, sizeof v), "allocate");
    must(cudaMemset(verdict, 0, sizeof v), "clear");
    compare_kernel<<<264, 256>>>(got, p.element, expected, p.m(), p.n, p.rows(), prefix, verdict);
    untouched_kernel<<<264, 256>>>(got, used + GUARD, used, p.n, p.rows(), prefix, verdict);
    must(cudaMemcpy(&v, verdict, sizeof v, cudaMemcpyDeviceToHost), "compare");
    cudaFree(verdict);
    const double norm = std::sqrt(v.error2 / v.size2);
    const bool pass = v.bad == 0 && v.touched == 0 && norm < (p.element == Element::float16 ? 4e-4 : 3e-3);
    if (pass && only_failures) continue;
    printf("%s %s%s norm %.2e worst %.3f bad %llu/%zu stray writes %llu\n", pass ? "PASS" : "FAIL", label.c_str(),
           which ? " (pre)" : "", norm, v.worst, v.bad, t.pre_elements, v.touched);
    if (!pass) describe(got, p.element, expected, p.m(), p.n, p.rows(), prefix);
    good &= pass;
  }
  fflush(stdout);
  return good;
}
