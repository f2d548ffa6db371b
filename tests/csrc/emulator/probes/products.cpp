// Products of a warpgroup and of a warp, and the matrices that the latter are made of.
#include <algorithm>

#include "probes.h"
#include "wgmma.cuh"

using namespace laco;

namespace probes {
namespace {

// A's operand of 64 rows at shared address 0, B's behind 16 KB; 64 of depth; d as the threads hold it.
template <Element ELEMENT, bool A_MN, bool B_MN, int SIZE>
__global__ void warpgroup_product(const uint32_t* operands, float* d, int first) {
  constexpr uint32_t B = 16384, BYTES = B + (2 * SIZE + 63) / 64 * 8192;
  const uint32_t base = aligned_shared();
  for (uint32_t i = threadIdx.x; i < BYTES / 4; i += 128) ptx::store_shared_4(base + 4 * i, operands[i]);
  ptx::fence_async();
  __syncthreads();
  float acc[SIZE];
  std::copy(d + threadIdx.x * SIZE, d + (threadIdx.x + 1) * SIZE, acc);
  const uint64_t a = wgmma::descriptor<A_MN>(base), b = wgmma::descriptor<B_MN>(base + B);
  wgmma::fence();
  for (int k = 0; k < 4; ++k) {
    wgmma::multiply<ELEMENT, A_MN, B_MN>(acc, a + k * wgmma::K_STEP<A_MN>, b + k * wgmma::K_STEP<B_MN>, k > 0 || first);
    if (k % 2) wgmma::commit();
  }
  wgmma::wait_previous();
  wgmma::wait_all();
  std::copy(acc, acc + SIZE, d + threadIdx.x * SIZE);
}

// Of the width that is asked for: 64, 80, ... 256.
template <Element ELEMENT, bool A_MN, bool B_MN, int... I>
std::string product_of(int n, uintptr_t operands, uintptr_t d, bool accumulate, std::integer_sequence<int, I...>) {
  std::string error = "no such width";
  const auto of_width = [&](auto width) {
    constexpr int N = decltype(width)::value;
    if (n != N) return;
    error = launch<const uint32_t*, float*, int>(warpgroup_product<ELEMENT, A_MN, B_MN, N / 2>, 1, 128, 1,
                                                 reinterpret_cast<const uint32_t*>(operands), reinterpret_cast<float*>(d),
                                                 accumulate);
  };
  (of_width(std::integral_constant<int, 64 + 16 * I>()), ...);
  return error;
}

// 32 lanes' fragments of 4, 2 and 4 registers.
__global__ void warp_product_kernel(bool half, const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = int(threadIdx.x);
  uint32_t mine[4];
  float sums[4];
  std::copy(a + 4 * lane, a + 4 * lane + 4, mine);
  std::copy(d + 4 * lane, d + 4 * lane + 4, sums);
  if (half)
    ptx::multiply_16x8x16<Element::float16>(sums, mine, b[2 * lane], b[2 * lane + 1]);
  else
    ptx::multiply_16x8x16<Element::bfloat16>(sums, mine, b[2 * lane], b[2 * lane + 1]);
  std::copy(sums, sums + 4, d + 4 * lane);
}

// Four 8 x 8 matrices through ldmatrix; stored again by stmatrix behind them.
__global__ void matrices_kernel(const uint32_t* in, uint32_t* registers, uint32_t* stored, bool transposed) {
  const uint32_t base = aligned_shared(), lane = threadIdx.x;
  for (uint32_t i = lane; i < 128; i += 32) ptx::store_shared_4(base + 4 * i, in[i]);
  __syncwarp();
  uint32_t r[4];
  transposed ? ptx::load_matrices_transposed(base + 16 * lane, r) : ptx::load_matrices(base + 16 * lane, r);
  std::copy(r, r + 4, registers + 4 * lane);
  ptx::store_matrices(base + 1024 + 16 * lane, r[0], r[1], r[2], r[3]);
  __syncwarp();
  for (uint32_t i = lane; i < 128; i += 32) stored[i] = ptx::load_shared_4(base + 1024 + 4 * i);
}

}  // namespace

std::string product(bool half, bool a_mn, bool b_mn, int n, uintptr_t operands, uintptr_t d, bool accumulate) {
  constexpr auto widths = std::make_integer_sequence<int, 13>();
  const auto of_type = [&](auto element) {
    constexpr Element ELEMENT = decltype(element)::value;
    if (a_mn)
      return b_mn ? product_of<ELEMENT, true, true>(n, operands, d, accumulate, widths)
                  : product_of<ELEMENT, true, false>(n, operands, d, accumulate, widths);
    return b_mn ? product_of<ELEMENT, false, true>(n, operands, d, accumulate, widths)
                : product_of<ELEMENT, false, false>(n, operands, d, accumulate, widths);
  };
  return half ? of_type(std::integral_constant<Element, Element::float16>())
              : of_type(std::integral_constant<Element, Element::bfloat16>());
}

std::string warp_product(bool half, uintptr_t a, uintptr_t b, uintptr_t d) {
  return launch<bool, const uint32_t*, const uint32_t*, float*>(
      warp_product_kernel, 1, 32, 1, half, reinterpret_cast<const uint32_t*>(a), reinterpret_cast<const uint32_t*>(b),
      reinterpret_cast<float*>(d));
}

std::string matrices(uintptr_t in, uintptr_t registers, uintptr_t stored, bool transposed) {
  return launch<const uint32_t*, uint32_t*, uint32_t*, bool>(matrices_kernel, 1, 32, 1, reinterpret_cast<const uint32_t*>(in),
                                                             reinterpret_cast<uint32_t*>(registers),
                                                             reinterpret_cast<uint32_t*>(stored), transposed);
}

}  // namespace probes
