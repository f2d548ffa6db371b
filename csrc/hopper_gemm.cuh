// One matrix product for Hopper, sm_90a: out[m, n] = epilogue(sum_k A[m, k] W[n, k] + bias[n]), 16-bit in and out, float sums.
//
// A warpgroup whose one thread drives the copy engine fills a ring of shared-memory slots; the other warpgroups multiply what
// lies there and write the result. Blocks are persistent: while a tile is written, the ring already holds the next one.
//
//   full[slot]   completes when the slot's bytes have arrived: one arrival (the producer's, which announces the bytes)
//   empty[slot]  completes when every warp that reads the slot is done
//
// The n-th use of a slot waits for parity n % 2 of `full`, and the producer before it for parity (n + 1) % 2 of `empty`: a
// fresh barrier counts as having completed phase 1, so that the first round does not wait. A parity cannot tell a phase from the
// one two before it; every warp passes every slot in turn, so that nobody is that late.
//
// Tried on an H200 and slower on every shape of the papers: clusters of two blocks that share W by multicast (the best of them
// took 1.4 to 1.8 times as long), and two consumers that take turns at tiles of their own (1.2 to 1.3 times).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "element.cuh"
#include "gelu.cuh"
#include "hopper_gemm.h"
#include "ptx.cuh"
#include "schedule.h"
#include "wgmma.cuh"

