// What the lanes of a warp carry out together.
#include "engine.h"
#include "instructions.h"
#include "numbers.h"

namespace emulator {
namespace {

struct Shuffled {
  Shuffle kind;
  uint32_t value, result;
  int operand, width;
};

void shuffle_all(Warp& warp, void* const (&payloads)[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    if ((warp.mask >> lane & 1) == 0) continue;
    auto& mine = *static_cast<Shuffled*>(payloads[lane]);
    const int first = lane / mine.width * mine.width;
    int from = lane;
    switch (mine.kind) {
      case Shuffle::from:
        from = first + (mine.operand & (mine.width - 1));
        break;
      case Shuffle::exclusive_or:
        from = lane ^ mine.operand;
        break;
      case Shuffle::down:
        from = lane + mine.operand;
        break;
      case Shuffle::up:
        from = lane - mine.operand;
        break;
    }
    if (from < first || from >= first + mine.width) from = lane;
    if ((warp.mask >> from & 1) == 0)
      fail("lane %d shuffles from lane %d, which is not in the mask %08x", lane, from, warp.mask);
    mine.result = static_cast<Shuffled*>(payloads[from])->value;
  }
}

struct Matrices {
  uint32_t address;
  uint32_t values[4];
};

template <class Use>
void for_each_element(void* const (&payloads)[32], const char* what, Use use) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int row = 0; row < 8; ++row) {
      const uint32_t address = static_cast<Matrices*>(payloads[8 * matrix + row])->address;
      self().block->at(address, 16, 16, what);
      use(matrix, row, address);
    }
  }
}

void store_all(Warp& warp, void* const (&payloads)[32]) {
  for_each_element(payloads, "stmatrix", [&](int matrix, int row, uint32_t address) {
    for (int i = 0; i < 4; ++i) {
      const int lane = 4 * row + i;
      warp.block->write(*warp.lanes[lane], address + 4 * i, &static_cast<Matrices*>(payloads[lane])->values[matrix], 4);
    }
  });
}

void load_all(Warp& warp, void* const (&payloads)[32]) {
  for_each_element(payloads, "ldmatrix", [&](int matrix, int row, uint32_t address) {
    const char* from = warp.block->at(address, 16, 16, "ldmatrix");
    for (int i = 0; i < 4; ++i) std::memcpy(&static_cast<Matrices*>(payloads[4 * row + i])->values[matrix], from + 4 * i, 4);
  });
}

void load_all_transposed(Warp& warp, void* const (&payloads)[32]) {
  for_each_element(payloads, "ldmatrix", [&](int matrix, int row, uint32_t address) {
    const char* from = warp.block->at(address, 16, 16, "ldmatrix");
    for (int column = 0; column < 8; ++column) {
      auto* to = reinterpret_cast<char*>(&static_cast<Matrices*>(payloads[4 * column + row / 2])->values[matrix]);
      std::memcpy(to + 2 * (row % 2), from + 2 * column, 2);
    }
  });
}

struct Fragments {
  bool is_half;
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <bool HALF>
void multiply_all(void* const (&payloads)[32]) {
  float a[16][16], d[16][8] = {};
  alignas(32) float b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<Fragments*>(payloads[lane]);
    const int group = lane / 4, first = 2 * (lane % 4);
    for (int i = 0; i < 2; ++i) {
      const int shift = 16 * i;
      for (int j = 0; j < 4; ++j) a[group + 8 * (j % 2)][first + 8 * (j / 2) + i] = to_float<HALF>(mine.a[j] >> shift);
      for (int j = 0; j < 2; ++j) b[first + 8 * j + i][group] = to_float<HALF>(mine.b[j] >> shift);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* to = static_cast<Fragments*>(payloads[lane])->d;
    for (int i = 0; i < 4; ++i) to[i] += d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

}  // namespace

uint32_t shuffle(Shuffle kind, uint32_t mask, uint32_t value, int operand, int width) {
  static const char* const names[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_down_sync", "__shfl_up_sync"};
  Shuffled mine{kind, value, 0, operand, width};
  meet(names[int(kind)], mask, &mine, shuffle_all);
  return mine.result;
}

void store_matrices(uint32_t address, const uint32_t (&values)[4]) {
  Matrices mine{address, {values[0], values[1], values[2], values[3]}};
  meet("stmatrix", 0xFFFFFFFF, &mine, store_all);
}

void load_matrices(uint32_t address, uint32_t (&values)[4], bool transposed) {
  Matrices mine{address, {}};
  meet(transposed ? "ldmatrix.trans" : "ldmatrix", 0xFFFFFFFF, &mine, transposed ? load_all_transposed : load_all);
  std::copy(mine.values, mine.values + 4, values);
}

void multiply_16x8x16(bool is_half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments mine{is_half, d, a, {b0, b1}};
  meet(is_half ? "mma.f16" : "mma.bf16", 0xFFFFFFFF, &mine, [](Warp&, void* const(&payloads)[32]) {
    static_cast<Fragments*>(payloads[0])->is_half ? multiply_all<true>(payloads) : multiply_all<false>(payloads);
  });
}

}  // namespace emulator
