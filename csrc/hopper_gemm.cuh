// Matrix products for Hopper, sm_90a: a product of tokens, its gradient with respect to them and to the weight (problem.h).
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
// A forward product reads both operands along the depth (K-major), an input gradient the weight across it, a weight gradient both
// (MN-major). Few tiles: the blocks of a cluster take a part of the depth each (SPLIT), and add their sums up in one order,
// whoever does it, through each other's shared memory.
//
// Tried on an H200 and slower on every shape of the papers: clusters of two blocks that share W by multicast (the best of them
// took 1.4 to 1.8 times as long), and two consumers that take turns at tiles of their own (1.2 to 1.3 times).
#pragma once

#include "hopper_params.cuh"
#include "hopper_producer.cuh"

namespace laco {

// A consumer warp's way from registers to the output: pieces of 16 rows x 64 columns through buffers of its own.
template <class T, Element ELEMENT>
struct Writer {
  uint32_t buffers;
  int lane, piece = 0;

  __device__ __forceinline__ uint32_t stage(const float* values) {
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
    return buffer;
  }

  // The copy engine leaves out what lies outside of the tensor.
  __device__ __forceinline__ void send(const float* values, const CUtensorMap* map, bool is_there, int row, int column) {
    const uint32_t buffer = stage(values);
    ptx::fence_async();
    __syncwarp();
    if (lane == 0) {
      if (is_there) ptx::store_2d(map, buffer, column, row);
      ptx::store_commit();
    }
  }

  __device__ __forceinline__ void send(const float* values, const CUtensorMap* map, bool is_there, int row, const Chunk& chunk) {
    const uint32_t buffer = stage(values);
    ptx::fence_async();
    __syncwarp();
    if (lane == 0) {
      if (is_there) ptx::store_3d(map, buffer, chunk.c, chunk.tap, row);
      ptx::store_commit();
    }
  }

  // `address(r)` of the piece's row r, or null where it is not to be written; `columns` of the 64 are there.
  template <class Address>
  __device__ __forceinline__ void scatter(const float* values, int columns, Address&& address) {
    const uint32_t buffer = stage(values);
    __syncwarp();
    const int eighth = lane % 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = 4 * i + lane / 8;
      const uint4 v = ptx::load_shared_16(buffer + r * 128 + ((eighth ^ (r % 8)) << 4));
      uint16_t* to = address(r);
      if (to != nullptr && eighth * 8 < columns) ptx::store_global_16(to + eighth * 8, v);
    }
  }
};

template <class K>
struct Consumer {
  using T = typename K::T;
  static constexpr Element ELEMENT = K::ELEMENT;
  const GemmParams& p;
  uint32_t slots, full, empty;
  int consumer, warp, lane;
  Writer<T, ELEMENT> writer;
  Ring<T::STAGES> ring;

