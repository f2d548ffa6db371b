// The three products as ampere_gemm.cuh wants them: what threads copy of the operands, and what becomes of the result.
#pragma once

#include <cstdint>

#include "ampere_gemm.cuh"
#include "ampere_operands.cuh"
#include "plan.h"

namespace laco::ampere {

inline Schedule schedule_of(int64_t rows, int64_t chunks) {
  return Schedule(int((rows + BM - 1) / BM), int((chunks + 1) / 2), GROUP);
}

// ---- out = act(x weight^T + bias) + R(S(residual)) ----

template <Element ELEMENT_, Activation ACTIVATION>
struct ForwardProduct {
  static constexpr Element ELEMENT = ELEMENT_;
  using A = AlongDepth;
  using B = AlongDepth;

  Schedule schedule;
  Sources sources;
  Image x, residual;
  Residual residual_kind;
  const uint16_t *weight, *bias;
  uint16_t *out, *pre;
  int64_t depth;
  int rows, n, taps, out_prefix;

  explicit ForwardProduct(const Forward& q)
      : schedule(schedule_of(q.x.rows(), (q.n + PIECE_COLUMNS - 1) / PIECE_COLUMNS)),
        sources(q.x),
        x(q.x),
        residual_kind(q.residual_kind),
        weight(static_cast<const uint16_t*>(q.weight)),
        bias(static_cast<const uint16_t*>(q.bias)),
        out(static_cast<uint16_t*>(q.out)),
        pre(static_cast<uint16_t*>(q.pre)),
        depth(q.x.depth()),
        rows(int(q.x.rows())),
        n(q.n),
        taps(int(q.x.num_sources * q.x.taps())),
        out_prefix(q.out_prefix) {
    if (residual_kind != Residual::none) residual = Image(residual_tokens(q));
  }

  __device__ __forceinline__ int steps() const { return taps * ((x.channels + BK - 1) / BK); }

  struct Loader {
    const ForwardProduct& q;
    WindowRows a;
    const uint16_t* weight;  // the thread's chunk of its first row
    int rows_left;           // of the weight, from that row on

    __device__ __forceinline__ Loader(const ForwardProduct& q_, int tile_row, int tile_column)
        : q(q_), a(q_.x, q_.sources.of, q_.rows, tile_row * BM) {
      const int row = tile_column * BN + threadIdx.x / 4;
      weight = q.weight + row * q.depth + threadIdx.x % 4 * CHUNK;
      rows_left = q.n - row;
    }

    __device__ __forceinline__ void load(uint32_t slot) {
      a.load(slot, q.x);
      const uint32_t at = slot + OPERAND_BYTES + AlongDepth::at(threadIdx.x / 4, threadIdx.x % 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::copy_16(at + 32 * i * BK * 2, weight + 32 * i * q.depth, a.is_inside(q.x) && 32 * i < rows_left);
      }
      weight += a.next(q.x, q.sources.of);
    }
  };

  __device__ __forceinline__ void finish(float (&acc)[PIECES][32], int first_row, int chunk, uint32_t buffers, int lane) const {
    const Piece piece{buffers, lane};
    const int column = chunk * PIECE_COLUMNS;
    uint32_t pairs[8] = {};
    if (bias) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int c = column + 8 * j + lane % 4 * 2;
        if (c < n) pairs[j] = ptx::load_global_4(bias + c);
      }
    }
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      float (&v)[32] = acc[i];
      const int row = first_row + PIECE_ROWS * i, m = row + lane % 16;
      const int64_t offset = m < rows ? int64_t(m) * n : -1;
      add_bias<ELEMENT>(v, pairs);
      if constexpr (ACTIVATION != Activation::none) {
        if (pre) {
          piece.put<ELEMENT>(v);
          piece.write(pre, offset, column, n);
        }
#pragma unroll
        for (float& each : v) each = activate<ELEMENT, ACTIVATION>(each);
      } else if (residual_kind != Residual::none) {
        add_residual<ELEMENT>(v, residual, residual_kind, row, column, rows, lane);
      }
      piece.put<ELEMENT>(v);
      const int64_t prefixes = out_prefix ? int64_t(m / x.per_image + 1) * out_prefix * n : 0;
      piece.write(out, m < rows ? offset + prefixes : -1, column, n);
    }
  }
};

