// Which tile a product is made of, and into how many blocks its depth is cut: host logic, without a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "problem.h"

namespace laco {

constexpr int STEP = 64, COLUMNS = 64;  // of depth that a tile is multiplied by at a time; of a chunk, which lies in one tap

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
  bool measured;  // benchmarks/results/nvidia-h200/hopper-product.txt, with GELU; else 13.1 + 1e-3 x bm x bn, near those that were
  bool splits;    // whether blocks of a cluster may share its depth
  LaunchForward* forward;
  LaunchInputGradient* input_gradient;  // null where 64 does not divide bn: a gradient's columns end with each tap
  LaunchWeightGradient* weight_gradient;

  bool makes_gradients() const { return bn % COLUMNS == 0; }
};

// Null where Hopper's kernels are not built.
[[gnu::weak]] LaunchForward forward_128x256, forward_192x144, forward_128x192, forward_192x128, forward_192x96, forward_128x128,
    forward_64x256, forward_64x128, forward_64x64;
[[gnu::weak]] LaunchInputGradient input_gradient_128x256, input_gradient_128x192, input_gradient_192x128, input_gradient_128x128,
    input_gradient_64x256, input_gradient_64x128, input_gradient_64x64;
[[gnu::weak]] LaunchWeightGradient weight_gradient_128x256, weight_gradient_128x192, weight_gradient_192x128,
    weight_gradient_128x128, weight_gradient_64x256, weight_gradient_64x128, weight_gradient_64x64;

// Widths may be any multiple of 16: these leave the last wave fullest for the papers' shapes.
inline const GemmTile TILES[] = {
    {"128x256", 128, 256, 45.9, true, false, forward_128x256, input_gradient_128x256, weight_gradient_128x256},
    {"192x144", 192, 144, 40.7, false, false, forward_192x144, nullptr, nullptr},
    {"192x128", 192, 128, 35.5, true, true, forward_192x128, input_gradient_192x128, weight_gradient_192x128},
    {"128x192", 128, 192, 39.9, true, false, forward_128x192, input_gradient_128x192, weight_gradient_128x192},
    {"192x96", 192, 96, 31.5, false, true, forward_192x96, nullptr, nullptr},
    {"128x128", 128, 128, 29.5, false, true, forward_128x128, input_gradient_128x128, weight_gradient_128x128},
    {"64x256", 64, 256, 29.5, false, false, forward_64x256, input_gradient_64x256, weight_gradient_64x256},
    {"64x128", 64, 128, 21.3, false, true, forward_64x128, input_gradient_64x128, weight_gradient_64x128},
    {"64x64", 64, 64, 17.2, false, true, forward_64x64, input_gradient_64x64, weight_gradient_64x64},
};

// The product of compute capability 8.x, and of everything newer where nothing better was built.
LaunchForward forward_ampere;
LaunchInputGradient input_gradient_ampere;
LaunchWeightGradient weight_gradient_ampere;

// What of a GPU a plan depends on. The blocks of a cluster lie in one part of it, and parts differ: of an H100's 132
// multiprocessors clusters of four leave eight idle, or four.
struct Machine {
  int multiprocessors;
  int pairs, quads;  // clusters of two and of four blocks that run at once

  int at_once(int splits) const { return splits == 1 ? multiprocessors : splits == 2 ? pairs : quads; }
};

// Of the current device, with the shared memory that tiles take; 0 where it cannot be told. Of Hopper's kernels.
[[gnu::weak]] int clusters_at_once(int blocks);

struct Plan {
  const GemmTile* tile;
  int splits;
  int64_t tiles, waves;
  double microseconds;  // an estimate, only good for comparing
};

// For a result of m rows and `columns`, made in `steps` steps along the depth. The plan that needs the least time: a last wave
// that is not full takes as long as a full one, and where tiles are few, blocks share their depth.
inline Plan plan(Product product, int64_t m, int64_t columns, int64_t steps, const Machine& machine) {
  constexpr double REDUCTION = 3;  // microseconds, estimated: blocks of a cluster add up what they have
  Plan best{};
  for (const GemmTile& tile : TILES) {
    if (product != Product::forward && !tile.makes_gradients()) continue;
    const int64_t tiles = ((m + tile.bm - 1) / tile.bm) * ((columns + tile.bn - 1) / tile.bn);
    for (int splits = 1; splits <= (product != Product::input_gradient && tile.splits ? 4 : 1); splits *= 2) {
      const int64_t at_once = machine.at_once(splits);
      if (splits > 1 && (tiles > at_once || at_once < 1 || steps < 4 * splits)) break;
      const int64_t waves = (tiles + at_once - 1) / at_once;
      const double time = waves * tile.wave * ((steps + splits - 1) / splits) / STEP + (splits > 1 ? REDUCTION : 0);
      if (!best.tile || time < best.microseconds) best = {&tile, splits, tiles, waves, time};
    }
  }
  return best;
}

inline int64_t steps_of(int64_t depth) { return (depth + STEP - 1) / STEP; }
inline int64_t steps_of(const Forward& q) { return q.x.num_sources * q.x.taps() * steps_of(q.x.channels); }
inline int64_t steps_of(const InputGradient& q) { return steps_of(q.gradient.channels); }
inline int64_t steps_of(const WeightGradient& q) { return steps_of(q.gradient.rows()); }

inline int64_t chunks_of(int64_t taps, int64_t channels) { return taps * ((channels + COLUMNS - 1) / COLUMNS); }
inline int64_t columns_of(const Forward& q) { return q.n; }
inline int64_t columns_of(const InputGradient& q) { return COLUMNS * chunks_of(int64_t(q.side) * q.side, q.channels); }
inline int64_t columns_of(const WeightGradient& q) { return COLUMNS * chunks_of(q.x.num_sources * q.x.taps(), q.x.channels); }

inline Plan plan(const Forward& q, const Machine& machine) {
  return plan(Product::forward, q.x.rows(), columns_of(q), steps_of(q), machine);
}
inline Plan plan(const InputGradient& q, const Machine& machine) {
  return plan(Product::input_gradient, q.gradient.rows(), columns_of(q), steps_of(q), machine);
}
inline Plan plan(const WeightGradient& q, const Machine& machine) {
  return plan(Product::weight_gradient, q.gradient.channels, columns_of(q), steps_of(q), machine);
}

// What of a problem a tile cannot do, or null.
template <class Problem>
const char* refusal(const Problem& q, const GemmTile& tile, int splits) {
  if (q.PRODUCT != Product::forward && !tile.makes_gradients()) return "this tile is of forward products alone";
  if (splits == 1) return nullptr;
  if (q.PRODUCT == Product::input_gradient || !tile.splits || (splits != 2 && splits != 4)) {
    return "this tile's depth cannot be shared so";
  }
  return steps_of(q) < 4 * splits ? "a depth this short cannot be shared" : nullptr;
}

// Bytes of an InputGradient's `sums`, the only workspace there is.
inline int64_t sums_bytes(int64_t rows, int64_t channels) {
  return (rows + SUM_ROWS - 1) / SUM_ROWS * channels * int64_t(sizeof(float));
}

}  // namespace laco