  __device__ __forceinline__ Consumer(const GemmParams& p_, uint32_t slots_, uint32_t full_, uint32_t empty_, uint32_t buffers,
                                      int consumer_)
      : p(p_), slots(slots_), full(full_), empty(empty_), consumer(consumer_), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32),
        writer{buffers + (consumer * 4 + warp) * T::STORE_BUFFERS * T::PIECE_BYTES, lane} {}

  __device__ __forceinline__ uint32_t wait(const char* name, int iteration) const {
    ptx::barrier_wait(full + ring.slot * 8, ring.parity, name, iteration);
    return slots + ring.slot * T::SLOT_BYTES;
  }

  __device__ __forceinline__ void release(int slot) const {
    if (lane == 0) ptx::barrier_arrive(empty + slot * 8);
  }

  __device__ __forceinline__ void multiply(float (&acc)[T::BN / 2], int steps) {
    constexpr int A_OFFSET = K::A_MN ? wgmma::CHUNK_BYTES : 64 * 128;  // of 64 rows
    int previous = 0;
    for (int step = 0; step < steps; ++step) {
      const uint32_t slot = wait("full", step);
      const uint64_t a = wgmma::descriptor<K::A_MN>(slot + consumer * A_OFFSET);
      const uint64_t b = wgmma::descriptor<K::B_MN>(slot + T::A_BYTES);
      wgmma::keep(acc);
      wgmma::fence();
#pragma unroll
      for (int k = 0; k < BK / 16; ++k) {
        wgmma::multiply<ELEMENT, K::A_MN, K::B_MN>(acc, a + k * wgmma::K_STEP<K::A_MN>, b + k * wgmma::K_STEP<K::B_MN>, step + k > 0);
      }
      wgmma::commit();
      wgmma::wait_previous();
      if (step > 0) release(previous);
      previous = ring.slot;
      ring.next();
    }
    wgmma::wait_all();
    release(previous);
    wgmma::keep(acc);
  }

  // The blocks of a cluster lay their sums out for each other.
  static constexpr int EXCHANGE_STRIDE = T::CONSUMERS * 128 * 4;

  __device__ __forceinline__ uint32_t exchange() const { return slots + ((consumer * 4 + warp) * 32 + lane) * 4; }

  template <int EIGHTS>
  __device__ __forceinline__ void load_bias(uint32_t* bias, int n) const {
#pragma unroll
    for (int j = 0; j < EIGHTS; ++j) {
      bias[j] = p.bias != nullptr && n + 8 * j < p.n ? ptx::load_global_4(p.bias + n + 8 * j + lane % 4 * 2) : 0;
    }
  }

  // Two columns of each of 16 rows at a time: what the copy engine brought for this chunk.
  template <class Use>
  __device__ __forceinline__ void each_added(Use&& use) {
    const uint32_t line = wait("full, what is added", 0) + (consumer * 64 + warp * 16 + lane % 16) * 128;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t x[4];
      ptx::load_matrices(line + (((2 * j + lane / 16) ^ (lane % 8)) << 4), x);
#pragma unroll
      for (int h = 0; h < 4; ++h) use(8 * j + 2 * h, x[h]);
    }
    __syncwarp();
    release(ring.slot);
    ring.next();
  }

  __device__ __forceinline__ void finish_forward(float (&v)[32], const uint32_t* bias, int row, int n) {
    const bool is_there = row < p.m && n < p.n;
    add_bias<ELEMENT>(v, bias);
    if (K::ACTIVATION != Activation::none && p.has_second) writer.send(v, &p.second, is_there, row, n);
#pragma unroll
    for (int i = 0; i < 32; ++i) v[i] = activate<ELEMENT, K::ACTIVATION>(v[i]);
    if constexpr (K::COPIED) {
      float scale[2];
      scale[0] = Window(p.residual, row + lane / 4).scale(p.residual);
      scale[1] = Window(p.residual, row + lane / 4 + 8).scale(p.residual);
#pragma unroll 1
      for (int tap = 0; tap < p.added_rows.side * p.added_rows.side; ++tap) {
        each_added([&](int i, uint32_t pair) {
          v[i] = fmaf(low<ELEMENT>(pair), scale[i / 2 % 2], v[i]);
          v[i + 1] = fmaf(high<ELEMENT>(pair), scale[i / 2 % 2], v[i + 1]);
        });
      }
    } else if (K::ACTIVATION == Activation::none && p.residual_kind != Residual::none) {
      add_residual<ELEMENT>(v, p.residual, p.residual_kind, row, n, p.m, lane);
    }
    if (K::ACTIVATION == Activation::none && p.out_prefix > 0) {
      writer.scatter(v, p.n - n, [&](int r) -> uint16_t* {
        const int m = row + r, b = m / p.residual.per_image;
        return m < p.m ? p.out_tokens + (m + static_cast<int64_t>(b + 1) * p.out_prefix) * p.n + n : nullptr;
      });
    } else {
      writer.send(v, &p.out, is_there, row, n);
    }
  }

  __device__ __forceinline__ void finish_through_activation(float (&v)[32], int row, int c) {
    const bool is_there = row < p.m && c < p.n;
    float act[32];
    each_added([&](int i, uint32_t pre) { through_activation<ELEMENT, K::ACTIVATION>(pre, v + i, act + i); });
    if (p.sums != nullptr && is_there) store_sums(v, p.sums, row, c, p.m, p.n, lane);
    if (p.has_second) writer.send(act, &p.second, is_there, row, c);
    writer.send(v, &p.out, is_there, row, c);
  }

  __device__ __forceinline__ void finish_tokens(float (&v)[32], int row, const Chunk& chunk) {
    if (chunk.tap >= p.taps) return;
    if (p.residual_kind != Residual::none) {
      add_residual_gradient<ELEMENT>(v, p.residual, p.grid, p.residual_kind, row, chunk.tap, chunk.c, p.m, lane);
    }
    writer.scatter(v, p.n - chunk.c, [&](int r) -> uint16_t* {
      if (row + r >= p.m) return nullptr;
      const Window window(p.grid, row + r);
      const int token = window.token(p.grid, chunk.tap);
      if (token < 0) return nullptr;
      const int64_t of_image = static_cast<int64_t>(p.grid.height) * p.grid.width + p.out_prefix;
      return p.out_tokens + (window.b * of_image + p.out_prefix + token) * p.n + chunk.c;
    });
  }

  __device__ __forceinline__ void run(int rank) {
    const Work<K> work(p, rank);
    for (int tile = work.begin(); work.goes_on(tile); tile = work.next(tile)) {
      int tile_row, tile_column;
      work.schedule.find(tile, tile_row, tile_column);
      const int row = tile_row * T::BM + consumer * 64 + warp * 16, n0 = tile_column * T::BN;

      // Asked for before the product and used after it, where there are registers for it.
      constexpr bool EARLY = !K::SPLIT && (T::CONSUMERS < 3 || T::BN <= 128);
      uint32_t bias[EARLY ? T::BN / 8 : 8];
      if constexpr (K::FORWARD && EARLY) load_bias<T::BN / 8>(bias, n0);
      float acc[T::BN / 2];
      multiply(acc, work.last - work.first);

      if constexpr (K::SPLIT) {
        ptx::named_barrier(1, T::CONSUMERS * 128);  // the slots are no longer read
#pragma unroll
        for (int i = 0; i < T::BN / 2; ++i) ptx::store_shared_float(exchange() + i * EXCHANGE_STRIDE, acc[i]);
        ptx::cluster_sync();
      }
#pragma unroll(K::SPLIT ? 1 : T::PIECES)
      for (int piece = 0; piece < T::PIECES; ++piece) {
        const int first = T::column(piece), column = n0 + first;
        float v[32];
        if constexpr (K::SPLIT) {
          if (piece % work.splits != rank) continue;
#pragma unroll
          for (int i = 0; i < 32; ++i) v[i] = 0.f;
#pragma unroll 1
          for (int other = 0; other < work.splits; ++other) {
            const uint32_t there = ptx::cluster_address(exchange() + first / 2 * EXCHANGE_STRIDE, other);
#pragma unroll
            for (int i = 0; i < 32; ++i) v[i] += ptx::load_cluster_float(there + i * EXCHANGE_STRIDE);
          }
        } else {
#pragma unroll
          for (int i = 0; i < 32; ++i) v[i] = acc[first / 2 + i];
        }
        if constexpr (K::FORWARD) {
          if constexpr (!EARLY) load_bias<8>(bias, column);
          finish_forward(v, bias + (EARLY ? first / 8 : 0), row, column);
        } else if constexpr (K::THROUGH_ACTIVATION) {
          finish_through_activation(v, row, column);
        } else {
          const Chunk at(p, column);
          if constexpr (K::WEIGHT) {
            writer.send(v, &p.out, row < p.m && column < p.columns, row, at);
          } else {
            finish_tokens(v, row, at);
          }
        }
      }
    }
    if (lane == 0) ptx::store_wait_all();
  }
};

