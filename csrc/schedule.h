// The order in which blocks work on output tiles; the same on the device and in a test.
#pragma once

#ifdef __CUDACC__
#define LACO_EVERYWHERE __host__ __device__ __forceinline__
#else
#define LACO_EVERYWHERE inline
#endif

namespace laco {

constexpr int GROUP = 8;  // 4 and 16 took as long on an H200

// Down `group` row tiles, then the next column, so that A and W stay in the L2 cache. Block b of B takes tiles b, b + B, ...
struct Schedule {
  int rows, columns, group;  // in tiles

  LACO_EVERYWHERE Schedule(int rows_, int columns_, int group_) : rows(rows_), columns(columns_), group(group_) {}

  LACO_EVERYWHERE int tiles() const { return rows * columns; }

  LACO_EVERYWHERE void find(int tile, int& row, int& column) const {
    const int in_group = group * columns, first = tile / in_group * group;
    const int left = rows - first, height = left < group ? left : group, i = tile % in_group;
    row = first + i % height;
    column = i / height;
  }
};

}  // namespace laco