namespace laco {

constexpr int BK = 64;  // channels a slot: 128 bytes, the width of the swizzle

// How rows are found in an image: row q is the window whose first pixel is (q % out_width, q / out_width) * side.
struct Rows {
  int im2col;  // 0: the tensor map is a plain matrix
  int per_image;
  int out_width;
  int side;
};

struct GemmParams {
  CUtensorMap a[MAX_SOURCES];  // 64 channels x BM rows
  CUtensorMap w;               // (channel, tap, n): 64 x 1 x BN
  CUtensorMap out, pre;        // 64 columns x 16 rows, stored by one warp
  CUtensorMap residual;        // 64 channels x BM rows
  const uint16_t* bias;        // [n] or null
  uint16_t* out_tokens;        // [B, out_prefix + rows.per_image, n]
  int m, n;
  int sources, channel_steps;  // K = sources * windows' tokens * channels
  Rows rows;
  Rows residual_rows;
  int height, width;  // of the residual's image
  int out_prefix;     // > 0: images do not follow each other, so that rows are written without the copy engine (with RESIDUAL)
  int group;          // row tiles that take turns before the next column of tiles
};

// CONSUMERS warpgroups share a tile of BM x BN: each multiplies 64 of its rows.
template <int BN_, int STAGES_, int CONSUMERS_>
struct Tile {
  static constexpr int BM = 64 * CONSUMERS_, BN = BN_, STAGES = STAGES_, CONSUMERS = CONSUMERS_;
  static constexpr int STORE_BUFFERS = 2;
  static constexpr int THREADS = 128 * (CONSUMERS + 1);
  static constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 40 : 32;
  static constexpr int CONSUMER_REGISTERS = CONSUMERS == 2 ? 232 : 160;
  static constexpr int A_BYTES = BM * BK * 2, W_BYTES = BN * BK * 2, SLOT_BYTES = A_BYTES + W_BYTES;
  static constexpr int PIECE_BYTES = 16 * 64 * 2;  // what a warp writes at a time: 16 rows of 64 columns
  static constexpr int STORE_BYTES = CONSUMERS * 4 * STORE_BUFFERS * PIECE_BYTES;
  static constexpr int SHARED_BYTES = 1024 + STAGES * SLOT_BYTES + STORE_BYTES + 2 * STAGES * 8;
  static_assert(CONSUMERS == 2 || CONSUMERS == 3, "registers are shared out for these");
  static_assert(BN == 128 || BN == 256, "widths that wgmma::multiply is written out for");
  static_assert(A_BYTES % 1024 == 0 && W_BYTES % 1024 == 0, "each copy starts at a swizzle atom");
  static_assert(SHARED_BYTES <= 232448);
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

template <class T>
__device__ __forceinline__ Schedule schedule_of(const GemmParams& p) {
  return Schedule((p.m + T::BM - 1) / T::BM, (p.n + T::BN - 1) / T::BN, p.group);
}

// Loads 64 channels of BM rows; `at` is found once a tile.
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

// One thread: everything the block's tensor cores will read, in the order in which they read it.
template <class T, bool RESIDUAL>
__device__ __forceinline__ void produce(const GemmParams& p, uint32_t slots, uint32_t full, uint32_t empty) {
  const Schedule schedule = schedule_of<T>(p);
  Ring<T::STAGES> ring;
  int iteration = 0;
  for (int tile = blockIdx.x; tile < schedule.tiles(); tile += gridDim.x) {
    int row, column;
    schedule.find(tile, row, column);
    const int m0 = row * T::BM, n0 = column * T::BN;
    const RowPosition at(p.rows, m0);
    for (int source = 0; source < p.sources; ++source) {
      const CUtensorMap* map_a = &p.a[source];
      for (int tap = 0; tap < p.rows.side * p.rows.side; ++tap) {
        const int dy = tap / p.rows.side, dx = tap - dy * p.rows.side;
        for (int step = 0; step < p.channel_steps; ++step, ring.next(), ++iteration) {
          const uint32_t to = slots + ring.slot * T::SLOT_BYTES, barrier = full + ring.slot * 8;
          ptx::barrier_wait(empty + ring.slot * 8, ring.parity ^ 1, "empty", iteration);
          // Parts outside the tensors count too: they arrive as zeros.
          ptx::barrier_expect(barrier, T::SLOT_BYTES);
          if (p.rows.im2col) {
            ptx::load_im2col(map_a, barrier, to, step * BK, at.x, at.y, at.b, dx, dy);
          } else {
            ptx::load_2d(map_a, barrier, to, step * BK, at.row);
          }
          ptx::load_3d(&p.w, barrier, to + T::A_BYTES, step * BK, source * p.rows.side * p.rows.side + tap, n0);
        }
      }
    }
    if constexpr (RESIDUAL) {
      const RowPosition first(p.residual_rows, m0);
      for (int chunk = 0; chunk < T::BN / 64; ++chunk) {
        for (int tap = 0; tap < p.residual_rows.side * p.residual_rows.side; ++tap, ring.next(), ++iteration) {
          const int dy = tap / p.residual_rows.side, dx = tap - dy * p.residual_rows.side;
          const uint32_t to = slots + ring.slot * T::SLOT_BYTES, barrier = full + ring.slot * 8;
          ptx::barrier_wait(empty + ring.slot * 8, ring.parity ^ 1, "empty for residual", iteration);
          ptx::barrier_expect(barrier, T::A_BYTES);
          const int c = n0 + chunk * 64;
          if (p.residual_rows.im2col) {
            ptx::load_im2col(&p.residual, barrier, to, c, first.x, first.y, first.b, dx, dy);
          } else {
            ptx::load_2d(&p.residual, barrier, to, tap * p.n + c, first.row);
          }
        }
      }
    }
  }
  // Stay until every slot has been given back.
  for (int i = 0; i < T::STAGES; ++i, ring.next()) {
    ptx::barrier_wait(empty + ring.slot * 8, ring.parity ^ 1, "empty at the end", iteration);
  }
}

// A consumer warp's way from registers to the output: pieces of 16 rows x 64 columns through buffers of its own.
// TOKENS: the output may have prefix tokens in front of each image's rows.
template <class T, Element ELEMENT, bool TOKENS>
struct Writer {
  const GemmParams& p;
  uint32_t buffers;
  int lane, piece = 0;

