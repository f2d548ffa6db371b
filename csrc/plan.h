// Which tile a product is made of, and into how many blocks its depth is cut: host logic, without a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "problem.h"

namespace laco {

// How a kernel is launched.
struct Launch {
  cudaStream_t stream;
  int splits = 1;          // blocks of a cluster that share a tile's depth
  bool dependent = false;  // may start while the kernel in front of it ends
};

// Each returns null on success, else what is wrong.
using LaunchForward = const char*(const Forward&, const Launch&);
using LaunchInputGradient = const char*(const InputGradient&, const Launch&);
using LaunchWeightGradient = const char*(const WeightGradient&, const Launch&);

struct GemmTile {
  const char* name;
  int bm, bn;
  double wave;    // microseconds that one tile on every multiprocessor takes: an H200, K = 4096
  bool measured;  // so; else estimated from those that were
  bool splits;    // whether blocks of a cluster may share its depth
  LaunchForward* forward;
  LaunchInputGradient* input_gradient;
  LaunchWeightGradient* weight_gradient;
};

// Null where Hopper's kernels are not built.
[[gnu::weak]] LaunchForward forward_128x256, forward_192x128, forward_128x192, forward_128x128, forward_64x256;
[[gnu::weak]] LaunchInputGradient input_gradient_128x256, input_gradient_192x128, input_gradient_128x192, input_gradient_128x128,
    input_gradient_64x256;
[[gnu::weak]] LaunchWeightGradient weight_gradient_128x256, weight_gradient_192x128, weight_gradient_128x192,
    weight_gradient_128x128, weight_gradient_64x256;

inline const GemmTile TILES[] = {
    {"128x256", 128, 256, 44.9, true, false, forward_128x256, input_gradient_128x256, weight_gradient_128x256},
    {"192x128", 192, 128, 34.9, true, true, forward_192x128, input_gradient_192x128, weight_gradient_192x128},
    {"128x192", 128, 192, 39.9, false, false, forward_128x192, input_gradient_128x192, weight_gradient_128x192},
    {"128x128", 128, 128, 25.0, false, true, forward_128x128, input_gradient_128x128, weight_gradient_128x128},
    {"64x256", 64, 256, 25.0, false, false, forward_64x256, input_gradient_64x256, weight_gradient_64x256},
};

// The product of compute capability 8.x, and of everything newer where nothing better was built.
LaunchForward forward_ampere;
LaunchInputGradient input_gradient_ampere;
LaunchWeightGradient weight_gradient_ampere;

constexpr int STEP = 64, COLUMNS = 64;  // of depth that a tile is multiplied by at a time; of a chunk, which lies in one tap

struct Plan {
  const GemmTile* tile;
  int splits;
  int64_t tiles, waves;
  double microseconds;  // an estimate, only good for comparing
};

// For a result of m rows and `chunks` chunks of columns, made in `steps` steps along the depth. The plan that needs the least
// time: a last wave that is not full takes as long as a full one, and where tiles are few, blocks share their depth.
inline Plan plan(int64_t m, int64_t chunks, int64_t steps, int multiprocessors, bool may_split) {
  constexpr double REDUCTION = 3;  // microseconds, estimated: blocks of a cluster add up what they have
  Plan best{};
  for (const GemmTile& tile : TILES) {
    const int width = tile.bn / COLUMNS;
    const int64_t tiles = ((m + tile.bm - 1) / tile.bm) * ((chunks + width - 1) / width);
    for (int splits = 1; splits <= (may_split && tile.splits ? 4 : 1); splits *= 2) {
      if (splits > 1 && (tiles * splits > multiprocessors || steps < 4 * splits)) break;
      const int64_t waves = (tiles * splits + multiprocessors - 1) / multiprocessors;
      const double time = waves * tile.wave * ((steps + splits - 1) / splits) / STEP + (splits > 1 ? REDUCTION : 0);
      if (!best.tile || time < best.microseconds) best = {&tile, splits, tiles, waves, time};
    }
  }
  return best;
}

inline int64_t steps_of(int64_t depth) { return (depth + STEP - 1) / STEP; }
inline int64_t chunks_of(int64_t taps, int64_t channels) { return taps * ((channels + COLUMNS - 1) / COLUMNS); }

inline Plan plan(const Forward& q, int multiprocessors) {
  const Tokens& x = q.x;
  return plan(x.rows(), chunks_of(1, q.n), x.num_sources * x.taps() * steps_of(x.channels), multiprocessors, true);
}

inline Plan plan(const InputGradient& q, int multiprocessors) {
  const int64_t chunks = chunks_of(int64_t(q.side) * q.side, q.channels);
  return plan(q.gradient.rows(), chunks, steps_of(q.gradient.channels), multiprocessors, false);
}

inline Plan plan(const WeightGradient& q, int multiprocessors) {
  const int64_t chunks = chunks_of(q.x.num_sources * q.x.taps(), q.x.channels);
  return plan(q.gradient.channels, chunks, steps_of(q.gradient.rows()), multiprocessors, true);
}

// Bytes of an InputGradient's `sums`, the only workspace there is.
inline int64_t sums_bytes(int64_t rows, int64_t channels) {
  return (rows + SUM_ROWS - 1) / SUM_ROWS * channels * int64_t(sizeof(float));
}

}  // namespace laco
