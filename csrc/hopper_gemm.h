// The Hopper matrix product seen from outside: plain pointers and sizes, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>

namespace laco {

constexpr int MAX_SOURCES = 8;
constexpr int MAX_SIDE = 8;  // of a window: the copy engine steps no further

enum class Element : int { bfloat16 = 0, float16 = 1 };

// out[m, n] = act(sum_k A[m, k] weight[n, k] + bias[n]) + residual; everything of one 16-bit type, sums in float.
//
// Row m is the q-th window of image b, m = b * rows + q; its K is ordered (dy, dx, channel). A window of side 1 is a token. Several
// sources follow each other along K. A grid that windows do not fill is zero-padded at the bottom and right. Channels and n are
// multiples of 8, and so are strides; pointers are 16-byte aligned.
struct GemmProblem {
  Element element;
  const void* sources[MAX_SOURCES];
  int num_sources;
  int batch, height, width;    // of the tokens
  int64_t stride_b, stride_t;  // of the sources, in elements; a line's tokens, and an image's lines, follow each other
  int prefix;                  // tokens of each image in front of the first row, skipped
  int side;  // of a window, in tokens
  int channels;
  const void* weight;  // [n, K] contiguous
  const void* bias;    // [n] or null
  int n;
  int activation;     // 0 none, 1 gelu (erf), 2 gelu (tanh)
  void* out;          // [batch, out_prefix + rows, n] contiguous; prefix rows are not written
  int out_prefix;     // with a residual only
  void* pre;          // [M, n]: the value the activation is applied to, or null
  const void* residual;  // tokens [batch, residual_prefix + residual_height * residual_width, n], whose windows' means are added
  int64_t residual_stride_b, residual_stride_t;
  int residual_prefix, residual_height, residual_width, residual_side;
  bool residual_block;  // its tokens lie window by window

  // Of an image.
  int64_t rows() const { return int64_t((height + side - 1) / side) * ((width + side - 1) / side); }
};

// What of a problem the kernel cannot do, or null.
inline const char* refusal(const GemmProblem& q) {
  const int64_t tokens = int64_t(q.height) * q.width, residual_tokens = int64_t(q.residual_height) * q.residual_width;
  if (q.element != Element::bfloat16 && q.element != Element::float16) return "element must be 0 or 1";
  if (q.num_sources < 1 || q.num_sources > MAX_SOURCES) return "there must be 1 to 8 sources";
  if (q.batch < 0 || q.height < 1 || q.width < 1 || q.channels < 1 || q.n < 0) return "sizes must be positive";
  if (q.side < 1 || q.side > MAX_SIDE) return "windows must be 1 to 8 tokens wide";
  if (q.rows() * q.batch >= int64_t(1) << 30) return "too many rows for 32-bit row numbers";
  if (q.channels % 8 || q.n % 8 || q.stride_t % 8 || q.stride_b % 8 || q.residual_stride_t % 8 || q.residual_stride_b % 8) {
    return "channels, n and strides must be multiples of 8";
  }
  if (q.stride_t < q.channels || (q.batch > 1 && q.stride_b < tokens * q.stride_t)) return "tokens or images overlap";
  if (q.activation < 0 || q.activation > 2) return "activation must be 0, 1 or 2";
  if (q.pre && !q.activation) return "there is nothing to save";
  for (const void* pointer : {q.weight, q.bias, q.residual, static_cast<const void*>(q.out), static_cast<const void*>(q.pre)}) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return "pointers must be 16-byte aligned";
  }
  for (int i = 0; i < q.num_sources; ++i) {
    if (reinterpret_cast<uintptr_t>(q.sources[i]) % 16) return "pointers must be 16-byte aligned";
  }
  if (!q.residual) return q.out_prefix ? "an output with prefix tokens needs a residual" : nullptr;
  if (q.activation) return "the residual comes without an activation";
  const int side = q.residual_side;
  if (side < 1 || side > MAX_SIDE) return "windows must be 1 to 8 tokens wide";
  if (int64_t((q.residual_height + side - 1) / side) * ((q.residual_width + side - 1) / side) != q.rows()) {
    return "the residual's windows must be the output's rows";
  }
  if (q.residual_stride_t < q.n || (q.batch > 1 && q.residual_stride_b < residual_tokens * q.residual_stride_t)) {
    return "tokens or images of the residual overlap";
  }
  if (q.residual_block && (q.residual_prefix || q.residual_height % side || q.residual_width % side ||
                           q.residual_stride_t != q.n || (q.batch > 1 && q.residual_stride_b != residual_tokens * q.n))) {
    return "a residual in block order must be contiguous, with a grid of whole windows and no prefix";
  }
  return nullptr;
}

// Each returns null on success, else what is wrong.
const char* launch_128x256(const GemmProblem&, cudaStream_t);
const char* launch_192x128(const GemmProblem&, cudaStream_t);

struct GemmTile {
  const char* name;
  int bm, bn;
  double wave;  // microseconds that one tile on every multiprocessor takes: an H200, K = 4096
  const char* (*launch)(const GemmProblem&, cudaStream_t);
};

constexpr GemmTile TILES[] = {
    {"128x256", 128, 256, 44.9, launch_128x256},
    {"192x128", 192, 128, 34.9, launch_192x128},
};

// The tile that needs the least time: a last wave that is not full takes as long as a full one.
inline const GemmTile& choose_tile(int64_t m, int64_t n, int multiprocessors) {
  const GemmTile* best = nullptr;
  double least = 0;
  for (const GemmTile& tile : TILES) {
    const int64_t tiles = ((m + tile.bm - 1) / tile.bm) * ((n + tile.bn - 1) / tile.bn);
    const double time = double((tiles + multiprocessors - 1) / multiprocessors) * tile.wave;
    if (best == nullptr || time < least) best = &tile, least = time;
  }
  return *best;
}

}  // namespace laco