template <class K>
__global__ void __launch_bounds__(K::T::THREADS, 1) hopper_gemm_kernel(const __grid_constant__ GemmParams p) {
  using T = typename K::T;
  const uint32_t slots = (ptx::shared_memory() + 1023) / 1024 * 1024;
  const uint32_t buffers = slots + T::STAGES * T::SLOT_BYTES;
  const uint32_t full = buffers + T::STORE_BYTES, empty = full + T::STAGES * 8;
  const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
  const int rank = K::SPLIT ? static_cast<int>(ptx::cluster_rank()) : 0;

  if (threadIdx.x == 0) {
    for (int i = 0; i < T::STAGES; ++i) {
      ptx::barrier_init(full + i * 8, 1);
      ptx::barrier_init(empty + i * 8, 4 * T::CONSUMERS);
    }
    ptx::barrier_init_fence();
    ptx::prefetch_map(&p.sources[0]);
    ptx::prefetch_map(&p.other);
    ptx::prefetch_map(&p.out);
  }
  __syncwarp();
  __syncthreads();
  ptx::wait_for_kernels_in_front();
  ptx::let_next_kernel_start();

  if (warpgroup == 0) {
    if constexpr (T::CONSUMERS > 1) ptx::registers_down<T::PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) Producer<K>{p, slots, full, empty}.run(rank);
    if constexpr (K::SPLIT) {
      __syncwarp();
      ptx::cluster_sync();
    }
  } else {
    if constexpr (T::CONSUMERS > 1) ptx::registers_up<T::CONSUMER_REGISTERS>();
    Consumer<K>(p, slots, full, empty, buffers, warpgroup - 1).run(rank);
  }
  if constexpr (K::SPLIT) {  // the others may still be reading this block's shared memory
    __syncwarp();
    ptx::cluster_sync();
  }
}

}  // namespace laco
