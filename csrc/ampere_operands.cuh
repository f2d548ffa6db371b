// What threads copy of an operand into a slot of shared memory, and where it lies.
//
// Where an operand ends, in rows, columns or depth, zeros are copied. Depth ends in both operands at once, so that no zero is
// multiplied by a NaN that lies behind.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ampere_gemm.cuh"
#include "epilogue.cuh"
#include "problem.h"
#include "ptx.cuh"

namespace laco::ampere {

// 64 columns of a result whose columns are (tap, channel): they lie in one tap. Taps of all sources count.
struct Columns {
  int tap, channel;

  __device__ __forceinline__ Columns(int chunk, int channels) {
    const int in_tap = (channels + PIECE_COLUMNS - 1) / PIECE_COLUMNS;
    tap = chunk / in_tap;
    channel = (chunk - tap * in_tap) * PIECE_COLUMNS;
  }
};

// Rows of windows along the depth (source, dy, dx, channel), 32 channels of one tap at a time. A thread copies chunk t % 4 of
// rows t / 4 + 32 * i: it finds their windows once a tile, and which of these have a token once a tap.
struct WindowRows {
  static constexpr int ROWS = 128 * 4 / THREADS;
  const uint16_t* base;  // of the source, tap and channels that come next
  int64_t first[ROWS];   // of the row's window, and the chunk
  uint32_t tokens = 0;   // 8 bits a row: how many tokens high, 4, and wide, 4, its window is
  uint32_t there = 0;    // a bit a row: it has a token at this tap
  int source = 0, dy = 0, dx = 0, channel = 0;

  __device__ __forceinline__ WindowRows(const Image& image, const void* const* sources, int rows, int row) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int m = row + threadIdx.x / 4 + 32 * i;
      const Window window(image, m);
      first[i] =
          window.b * image.stride_b + (int64_t(window.y) * image.width + window.x) * image.stride_t + threadIdx.x % 4 * CHUNK;
      if (m >= rows) continue;
      tokens |= (min(image.height - window.y, image.side) | min(image.width - window.x, image.side) << 4) << (8 * i);
    }
    enter_tap(image, sources);
  }

  __device__ __forceinline__ void enter_tap(const Image& image, const void* const* sources) {
    base = static_cast<const uint16_t*>(sources[source]) + (int64_t(dy) * image.width + dx) * image.stride_t;
    there = 0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int high = tokens >> (8 * i) & 15, wide = tokens >> (8 * i + 4) & 15;
      there |= (dy < high && dx < wide ? 1 : 0) << i;
    }
  }

  // The chunk lies in the tap.
  __device__ __forceinline__ bool is_inside(const Image& image) const {
    return channel + int(threadIdx.x) % 4 * CHUNK < image.channels;
  }

  __device__ __forceinline__ void load(uint32_t to, const Image& image) const {
    const uint32_t at = to + AlongDepth::at(threadIdx.x / 4, threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) ptx::copy_16(at + 32 * i * BK * 2, base + first[i], is_inside(image) && there >> i & 1);
  }

  // Returns how much of the depth was passed.
  __device__ __forceinline__ int next(const Image& image, const void* const* sources) {
    const int step = min(BK, image.channels - channel);
    base += BK;
    channel += BK;
    if (channel < image.channels) return step;
    channel = 0;
    if (++dx == image.side) {
      dx = 0;
      if (++dy == image.side) dy = 0, ++source;
    }
    enter_tap(image, sources);
    return step;
  }
};

// A line of an operand whose depth is one line each: thread t copies of line t / 4 four chunks, two of each 64 columns. Odd
// lines' two take turns, so that what eight threads copy at a time lies in different banks.
struct LineChunks {
  int line, first;
  uint32_t inside = 0;  // a bit a chunk: its columns exist

  __device__ __forceinline__ explicit LineChunks(int thread) : line(thread / 4), first((thread % 4) ^ (line % 2 * 4)) {}

  // The columns of one half: they exist from its first up to `columns`.
  __device__ __forceinline__ void set_half(int half, int column, int columns) {
#pragma unroll
    for (int i = 0; i < 2; ++i) inside |= (column + (first ^ (4 * i)) * CHUNK < columns ? 1 : 0) << (2 * half + i);
  }

  // `from` is the line's first of the half's 64 columns.
  __device__ __forceinline__ void load(uint32_t to, int half, const uint16_t* from, bool is_there) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int chunk = first ^ (4 * i);
      ptx::copy_16(to + AcrossDepth::at(line, 8 * half + chunk), from + chunk * CHUNK,
                   is_there && inside >> (2 * half + i) & 1);
    }
  }
};

// The sources of Tokens, and one more for the tap behind the last, of which nothing is copied.
struct Sources {
  const void* of[MAX_SOURCES + 1] = {};

  explicit Sources(const Tokens& t) { std::copy_n(t.sources, t.num_sources, of); }
};

}  // namespace laco::ampere
