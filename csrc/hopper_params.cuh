// What a Hopper kernel is made of and what it is told.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "epilogue.cuh"
#include "operands.h"
#include "plan.h"
#include "problem.h"
#include "ptx.cuh"
#include "schedule.h"
#include "wgmma.cuh"

namespace laco {

struct RowPosition {
  int row, x, y, b;

  __device__ __forceinline__ RowPosition(const Rows& rows, int m) : row(m), x(0), y(0), b(0) {
    if (rows.im2col) {
      b = m / rows.per_image;
      const int q = m - b * rows.per_image;
      y = q / rows.out_width;
      x = (q - y * rows.out_width) * rows.side;
      y *= rows.side;
    }
  }
};

// Maps of operands.h, encoded.
struct GemmParams : Arguments {
  CUtensorMap sources[MAX_SOURCES], other, out, second, added;
};

// CONSUMERS warpgroups share a tile of BM x BN: each multiplies 64 of its rows. BN is any multiple of 16 of a forward product, whose
// last piece of columns then repeats some of the one before it: the same numbers are written twice.
template <int BN_, int STAGES_, int CONSUMERS_, bool SPLITS_ = false>
struct Tile {
  static constexpr int BM = 64 * CONSUMERS_, BN = BN_, STAGES = STAGES_, CONSUMERS = CONSUMERS_;
  static constexpr bool SPLITS = SPLITS_;  // whether blocks of a cluster may share its depth
  static constexpr int PIECES = (BN + PIECE_COLUMNS - 1) / PIECE_COLUMNS, STORE_BUFFERS = 2;
  static constexpr int THREADS = 128 * (CONSUMERS + 1);
  // Of 65536: with one consumer every thread has as many as it can address.
  static constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 40 : 32;
  static constexpr int CONSUMER_REGISTERS = CONSUMERS == 2 ? 232 : 160;
  static constexpr int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, SLOT_BYTES = A_BYTES + B_BYTES;
  static constexpr int PIECE_BYTES = PIECE_ROWS * PIECE_COLUMNS * 2;  // what a warp writes at a time
  static constexpr int STORE_BYTES = CONSUMERS * 4 * STORE_BUFFERS * PIECE_BYTES;
  static constexpr int SHARED_BYTES = 1024 + STAGES * SLOT_BYTES + STORE_BYTES + 2 * STAGES * 8;
  static_assert(CONSUMERS >= 1 && CONSUMERS <= 3, "registers are shared out for these");
  static_assert(BN % 16 == 0 && BN >= PIECE_COLUMNS && BN <= 256, "widths that wgmma::multiply is written out for");
  static_assert(A_BYTES % 1024 == 0 && B_BYTES % 1024 == 0, "each copy starts at a swizzle atom");
  static_assert(BM * BN * 4 <= STAGES * SLOT_BYTES, "blocks of a cluster exchange their sums through the slots");
  static_assert(SHARED_BYTES <= 232448);

  // The tile's column that a piece begins at.
  static constexpr __device__ __forceinline__ int column(int piece) {
    return piece * PIECE_COLUMNS < BN - PIECE_COLUMNS ? piece * PIECE_COLUMNS : BN - PIECE_COLUMNS;
  }
};

// COPIED: the copy engine also brings what is added (a mean residual), or gone back through (a pre-activation). SPLIT: the blocks
// of a cluster share a tile's depth.
template <class T_, Element ELEMENT_, Product PRODUCT_, Activation ACTIVATION_, bool COPIED_, bool SPLIT_>
struct Kernel {
  using T = T_;
  static constexpr Element ELEMENT = ELEMENT_;
  static constexpr Product PRODUCT = PRODUCT_;
  static constexpr Activation ACTIVATION = ACTIVATION_;
  static constexpr bool COPIED = COPIED_, SPLIT = SPLIT_;
  static constexpr bool FORWARD = PRODUCT == Product::forward, WEIGHT = PRODUCT == Product::weight_gradient;
  static constexpr bool THROUGH_ACTIVATION = PRODUCT == Product::input_gradient && ACTIVATION != Activation::none;
  static constexpr bool A_MN = WEIGHT, B_MN = !FORWARD;
  static_assert(!SPLIT || !COPIED, "sums are exchanged through the slots");
  static_assert(FORWARD || T::BN % COLUMNS == 0, "a chunk of a gradient's columns lies in one tap");
};

// A position in the ring of slots.
template <int STAGES>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
};

// 64 columns of a gradient.
struct Chunk {
  int tap, c;  // taps of several sources follow each other

  __device__ __forceinline__ Chunk(const GemmParams& p, int column) {
    const int chunk = column / COLUMNS;
    tap = chunk / p.chunks_a_tap;
    c = (chunk - tap * p.chunks_a_tap) * COLUMNS;
  }
};

// The tiles of a block or cluster, and the part of the depth that is its own.
template <class K>
struct Work {
  using T = typename K::T;
  Schedule schedule;
  int splits, rank, first, last;

  __device__ __forceinline__ Work(const GemmParams& p, int rank_)
      : schedule((p.m + T::BM - 1) / T::BM, (p.columns + T::BN - 1) / T::BN, p.group), splits(K::SPLIT ? p.splits : 1),
        rank(rank_), first(0), last(p.steps) {
    if constexpr (K::SPLIT) {
      const int part = (p.steps + splits - 1) / splits;
      first = min(part * rank, p.steps), last = min(first + part, p.steps);
    }
  }

  // A cluster has one tile.
  __device__ __forceinline__ int begin() const { return blockIdx.x / splits; }
  __device__ __forceinline__ bool goes_on(int tile) const { return tile < schedule.tiles(); }
  __device__ __forceinline__ int next(int tile) const { return K::SPLIT ? schedule.tiles() : tile + gridDim.x; }
};

}  // namespace laco