  // values: the warp's accumulators of 64 columns; `row` and `column` are the piece's first.
  __device__ __forceinline__ void write(const float* values, const CUtensorMap* map, bool is_out, int row, int column) {
    const uint32_t buffer = buffers + piece % T::STORE_BUFFERS * T::PIECE_BYTES;
    ++piece;
    if (lane == 0) ptx::store_wait_read<T::STORE_BUFFERS - 1>();
    __syncwarp();
    // Lanes 8i..8i+7 give the row addresses of the i-th 8 x 8 matrix: upper left, lower left, upper right, lower right.
    const uint32_t line = buffer + (lane % 16) * 128;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* v = values + 8 * i;
      ptx::store_matrices(line + (((2 * i + lane / 16) ^ (lane % 8)) << 4), pack<ELEMENT>(v[0], v[1]), pack<ELEMENT>(v[2], v[3]),
                          pack<ELEMENT>(v[4], v[5]), pack<ELEMENT>(v[6], v[7]));
    }
    if (TOKENS && is_out && p.out_prefix > 0) {
      __syncwarp();
      write_tokens(buffer, row, column);
    } else {
      ptx::fence_async();
      __syncwarp();
      if (lane == 0) {
        if (row < p.m && column < p.n) ptx::store_2d(map, buffer, column, row);
        ptx::store_commit();
      }
    }
  }

  __device__ __forceinline__ void write_tokens(uint32_t buffer, int row, int column) const {
    const int chunk = lane % 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = 4 * i + lane / 8, m = row + r, n = column + chunk * 8;
      uint4 v;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(buffer + r * 128 + ((chunk ^ (r % 8)) << 4)));
      if (m < p.m && n < p.n) {
        const int b = m / p.rows.per_image;
        const int64_t token = m + static_cast<int64_t>(b + 1) * p.out_prefix;
        *reinterpret_cast<uint4*>(p.out_tokens + token * p.n + n) = v;
      }
    }
  }
};

// One over the number of real tokens in row m's window.
__device__ __forceinline__ float window_scale(const GemmParams& p, int m) {
  const int q = m % p.rows.per_image, y = q / p.residual_rows.out_width, x = q - y * p.residual_rows.out_width;
  const int side = p.residual_rows.side;
  return __frcp_rn(static_cast<float>(min(p.height - side * y, side) * min(p.width - side * x, side)));
}

template <class T, Element ELEMENT, Activation ACTIVATION, bool SAVE_PRE, bool RESIDUAL>
__device__ __forceinline__ void consume(const GemmParams& p, uint32_t slots, uint32_t full, uint32_t empty,
                                        uint32_t buffers, int consumer) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const Schedule schedule = schedule_of<T>(p);
  const int steps = p.sources * p.rows.side * p.rows.side * p.channel_steps;
  const int first_row = consumer * 64;
  Writer<T, ELEMENT, RESIDUAL> writer{p, buffers + (consumer * 4 + warp) * T::STORE_BUFFERS * T::PIECE_BYTES, lane};
  Ring<T::STAGES> ring;

  const auto release = [&](int slot) {
    if (lane == 0) ptx::barrier_arrive(empty + slot * 8);
  };

  for (int tile = blockIdx.x; tile < schedule.tiles(); tile += gridDim.x) {
    int tile_row, tile_column;
    schedule.find(tile, tile_row, tile_column);
    const int row = tile_row * T::BM + first_row + warp * 16, n0 = tile_column * T::BN;

    // Asked for before the product and used after it.
    uint32_t bias[T::BN / 8] = {};
    if (p.bias != nullptr) {
      const uint16_t* first = p.bias + n0 + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < T::BN / 8; ++j) {
        if (8 * j < p.n - n0) asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(bias[j]) : "l"(first + 8 * j));
      }
    }

    float acc[T::BN / 2];
    int previous = 0;
    for (int step = 0; step < steps; ++step) {
      ptx::barrier_wait(full + ring.slot * 8, ring.parity, "full", step);
      const uint32_t slot = slots + ring.slot * T::SLOT_BYTES;
      const uint64_t a = wgmma::descriptor(slot + first_row * 128), w = wgmma::descriptor(slot + T::A_BYTES);
      wgmma::keep(acc);
      wgmma::fence();
      // Descriptors count in 16 bytes: 2 are 16 channels.
#pragma unroll
      for (int k = 0; k < BK / 16; ++k) wgmma::multiply<ELEMENT>(acc, a + 2 * k, w + 2 * k, step + k > 0);
      wgmma::commit();
      wgmma::wait_previous();
      if (step > 0) release(previous);
      previous = ring.slot;
      ring.next();
    }
    wgmma::wait_all();
    release(previous);
    wgmma::keep(acc);

    float scale[2];
    if constexpr (RESIDUAL) {
      scale[0] = window_scale(p, row + lane / 4);
      scale[1] = window_scale(p, row + lane / 4 + 8);
    }
