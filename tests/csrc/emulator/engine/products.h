// Of a warp what the tensor cores of Hopper know; see products.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace emulator {

struct Product {
  uint64_t a, b;
  bool is_half, a_mn, b_mn, accumulate;
  int n, slot;

  bool operator==(const Product& other) const {
    return a == other.a && b == other.b && is_half == other.is_half && a_mn == other.a_mn && b_mn == other.b_mn &&
           accumulate == other.accumulate && n == other.n && slot == other.slot;
  }
};

constexpr int PRODUCT_ROWS = 16, PRODUCT_DEPTH = 16, MOST_COLUMNS = 256;  // of a warp

// The array d of each lane, whose content lies here while products are under way.
struct Accumulator {
  float* d[32] = {};
  int pending[32] = {};
  int n = 0;
  alignas(64) float values[PRODUCT_ROWS][MOST_COLUMNS];
};

struct ProductGroup {
  std::vector<Product> products;
  int come = 0;  // lanes that have committed it
};

// Of the four warps that work together.
struct Warpgroup {
  std::vector<ProductGroup> groups;  // `come` counts warps
};

struct WarpProducts {
  std::vector<std::unique_ptr<Accumulator>> accumulators;
  std::vector<ProductGroup> groups;
  size_t done = 0;
  std::shared_ptr<Warpgroup> warpgroup;
};

struct Block;

// acc[16, n] += A B^T, A's rows from `first_row` on, both as their descriptors say.
void compute(Block& block, const Product& product, int first_row, float (&values)[PRODUCT_ROWS][MOST_COLUMNS]);

}  // namespace emulator
