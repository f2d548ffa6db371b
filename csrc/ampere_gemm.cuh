// One matrix product for compute capability 8.x and whatever runs its code: a block of four warps makes a tile of 128 x 128,
// each warp 64 x 64 of it. Threads copy what the tile needs, 32 of the depth a step, into a ring of shared-memory slots, two
// steps ahead of the tensor cores. What is copied and what becomes of the result is the product's: see ampere_products.cuh.
//
// By arithmetic, not measured: on an A100 warps of 64 x 64 keep shared memory busy for three quarters of the time that the
// tensor cores need, warps of 32 x 64 for all of it. With three slots, 48 KB, and fewer than 256 registers a thread two blocks
// fit on a multiprocessor of every 8.x, so that one multiplies while the other starts, writes or waits for its copies.
#pragma once

#include <cstdint>

#include "element.cuh"
#include "epilogue.cuh"
#include "ptx.cuh"
#include "schedule.h"

namespace laco::ampere {

constexpr int THREADS = 128, BM = 128, BN = 128, BK = 32, STAGES = 3;
constexpr int CHUNK = 8;                                                     // elements of a copy: 16 bytes
constexpr int OPERAND_BYTES = 128 * BK * 2, SLOT_BYTES = 2 * OPERAND_BYTES;  // A, then B
constexpr int PIECE_BYTES = PIECE_ROWS * PIECE_COLUMNS * 2, PIECES = 4;      // of a warp's 64 x 64
constexpr int SHARED_BYTES = STAGES * SLOT_BYTES;
static_assert(SHARED_BYTES <= 48 * 1024, "more must be asked for");
static_assert(THREADS / 32 * PIECES * PIECE_BYTES <= SHARED_BYTES, "the results go through the ring");

// ---- how 128 rows x 32 of depth of an operand lie in a slot: as they lie in memory ----
//
// ldmatrix reads 16 bytes of eight rows (lines) at a time. Exclusive or with the row puts these in eight different places of
// 128 bytes, that is, in different banks; so are the 128 bytes that eight threads copy at a time.

// Rows of 64 bytes, along the depth.
struct AlongDepth {
  static __device__ __forceinline__ uint32_t at(int row, int chunk) { return row * 64 + ((chunk ^ (row / 2 % 4)) << 4); }

  // Elements (lane / 4 + 8 * (i % 2), 2 * (lane % 4) + 8 * (i / 2)) and the next one, from (row, k) on: a fragment of A.
  static __device__ __forceinline__ void load_a(uint32_t tile, int row, int k, int lane, uint32_t (&r)[4]) {
    ptx::load_matrices(tile + at(row + lane % 16, k / CHUNK + lane / 16), r);
  }

  // Two fragments of B: rows of 8 for i / 2, depth of 8 for i % 2.
  static __device__ __forceinline__ void load_b(uint32_t tile, int row, int k, int lane, uint32_t (&r)[4]) {
    ptx::load_matrices(tile + at(row + lane / 16 * 8 + lane % 8, k / CHUNK + lane / 8 % 2), r);
  }
};

// A line for each k, of twice 64 rows' elements: 128 bytes in either half of the operand's slot.
struct AcrossDepth {
  static __device__ __forceinline__ uint32_t at(int k, int chunk) {
    return chunk / 8 * (OPERAND_BYTES / 2) + k * 128 + (((chunk ^ k) % 8) << 4);
  }

  static __device__ __forceinline__ void load_a(uint32_t tile, int row, int k, int lane, uint32_t (&r)[4]) {
    ptx::load_matrices_transposed(tile + at(k + lane / 16 * 8 + lane % 8, row / CHUNK + lane / 8 % 2), r);
  }

  static __device__ __forceinline__ void load_b(uint32_t tile, int row, int k, int lane, uint32_t (&r)[4]) {
    ptx::load_matrices_transposed(tile + at(k + lane % 16, row / CHUNK + lane / 16), r);
  }
};

// ---- 16 rows x 64 columns between a warp's registers and global memory, through 2 KB of shared memory of the warp's own ----

// In registers as epilogue.cuh says, in memory rows of 128 bytes, 16 bytes a lane.
struct Piece {
  uint32_t buffer;
  int lane;

