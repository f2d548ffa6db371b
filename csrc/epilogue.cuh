// What is done to a product's results before they are written, for every kernel: a warp has them in pieces of 16 rows x 64 columns.
//
// v[4 * j + i] of a lane is row lane / 4 + 8 * (i / 2), column 8 * j + 2 * (lane % 4) + i % 2 of the piece: what the tensor cores
// of all architectures give. A piece has one tap: its columns are channels `column`, `column` + 1, ... of that tap's token.
#pragma once

#include <cstdint>

#include "element.cuh"
#include "gelu.cuh"
#include "operands.h"
#include "problem.h"
#include "ptx.cuh"

namespace laco {

// The window that is row m.
struct Window {
  int b, y, x;  // of its first token

  __device__ __forceinline__ Window(const Image& image, int m) {
    b = m / image.per_image;
    const int q = m - b * image.per_image;
    y = q / image.out_width;
    x = (q - y * image.out_width) * image.side;
    y *= image.side;
  }

  // One over the number of its tokens that the grid has.
  __device__ __forceinline__ float scale(const Image& image) const {
    return __frcp_rn(static_cast<float>(min(image.height - y, image.side) * min(image.width - x, image.side)));
  }

  // The token at a tap, or -1 where the grid has none.
  __device__ __forceinline__ int token(const Image& image, int tap) const {
    const int dy = tap / image.side, row = y + dy, column = x + tap - dy * image.side;
    return row < image.height && column < image.width ? row * image.width + column : -1;
  }
};

__device__ __forceinline__ const uint16_t* address_of(const Image& image, int b, int token) {
  return image.base + b * image.stride_b + token * image.stride_t;
}

template <Element ELEMENT>
__device__ __forceinline__ void add_bias(float (&v)[32], const uint32_t* bias) {
#pragma unroll
  for (int i = 0; i < 32; ++i) v[i] += i % 2 ? high<ELEMENT>(bias[i / 4]) : low<ELEMENT>(bias[i / 4]);
}

// += the windows' residual, read where the tokens lie.
template <Element ELEMENT>
__device__ __forceinline__ void add_residual(float (&v)[32], const Image& image, Residual kind, int row, int column, int rows,
                                             int lane) {
  const int taps = image.side * image.side, first = column + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = row + lane / 4 + 8 * half;
    if (m >= rows) continue;
    const Window window(image, m);
    if (kind == Residual::mean) {
      const float scale = window.scale(image);
#pragma unroll 1
      for (int tap = 0; tap < taps; ++tap) {
        const int token = window.token(image, tap);
        if (token < 0) continue;
        const uint16_t* from = address_of(image, window.b, token);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int c = first + 8 * j;
          if (c >= image.channels) continue;
          const uint32_t pair = ptx::load_global_4(from + c);
          v[4 * j + 2 * half] = fmaf(low<ELEMENT>(pair), scale, v[4 * j + 2 * half]);
          v[4 * j + 2 * half + 1] = fmaf(high<ELEMENT>(pair), scale, v[4 * j + 2 * half + 1]);
        }
      }
    } else {
      // Column n is the mean of numbers n * taps ... of S(x); of two columns these are `taps` pairs, each in one token.
      const float scale = __frcp_rn(static_cast<float>(taps));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int n = first + 8 * j;
        if (n >= image.channels) continue;
        float sums[2] = {};
#pragma unroll 1
        for (int pair = 0; pair < taps; ++pair) {
          const int at = n * taps + 2 * pair, tap = at / image.channels;
          const int token = window.token(image, tap);
          if (token < 0) continue;
          const uint32_t two = ptx::load_global_4(address_of(image, window.b, token) + (at - tap * image.channels));
          const bool is_first = 2 * pair < taps, ends_first = 2 * pair + 1 < taps;
          sums[0] += (is_first ? low<ELEMENT>(two) : 0.f) + (ends_first ? high<ELEMENT>(two) : 0.f);
          sums[1] += (is_first ? 0.f : low<ELEMENT>(two)) + (ends_first ? 0.f : high<ELEMENT>(two));
        }
        v[4 * j + 2 * half] = fmaf(sums[0], scale, v[4 * j + 2 * half]);
        v[4 * j + 2 * half + 1] = fmaf(sums[1], scale, v[4 * j + 2 * half + 1]);
      }
    }
  }
}

// += what the residual hands back to the windows' token at `tap`: `gradient` has one token a window, as many channels as `windows`.
template <Element ELEMENT>
__device__ __forceinline__ void add_residual_gradient(float (&v)[32], const Image& gradient, const Image& windows, Residual kind,
                                                      int row, int tap, int column, int rows, int lane) {
  const int taps = windows.side * windows.side, first = column + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = row + lane / 4 + 8 * half;
    if (m >= rows) continue;
    const Window window(windows, m);
    const uint16_t* from = address_of(gradient, window.b, m - window.b * windows.per_image);
    const float scale = kind == Residual::mean ? window.scale(windows) : __frcp_rn(static_cast<float>(taps));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int c = first + 8 * j;
      if (c >= windows.channels) continue;
      uint32_t pair;
      if (kind == Residual::mean) {
        pair = ptx::load_global_4(from + c);
      } else {
        const int at = tap * windows.channels + c;
        pair = ptx::load_global_2(from + at / taps) | static_cast<uint32_t>(ptx::load_global_2(from + (at + 1) / taps)) << 16;
      }
      v[4 * j + 2 * half] = fmaf(low<ELEMENT>(pair), scale, v[4 * j + 2 * half]);
      v[4 * j + 2 * half + 1] = fmaf(high<ELEMENT>(pair), scale, v[4 * j + 2 * half + 1]);
    }
  }
}

// Two columns' gradients through the activation, whose value comes back in `act`.
template <Element ELEMENT, Activation ACTIVATION>
__device__ __forceinline__ void through_activation(uint32_t pre, float* v, float* act) {
  float slope;
  act[0] = activate_with_slope<ELEMENT, ACTIVATION>(low<ELEMENT>(pre), slope);
  v[0] *= slope;
  act[1] = activate_with_slope<ELEMENT, ACTIVATION>(high<ELEMENT>(pre), slope);
  v[1] *= slope;
}

// sums[row / 16, column ...] = the sums over those of the piece's rows that there are: others are zeros times a weight.
__device__ __forceinline__ void store_sums(const float (&v)[32], float* sums, int row, int column, int rows, int columns,
                                           int lane) {
  const bool upper = row + lane / 4 < rows, lower = row + lane / 4 + 8 < rows;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float pair[2] = {(upper ? v[4 * j] : 0.f) + (lower ? v[4 * j + 2] : 0.f),
                     (upper ? v[4 * j + 1] : 0.f) + (lower ? v[4 * j + 3] : 0.f)};
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
      pair[0] += __shfl_xor_sync(0xFFFFFFFF, pair[0], distance);
      pair[1] += __shfl_xor_sync(0xFFFFFFFF, pair[1], distance);
    }
    const int c = column + 8 * j + 2 * lane;
    if (lane < 4 && c < columns) ptx::store_global_8(sums + int64_t(row / PIECE_ROWS) * columns + c, pair[0], pair[1]);
  }
}

}  // namespace laco