// ---- out = gradient weight, through an activation or scattered to windows' tokens ----

template <Element ELEMENT_, Activation ACTIVATION>
struct InputGradientProduct {
  static constexpr Element ELEMENT = ELEMENT_;
  using A = AlongDepth;
  using B = AcrossDepth;

  Schedule schedule;
  Sources sources;
  Image gradient, windows, residual;
  Residual residual_kind;
  const uint16_t *weight, *pre;
  uint16_t *out, *act;
  float* sums;
  int rows, taps, out_prefix;

  explicit InputGradientProduct(const InputGradient& q)
      : schedule(schedule_of(q.gradient.rows(), chunks_of(int64_t(q.side) * q.side, q.channels))),
        sources(q.gradient),
        gradient(q.gradient),
        windows(Tokens{{}, 1, q.gradient.batch, q.height, q.width, 0, 0, q.side, q.channels}),
        residual_kind(q.residual_kind),
        weight(static_cast<const uint16_t*>(q.weight)),
        pre(static_cast<const uint16_t*>(q.pre)),
        out(static_cast<uint16_t*>(q.out)),
        act(static_cast<uint16_t*>(q.act)),
        sums(q.sums),
        rows(int(q.gradient.rows())),
        taps(q.side * q.side),
        out_prefix(q.out_prefix) {
    if (residual_kind != Residual::none) residual = Image(q.residual_gradient);
  }

  __device__ __forceinline__ int steps() const { return (gradient.channels + BK - 1) / BK; }

  struct Loader {
    const InputGradientProduct& q;
    WindowRows a;
    LineChunks b;
    const uint16_t* halves[2];  // of the thread's line of the weight

    __device__ __forceinline__ Loader(const InputGradientProduct& q_, int tile_row, int tile_column)
        : q(q_), a(q_.gradient, q_.sources.of, q_.rows, tile_row * BM), b(threadIdx.x) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Columns columns(2 * tile_column + half, q.windows.channels);
        halves[half] = q.weight + b.line * stride() + int64_t(columns.tap) * q.windows.channels + columns.channel;
        if (columns.tap < q.taps) b.set_half(half, columns.channel, q.windows.channels);
      }
    }

    __device__ __forceinline__ int64_t stride() const { return int64_t(q.taps) * q.windows.channels; }

    __device__ __forceinline__ void load(uint32_t slot) {
      a.load(slot, q.gradient);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        b.load(slot + OPERAND_BYTES, half, halves[half], a.channel + b.line < q.gradient.channels);
        halves[half] += BK * stride();
      }
      a.next(q.gradient, q.sources.of);
    }
  };

  __device__ __forceinline__ void finish(float (&acc)[PIECES][32], int first_row, int chunk, uint32_t buffers, int lane) const {
    const Columns columns(chunk, windows.channels);
    if (columns.tap >= taps) return;
    const int column = columns.channel, channels = windows.channels;
    if constexpr (ACTIVATION != Activation::none) {
#pragma unroll
      for (int i = 0; i < PIECES; ++i) {
        Piece{buffers + i * PIECE_BYTES, lane}.read(pre, first_row + PIECE_ROWS * i, rows, column, channels);
      }
      ptx::copy_commit();
      ptx::copy_wait<0>();
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      float (&v)[32] = acc[i];
      const Piece piece{buffers + i * PIECE_BYTES, lane};
      const int row = first_row + PIECE_ROWS * i, m = row + lane % 16;
      int64_t offset = -1;
      if constexpr (ACTIVATION != Activation::none) {
        // The activation takes the place of what it was applied to.
#pragma unroll
        for (int pair = 0; pair < 16; ++pair) {
          const uint32_t at = piece.pair(pair / 2, pair % 2);
          float values[2];
          through_activation<ELEMENT, ACTIVATION>(ptx::load_shared_4(at), v + 2 * pair, values);
          ptx::store_shared_4(at, pack<ELEMENT>(values[0], values[1]));
        }
        if (m < rows) offset = int64_t(m) * channels;
        if (act) piece.write(act, offset, column, channels);
        if (sums && row < rows) store_sums(v, sums, row, column, rows, channels, lane);
      } else {
        if (residual_kind != Residual::none) {
          add_residual_gradient<ELEMENT>(v, residual, windows, residual_kind, row, columns.tap, column, rows, lane);
        }
        const Window window(windows, m);
        const int token = window.token(windows, columns.tap);
        if (m < rows && token >= 0) {
          const int64_t tokens = int64_t(windows.height) * windows.width + out_prefix;
          offset = (window.b * tokens + out_prefix + token) * channels;
        }
      }
      piece.put<ELEMENT>(v);
      piece.write(out, offset, column, channels);
    }
  }
};

