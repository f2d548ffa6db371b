// The Hopper matrix product seen from outside: plain pointers and sizes, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace laco {

// out[m, n] = act(sum_k A[m, k] weight[n, k] + bias[n]) + residual; everything bfloat16, sums in float.
//
// Row m is token q of image b, m = b * rows + q, or with `windows` the q-th 2 x 2 window, whose K is ordered (dy, dx, channel).
// Several sources follow each other along K. An odd height or width is zero-padded at the bottom or right. Channels and n are
// multiples of 8, and so are strides; pointers are 16-byte aligned.
struct GemmProblem {
  const void* sources[8];
  int num_sources;
  int batch, height, width;    // of the tokens; without windows height * width tokens are as many rows
  int64_t stride_b, stride_t;  // of the sources, in elements; a line's tokens, and an image's lines, follow each other
  int prefix;                  // tokens of each image in front of the first row, skipped
  bool windows;
  int channels;
  const void* weight;  // [n, K] contiguous
  const void* bias;    // [n] or null
  int n;
  int activation;     // 0 none, 1 gelu (erf), 2 gelu (tanh)
  void* out;          // [batch, out_prefix + rows, n] contiguous; prefix rows are not written
  int out_prefix;     // with a residual only
  void* pre;          // [M, n]: the value the activation is applied to, or null
  const void* residual;  // tokens [batch, residual_prefix + residual_height * residual_width, n], whose 2 x 2 mean is added, or null
  int64_t residual_stride_b, residual_stride_t;
  int residual_prefix, residual_height, residual_width;
  bool residual_block;  // its tokens lie window by window
};

struct GemmVariant {
  const char* name;
  int bm, bn, stages, cluster;
  // Null on success, else what is wrong. `group`: row tiles that take turns before the next column.
  const char* (*launch)(const GemmProblem&, int group, cudaStream_t);
};

}  // namespace laco
