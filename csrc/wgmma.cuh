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
// d, and whether a and b are MN-major. Eight registers are 16 columns; each list goes on where the one before it ends.

#define LACO_R(A, B, C, D, E, F, G, H) "%" #A ", %" #B ", %" #C ", %" #D ", %" #E ", %" #F ", %" #G ", %" #H
#define LACO_TEXT_8 LACO_R(0, 1, 2, 3, 4, 5, 6, 7)
#define LACO_TEXT_16 LACO_TEXT_8 ", " LACO_R(8, 9, 10, 11, 12, 13, 14, 15)
#define LACO_TEXT_24 LACO_TEXT_16 ", " LACO_R(16, 17, 18, 19, 20, 21, 22, 23)
#define LACO_TEXT_32 LACO_TEXT_24 ", " LACO_R(24, 25, 26, 27, 28, 29, 30, 31)
#define LACO_TEXT_40 LACO_TEXT_32 ", " LACO_R(32, 33, 34, 35, 36, 37, 38, 39)
#define LACO_TEXT_48 LACO_TEXT_40 ", " LACO_R(40, 41, 42, 43, 44, 45, 46, 47)
#define LACO_TEXT_56 LACO_TEXT_48 ", " LACO_R(48, 49, 50, 51, 52, 53, 54, 55)
#define LACO_TEXT_64 LACO_TEXT_56 ", " LACO_R(56, 57, 58, 59, 60, 61, 62, 63)
#define LACO_TEXT_72 LACO_TEXT_64 ", " LACO_R(64, 65, 66, 67, 68, 69, 70, 71)
#define LACO_TEXT_80 LACO_TEXT_72 ", " LACO_R(72, 73, 74, 75, 76, 77, 78, 79)
#define LACO_TEXT_88 LACO_TEXT_80 ", " LACO_R(80, 81, 82, 83, 84, 85, 86, 87)
#define LACO_TEXT_96 LACO_TEXT_88 ", " LACO_R(88, 89, 90, 91, 92, 93, 94, 95)
#define LACO_TEXT_104 LACO_TEXT_96 ", " LACO_R(96, 97, 98, 99, 100, 101, 102, 103)
#define LACO_TEXT_112 LACO_TEXT_104 ", " LACO_R(104, 105, 106, 107, 108, 109, 110, 111)
#define LACO_TEXT_120 LACO_TEXT_112 ", " LACO_R(112, 113, 114, 115, 116, 117, 118, 119)
#define LACO_TEXT_128 LACO_TEXT_120 ", " LACO_R(120, 121, 122, 123, 124, 125, 126, 127)

#define LACO_D(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define LACO_D_8 LACO_D(0)
#define LACO_D_16 LACO_D_8, LACO_D(8)
#define LACO_D_24 LACO_D_16, LACO_D(16)
#define LACO_D_32 LACO_D_24, LACO_D(24)
#define LACO_D_40 LACO_D_32, LACO_D(32)
#define LACO_D_48 LACO_D_40, LACO_D(40)
#define LACO_D_56 LACO_D_48, LACO_D(48)
#define LACO_D_64 LACO_D_56, LACO_D(56)
#define LACO_D_72 LACO_D_64, LACO_D(64)
#define LACO_D_80 LACO_D_72, LACO_D(72)
#define LACO_D_88 LACO_D_80, LACO_D(80)
#define LACO_D_96 LACO_D_88, LACO_D(88)
#define LACO_D_104 LACO_D_96, LACO_D(96)
#define LACO_D_112 LACO_D_104, LACO_D(104)
#define LACO_D_120 LACO_D_112, LACO_D(112)
#define LACO_D_128 LACO_D_120, LACO_D(120)

#define LACO_MULTIPLY(TYPE, N, SIZE, A, B, ADD, A_MN_, B_MN_) \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #ADD ", 0;\n\t" \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LACO_TEXT_##SIZE "}, %" #A ", %" #B \
               ", p, 1, 1, %" #A_MN_ ", %" #B_MN_ ";\n\t}" \
               : LACO_D_##SIZE \
               : "l"(a), "l"(b), "r"(accumulate), "n"(int(A_MN)), "n"(int(B_MN)))

#define LACO_WIDTH(N, SIZE, A, B, ADD, A_MN_, B_MN_) \
  template <Element ELEMENT, bool A_MN, bool B_MN> \
  __device__ __forceinline__ void multiply(float (&d)[SIZE], uint64_t a, uint64_t b, int accumulate) { \
    if constexpr (ELEMENT == Element::bfloat16) { \
      LACO_MULTIPLY("bf16", N, SIZE, A, B, ADD, A_MN_, B_MN_); \
    } else { \
      LACO_MULTIPLY("f16", N, SIZE, A, B, ADD, A_MN_, B_MN_); \
    } \
  }

LACO_WIDTH(64, 32, 32, 33, 34, 35, 36)
LACO_WIDTH(80, 40, 40, 41, 42, 43, 44)
LACO_WIDTH(96, 48, 48, 49, 50, 51, 52)
LACO_WIDTH(112, 56, 56, 57, 58, 59, 60)
LACO_WIDTH(128, 64, 64, 65, 66, 67, 68)
LACO_WIDTH(144, 72, 72, 73, 74, 75, 76)
LACO_WIDTH(160, 80, 80, 81, 82, 83, 84)
LACO_WIDTH(176, 88, 88, 89, 90, 91, 92)
LACO_WIDTH(192, 96, 96, 97, 98, 99, 100)
LACO_WIDTH(208, 104, 104, 105, 106, 107, 108)
LACO_WIDTH(224, 112, 112, 113, 114, 115, 116)
LACO_WIDTH(240, 120, 120, 121, 122, 123, 124)
LACO_WIDTH(256, 128, 128, 129, 130, 131, 132)

}  // namespace laco::wgmma
