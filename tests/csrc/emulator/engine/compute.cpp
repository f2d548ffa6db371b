// One warp's share of a warpgroup product. Operands come as float and depth by depth, so that the loop over columns is one of
// vectors; blocks of eight rows or columns that are all zeros, of which small problems have many, are passed over.
#include <array>
#include <cmath>
#include <cstring>

#include "engine.h"
#include "numbers.h"
#include "tensor_maps.h"

namespace emulator {
namespace {

typedef float Vector __attribute__((vector_size(32)));
constexpr int UNIT = 8;  // numbers of a Vector, and 16-bit numbers in 16 bytes of shared memory

struct Operand {
  uint32_t start, leading, stride;
  bool mn;

  Operand(uint64_t descriptor, bool mn_) : mn(mn_) {
    const auto field = [&](int shift) { return uint32_t(descriptor >> shift & 0x3FFF) << 4; };
    start = field(0), leading = field(16), stride = field(32);
    if (descriptor >> 62 != 1) fail("a matrix descriptor without 128-byte swizzle, which is not emulated");
    if ((descriptor >> 49 & 7) != 0) fail("a matrix descriptor with a base offset, which is not emulated");
    if ((start >> 7 & 7) != 0) fail("a matrix at shared address %u, inside of a swizzle atom", start);
    if (mn && start % 128 != 0) fail("an MN-major matrix at shared address %u, inside of a line", start);
  }

  // Where 8 numbers begin that lie together: at (row, depth) and on along K, or along the rows if MN-major.
  uint32_t address(int row, int depth) const {
    const uint32_t offset = mn ? row / 64 * leading + depth / 8 * stride + depth % 8 * 128 + row % 64 * 2
                               : row / 8 * stride + row % 8 * 128 + depth * 2;
    return swizzle_128(start + offset);
  }
};

// `rows` rows of an operand from `first_row` on, as they lie there and as float.
template <int ROWS>
struct Decoded {
  int rows = 0;
  bool is_half = false, mn = false, finite = true;
  alignas(64) uint16_t raw[PRODUCT_DEPTH * ROWS];
  alignas(64) float values[PRODUCT_DEPTH][ROWS];
  bool used[ROWS / UNIT];
};

template <int ROWS>
void gather(Block& block, const Operand& operand, int first_row, int rows, uint16_t* to) {
  const auto take = [&](int row, int depth) {
    const uint32_t address = operand.address(row, depth);
    const char* from = block.at(address, 16, 16, "a product");
    block.check_visible(address, "a product");
    std::memcpy(to, from, 16);
    to += UNIT;
  };
  if (operand.mn) {
    for (int depth = 0; depth < PRODUCT_DEPTH; ++depth) {
      for (int row = 0; row < rows; row += UNIT) take(first_row + row, depth);
    }
  } else {
    for (int row = 0; row < rows; ++row) {
      for (int depth = 0; depth < PRODUCT_DEPTH; depth += UNIT) take(first_row + row, depth);
    }
  }
}

template <bool HALF, int ROWS>
void decode(Decoded<ROWS>& to) {
  float sum = 0;
  for (int block = 0; block < to.rows; block += UNIT) {
    uint32_t any = 0;
    for (int row = block; row < block + UNIT; ++row) {
      for (int depth = 0; depth < PRODUCT_DEPTH; ++depth) {
        const uint16_t bits = to.mn ? to.raw[depth * to.rows + row] : to.raw[row * PRODUCT_DEPTH + depth];
        any |= bits;
        to.values[depth][row] = to_float<HALF>(bits);
      }
    }
    to.used[block / UNIT] = any != 0;
    for (int depth = 0; any != 0 && depth < PRODUCT_DEPTH; ++depth) {
      for (int row = block; row < block + UNIT; ++row) sum += to.values[depth][row] * 0.f;
    }
  }
  to.finite = sum == 0.f;
}

template <int ROWS>
void read(Decoded<ROWS>& to, Block& block, uint64_t descriptor, bool mn, bool is_half, int first_row, int rows) {
  alignas(64) uint16_t raw[PRODUCT_DEPTH * ROWS];
  gather<ROWS>(block, Operand(descriptor, mn), first_row, rows, raw);
  const size_t bytes = size_t(rows) * PRODUCT_DEPTH * 2;
  if (to.rows == rows && to.is_half == is_half && to.mn == mn && std::memcmp(raw, to.raw, bytes) == 0) return;
  to.rows = rows, to.is_half = is_half, to.mn = mn;
  std::memcpy(to.raw, raw, bytes);
  is_half ? decode<true>(to) : decode<false>(to);
}

// The four warps of a warpgroup, and the other warpgroups, read the same B.
Decoded<MOST_COLUMNS>& kept(uint64_t descriptor) {
  static std::array<std::unique_ptr<Decoded<MOST_COLUMNS>>, 32> all;
  auto& one = all[(descriptor * 0x9E3779B97F4A7C15u >> 32) % all.size()];
  if (!one) one = std::make_unique<Decoded<MOST_COLUMNS>>();
  return *one;
}

}  // namespace

void compute(Block& block, const Product& product, int first_row, float (&values)[PRODUCT_ROWS][MOST_COLUMNS]) {
  static Decoded<PRODUCT_ROWS> a;
  Decoded<MOST_COLUMNS>& b = kept(product.b);
  read(a, block, product.a, product.a_mn, product.is_half, first_row, PRODUCT_ROWS);
  read(b, block, product.b, product.b_mn, product.is_half, 0, product.n);
  for (int row = 0; row < PRODUCT_ROWS; row += UNIT) {
    if (!a.used[row / UNIT] && b.finite) continue;
    for (int column = 0; column < product.n; column += UNIT) {
      if (!b.used[column / UNIT] && a.finite) continue;
      Vector sums[UNIT];
      for (int i = 0; i < UNIT; ++i) std::memcpy(&sums[i], &values[row + i][column], sizeof(Vector));
      for (int depth = 0; depth < PRODUCT_DEPTH; ++depth) {
        Vector line;
        std::memcpy(&line, &b.values[depth][column], sizeof line);
        for (int i = 0; i < UNIT; ++i) sums[i] += a.values[depth][row + i] * line;
      }
      for (int i = 0; i < UNIT; ++i) std::memcpy(&values[row + i][column], &sums[i], sizeof(Vector));
    }
  }
}

}  // namespace emulator
