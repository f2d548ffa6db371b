// Warpgroup matrix instructions: d[64, N] (+)= a[64, 16] b[N, 16]^T, 16-bit in shared memory, float in registers.
//
// Thread t of the warpgroup holds, at d[4 * j + i], row 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2), column 8 * j + 2 * (t % 4) + i % 2.
//
// An operand lies in 128-byte lines in 128-byte swizzle; eight lines, 1024 bytes, make an atom. K-major: a line is 64 steps along K
// of one row of d (or column, for b). MN-major: a line is 64 rows (columns) at one step along K, and 64 lines are followed by
// those of the next 64 rows. The hardware swizzles address bits, so that a step along K is a plain displacement of the start.
#pragma once

#include <cstdint>

#include "problem.h"

namespace laco::wgmma {

constexpr int CHUNK_BYTES = 64 * 128;  // of an MN-major operand: 64 lines

template <bool MN>
__device__ __forceinline__ uint64_t descriptor(uint32_t shared_address) {
  constexpr uint64_t swizzle_128 = 1, eight_lines = 1024 >> 4, leading = MN ? CHUNK_BYTES >> 4 : 1;
  return (static_cast<uint64_t>(shared_address & 0x3FFFF) >> 4) | (leading << 16) | (eight_lines << 32) | (swizzle_128 << 62);
}

// What 16 steps along K add to a descriptor, which counts in 16 bytes.
template <bool MN>
constexpr int K_STEP = MN ? 16 * 128 / 16 : 16 * 2 / 16;

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all but the newest batch.
__device__ __forceinline__ void wait_previous() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }

// Waits for everything; `keep` then ties each accumulator to this point, so that no use of it moves in front.
__device__ __forceinline__ void wait_all() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

template <int SIZE>
__device__ __forceinline__ void keep(float (&d)[SIZE]) {
#pragma unroll
  for (int i = 0; i < SIZE; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// An instruction's text must be one literal, hence the macros: of a width N the registers %0 ... and then a, b, whether to add to
// d, and whether a and b are MN-major.

#define LACO_TEXT_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define LACO_TEXT_96 \
  LACO_TEXT_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

#define LACO_TEXT_128 \
  LACO_TEXT_96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define LACO_D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define LACO_D32(i) LACO_D8(i), LACO_D8(i + 8), LACO_D8(i + 16), LACO_D8(i + 24)
#define LACO_D64 LACO_D32(0), LACO_D32(32)
#define LACO_D96 LACO_D64, LACO_D32(64)
#define LACO_D128 LACO_D96, LACO_D32(96)

#define LACO_MULTIPLY(TYPE, N, TEXT, D, A, B, ADD, A_MN_, B_MN_)                                                        \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " ADD ", 0;\n\t"                                                 \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" TEXT "}, "                          \
               A ", " B ", p, 1, 1, " A_MN_ ", " B_MN_ ";\n\t}"                                                        \
               : D                                                                                                   \
               : "l"(a), "l"(b), "r"(accumulate), "n"(int(A_MN)), "n"(int(B_MN)))

template <Element ELEMENT, bool A_MN, bool B_MN>
__device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (ELEMENT == Element::bfloat16) {
    LACO_MULTIPLY("bf16", "128", LACO_TEXT_64, LACO_D64, "%64", "%65", "%66", "%67", "%68");
  } else {
    LACO_MULTIPLY("f16", "128", LACO_TEXT_64, LACO_D64, "%64", "%65", "%66", "%67", "%68");
  }
}

template <Element ELEMENT, bool A_MN, bool B_MN>
__device__ __forceinline__ void multiply(float (&d)[96], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (ELEMENT == Element::bfloat16) {
    LACO_MULTIPLY("bf16", "192", LACO_TEXT_96, LACO_D96, "%96", "%97", "%98", "%99", "%100");
  } else {
    LACO_MULTIPLY("f16", "192", LACO_TEXT_96, LACO_D96, "%96", "%97", "%98", "%99", "%100");
  }
}

template <Element ELEMENT, bool A_MN, bool B_MN>
__device__ __forceinline__ void multiply(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (ELEMENT == Element::bfloat16) {
    LACO_MULTIPLY("bf16", "256", LACO_TEXT_128, LACO_D128, "%128", "%129", "%130", "%131", "%132");
  } else {
    LACO_MULTIPLY("f16", "256", LACO_TEXT_128, LACO_D128, "%128", "%129", "%130", "%131", "%132");
  }
}

#undef LACO_MULTIPLY
#undef LACO_D128
#undef LACO_D96
#undef LACO_D64
#undef LACO_D32
#undef LACO_D8
#undef LACO_TEXT_128
#undef LACO_TEXT_96
#undef LACO_TEXT_64

}  // namespace laco::wgmma