#pragma unroll
    for (int chunk = 0; chunk < T::BN / 64; ++chunk) {
      const int n = n0 + chunk * 64;
      float* v = acc + chunk * 32;
#pragma unroll
      for (int j = 0; j < 32; ++j) v[j] += j % 2 ? high<ELEMENT>(bias[chunk * 8 + j / 4]) : low<ELEMENT>(bias[chunk * 8 + j / 4]);
      if constexpr (SAVE_PRE) writer.write(v, &p.pre, false, row, n);
#pragma unroll
      for (int j = 0; j < 32; ++j) v[j] = activate<ELEMENT, ACTIVATION>(v[j]);
      if constexpr (RESIDUAL) {
#pragma unroll 1
        for (int tap = 0; tap < p.residual_rows.side * p.residual_rows.side; ++tap) {
          ptx::barrier_wait(full + ring.slot * 8, ring.parity, "full for residual", tap);
          const uint32_t line = slots + ring.slot * T::SLOT_BYTES + (first_row + warp * 16 + lane % 16) * 128;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            uint32_t x[4];
            ptx::load_matrices(line + (((2 * j + lane / 16) ^ (lane % 8)) << 4), x);
#pragma unroll
            for (int h = 0; h < 4; ++h) {
              v[8 * j + 2 * h] = fmaf(low<ELEMENT>(x[h]), scale[h % 2], v[8 * j + 2 * h]);
              v[8 * j + 2 * h + 1] = fmaf(high<ELEMENT>(x[h]), scale[h % 2], v[8 * j + 2 * h + 1]);
            }
          }
          __syncwarp();
          release(ring.slot);
          ring.next();
        }
      }
      writer.write(v, &p.out, true, row, n);
    }
  }
  if (lane == 0) ptx::store_wait_all();
}

template <class T, Element ELEMENT, Activation ACTIVATION, bool SAVE_PRE, bool RESIDUAL>
__global__ void __launch_bounds__(T::THREADS, 1) hopper_gemm_kernel(const __grid_constant__ GemmParams p) {
  extern __shared__ char shared[];
  const uint32_t slots = (ptx::shared_address(shared) + 1023) / 1024 * 1024;
  const uint32_t buffers = slots + T::STAGES * T::SLOT_BYTES;
  const uint32_t full = buffers + T::STORE_BYTES, empty = full + T::STAGES * 8;
  const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);

  if (threadIdx.x == 0) {
    for (int i = 0; i < T::STAGES; ++i) {
      ptx::barrier_init(full + i * 8, 1);
      ptx::barrier_init(empty + i * 8, 4 * T::CONSUMERS);
    }
    ptx::barrier_init_fence();
    for (int i = 0; i < p.sources; ++i) ptx::prefetch_map(&p.a[i]);
    ptx::prefetch_map(&p.w);
    ptx::prefetch_map(&p.out);
  }
  __syncwarp();
  __syncthreads();

  if (warpgroup == 0) {
    ptx::registers_down<T::PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce<T, RESIDUAL>(p, slots, full, empty);
  } else {
    ptx::registers_up<T::CONSUMER_REGISTERS>();
    consume<T, ELEMENT, ACTIVATION, SAVE_PRE, RESIDUAL>(p, slots, full, empty, buffers, warpgroup - 1);
  }
}

}  // namespace laco