  // Of elements 4 * j + 2 * half and the next one of the lane's 32.
  __device__ __forceinline__ uint32_t pair(int j, int half) const {
    return buffer + (lane / 4 + 8 * half) * 128 + ((j ^ (lane / 4)) << 4) + lane % 4 * 4;
  }

  // Lanes move four chunks each: chunk lane % 8 of rows lane / 8 + 4 * i.
  __device__ __forceinline__ int row(int i) const { return lane / 8 + 4 * i; }
  __device__ __forceinline__ uint32_t chunk(int i) const { return buffer + row(i) * 128 + (((lane ^ row(i)) % 8) << 4); }

  template <Element ELEMENT>
  __device__ __forceinline__ void put(const float (&v)[32]) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) ptx::store_shared_4(pair(i / 2, i % 2), pack<ELEMENT>(v[2 * i], v[2 * i + 1]));
  }

  // Writes what was put. `offset` is of the first of row lane % 16's channels, or negative: the row is not written.
  __device__ __forceinline__ void write(uint16_t* out, int64_t offset, int column, int columns) const {
    __syncwarp();
    const int c = column + lane % 8 * CHUNK;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t from = __shfl_sync(0xFFFFFFFF, offset, row(i));
      if (from >= 0 && c < columns) ptx::store_global_16(out + from + c, ptx::load_shared_16(chunk(i)));
    }
    __syncwarp();
  }

  // Starts to copy rows `first` ... of a matrix of `columns` columns into the buffer, zeros where it has none.
  __device__ __forceinline__ void read(const uint16_t* matrix, int first, int rows, int column, int columns) const {
    const int c = column + lane % 8 * CHUNK;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = first + row(i);
      ptx::copy_16(chunk(i), matrix + int64_t(m) * columns + c, m < rows && c < columns);
    }
  }
};

// ---- the kernel ----

// PRODUCT has
//   Schedule schedule;                        of the tiles
//   A, B                                      AlongDepth or AcrossDepth
//   int steps() const                         how often 32 of the depth are multiplied
//   Loader(product, tile row, tile column)    whose load(slot) copies the next 32
//   finish(acc, row, chunk, buffers, lane)    a warp's 64 x 64: its first row and which 64 columns
template <class PRODUCT>
__global__ void __launch_bounds__(THREADS, 2) gemm_kernel(const __grid_constant__ PRODUCT product) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 2 * 64, warp_column = warp % 2 * 64;
  const uint32_t slots = ptx::shared_memory();
  int tile_row, tile_column;
  product.schedule.find(blockIdx.x, tile_row, tile_column);

  typename PRODUCT::Loader loader(product, tile_row, tile_column);
  const int steps = product.steps();
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) loader.load(slots + step * SLOT_BYTES);
    ptx::copy_commit();
  }

  float acc[PIECES][8][4] = {};
  uint32_t slot = slots, next = slots + (STAGES - 1) * SLOT_BYTES;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::copy_wait<STAGES - 2>();
    __syncthreads();
    // Everybody is done with the step before, whose slot is filled again. A group a step, empty at the end, keeps the count.
    if (step + STAGES - 1 < steps) loader.load(next);
    ptx::copy_commit();
#pragma unroll
    for (int k = 0; k < BK; k += 16) {
      uint32_t a[PIECES][4], b[4][4];
#pragma unroll
      for (int i = 0; i < PIECES; ++i) PRODUCT::A::load_a(slot, warp_row + 16 * i, k, lane, a[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) PRODUCT::B::load_b(slot + OPERAND_BYTES, warp_column + 16 * j, k, lane, b[j]);
#pragma unroll
      for (int i = 0; i < PIECES; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          ptx::multiply_16x8x16<PRODUCT::ELEMENT>(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
    next = slot;
    slot = slot == slots + (STAGES - 1) * SLOT_BYTES ? slots : slot + SLOT_BYTES;
  }
  __syncthreads();
  product.finish(reinterpret_cast<float (&)[PIECES][32]>(acc), tile_row * BM + warp_row, tile_column * 2 + warp % 2,
                 slots + warp * PIECES * PIECE_BYTES, lane);
}

}  // namespace laco::ampere