// ---- out = gradient^T x ----

template <Element ELEMENT_>
struct WeightGradientProduct {
  static constexpr Element ELEMENT = ELEMENT_;
  using A = AcrossDepth;
  using B = AcrossDepth;

  Schedule schedule;
  Sources sources;
  Image gradient, x;
  uint16_t* out;
  int rows, taps;  // rows are the depth here

  explicit WeightGradientProduct(const WeightGradient& q)
      : schedule(schedule_of(q.gradient.channels, chunks_of(q.x.num_sources * q.x.taps(), q.x.channels))),
        sources(q.x),
        gradient(q.gradient),
        x(q.x),
        out(static_cast<uint16_t*>(q.out)),
        rows(int(q.x.rows())),
        taps(int(q.x.num_sources * q.x.taps())) {}

  __device__ __forceinline__ int steps() const { return (rows + BK - 1) / BK; }

  // A thread's line is one window: of both operands.
  struct Loader {
    const WeightGradientProduct& q;
    LineChunks a, b;
    const uint16_t* gradient;   // the tile's first column
    const uint16_t* halves[2];  // of x: source, tap and channel
    int dy[2], dx[2];
    int m;

    __device__ __forceinline__ Loader(const WeightGradientProduct& q_, int tile_row, int tile_column)
        : q(q_), a(threadIdx.x), b(threadIdx.x), m(a.line) {
      gradient = q.gradient.base + tile_row * BM;
      const int side = q.x.side;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a.set_half(half, tile_row * BM + half * PIECE_COLUMNS, q.gradient.channels);
        const Columns columns(2 * tile_column + half, q.x.channels);
        const int source = columns.tap / (side * side), tap = columns.tap - source * side * side;
        dy[half] = tap / side, dx[half] = tap - dy[half] * side;
        halves[half] = static_cast<const uint16_t*>(q.sources.of[source]) + columns.channel;
        if (columns.tap < q.taps) b.set_half(half, columns.channel, q.x.channels);
      }
    }

    __device__ __forceinline__ void load(uint32_t slot) {
      const Window window(q.x, m);
      const bool is_there = m < q.rows;
      const uint16_t* row =
          gradient + window.b * q.gradient.stride_b + int64_t(m - window.b * q.x.per_image) * q.gradient.stride_t;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a.load(slot, half, row + half * PIECE_COLUMNS, is_there);
        const int y = window.y + dy[half], column = window.x + dx[half];
        const uint16_t* token = halves[half] + window.b * q.x.stride_b + (int64_t(y) * q.x.width + column) * q.x.stride_t;
        b.load(slot + OPERAND_BYTES, half, token, is_there && y < q.x.height && column < q.x.width);
      }
      m += BK;
    }
  };

  __device__ __forceinline__ void finish(float (&acc)[PIECES][32], int first_row, int chunk, uint32_t buffers, int lane) const {
    const Columns columns(chunk, x.channels);
    if (columns.tap >= taps) return;
    const Piece piece{buffers, lane};
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const int n = first_row + PIECE_ROWS * i + lane % 16;
      piece.put<ELEMENT>(acc[i]);
      piece.write(out, n < gradient.channels ? (int64_t(n) * taps + columns.tap) * x.channels : -1, columns.channel,
                  x.channels);
    }
  }
};

}  // namespace laco::ampere
