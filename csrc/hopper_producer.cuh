// One thread: everything that the block's tensor cores will read, in the order in which they read it.
#pragma once

#include "hopper_params.cuh"

namespace laco {

__device__ __forceinline__ void load_rows(const CUtensorMap* map, const Rows& rows, uint32_t barrier, uint32_t to, int c,
                                          const RowPosition& at, int dx, int dy) {
  if (rows.im2col) {
    ptx::load_im2col(map, barrier, to, c, at.x, at.y, at.b, dx, dy);
  } else {
    ptx::load_2d(map, barrier, to, c, at.row);
  }
}

template <class K>
struct Producer {
  using T = typename K::T;
  const GemmParams& p;
  uint32_t slots, full, empty;
  Ring<T::STAGES> ring;
  int iteration = 0;

  __device__ __forceinline__ uint32_t barrier() const { return full + ring.slot * 8; }

  // Waits for the next slot and announces what will come; parts outside the tensors count too, they arrive as zeros.
  __device__ __forceinline__ uint32_t open(uint32_t bytes) {
    ptx::barrier_wait(empty + ring.slot * 8, ring.parity ^ 1, "empty", iteration);
    ptx::barrier_expect(barrier(), bytes);
    return slots + ring.slot * T::SLOT_BYTES;
  }

  __device__ __forceinline__ void next() { ring.next(), ++iteration; }

  __device__ __forceinline__ void forward(const Work<K>& work, int m0, int n0) {
    const RowPosition at(p.rows, m0);
    const int side = p.rows.side, taps = side * side;
    int tap = work.first / p.channel_steps, step = work.first - tap * p.channel_steps;
    int source = tap / taps;
    for (int i = work.first; i < work.last; ++i, next()) {
      const uint32_t to = open(T::SLOT_BYTES);
      const int of_source = tap - source * taps, dy = of_source / side, dx = of_source - dy * side;
      load_rows(&p.sources[source], p.rows, barrier(), to, step * BK, at, dx, dy);
      ptx::load_3d(&p.other, barrier(), to + T::A_BYTES, step * BK, tap, n0);
      if (++step == p.channel_steps) {
        step = 0;
        if (++tap == (source + 1) * taps) ++source;
      }
    }
  }

  __device__ __forceinline__ void input_gradient(const Work<K>& work, int m0, int n0) {
    const RowPosition at(p.rows, m0);
    for (int i = work.first; i < work.last; ++i, next()) {
      const uint32_t to = open(T::SLOT_BYTES);
      load_rows(&p.sources[0], p.rows, barrier(), to, i * BK, at, 0, 0);
#pragma unroll 1
      for (int j = 0; j < T::PIECES; ++j) {
        const Chunk chunk(p, n0 + T::column(j));
        ptx::load_3d(&p.other, barrier(), to + T::A_BYTES + j * wgmma::CHUNK_BYTES, chunk.c, chunk.tap, i * BK);
      }
    }
  }

  __device__ __forceinline__ void weight_gradient(const Work<K>& work, int m0, int n0) {
    const int side = p.rows.side, taps = side * side;
    for (int i = work.first; i < work.last; ++i, next()) {
      const uint32_t to = open(T::SLOT_BYTES);
      const RowPosition of_gradient(p.other_rows, i * BK), of_tokens(p.rows, i * BK);
#pragma unroll 1
      for (int j = 0; j < T::BM / 64; ++j) {
        load_rows(&p.other, p.other_rows, barrier(), to + j * wgmma::CHUNK_BYTES, m0 + j * 64, of_gradient, 0, 0);
      }
#pragma unroll 1
      for (int j = 0; j < T::PIECES; ++j) {
        const Chunk chunk(p, n0 + T::column(j));
        int source = chunk.tap / taps, c = chunk.c;
        const int tap = chunk.tap - source * taps, dy = tap / side, dx = tap - dy * side;
        if (source >= p.sources_count) source = 0, c = p.chunks_a_tap * COLUMNS;  // behind the last chunk: zeros
        load_rows(&p.sources[source], p.rows, barrier(), to + T::A_BYTES + j * wgmma::CHUNK_BYTES, c, of_tokens, dx, dy);
      }
    }
  }

  __device__ __forceinline__ void added(int m0, int n0) {
    const RowPosition first(p.added_rows, m0);
    const int side = p.added_rows.side;
    for (int piece = 0; piece < T::PIECES; ++piece) {
      for (int tap = 0; tap < side * side; ++tap, next()) {
        const uint32_t to = open(T::A_BYTES);
        const int dy = tap / side, dx = tap - dy * side, c = n0 + T::column(piece);
        // In block order a window's tokens are one row.
        load_rows(&p.added, p.added_rows, barrier(), to, p.added_rows.im2col ? c : tap * p.n + c, first, dx, dy);
      }
    }
  }

  __device__ __forceinline__ void run(int rank) {
    const Work<K> work(p, rank);
    for (int tile = work.begin(); work.goes_on(tile); tile = work.next(tile)) {
      int row, column;
      work.schedule.find(tile, row, column);
      const int m0 = row * T::BM, n0 = column * T::BN;
      if constexpr (K::PRODUCT == Product::forward) forward(work, m0, n0);
      if constexpr (K::PRODUCT == Product::input_gradient) input_gradient(work, m0, n0);
      if constexpr (K::PRODUCT == Product::weight_gradient) weight_gradient(work, m0, n0);
      if constexpr (K::COPIED) added(m0, n0);
    }
    // Stay until every slot has been given back.
    for (int i = 0; i < T::STAGES; ++i, ring.next()) {
      ptx::barrier_wait(empty + ring.slot * 8, ring.parity ^ 1, "empty at the end", iteration);
    }
  }
};

}  // namespace laco
