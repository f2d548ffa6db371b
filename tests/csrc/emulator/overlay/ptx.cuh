// In place of csrc's ptx.cuh: the same functions, carried out by the emulator.
#pragma once

#include <cuda.h>

#include <cmath>
#include <cstdint>

#include "instructions.h"
#include "problem.h"

namespace laco::ptx {

inline uint32_t shared_memory() { return emulator::shared_memory(); }

inline uint4 load_shared_16(uint32_t address) {
  uint4 v;
  emulator::load_shared(address, &v, 16);
  return v;
}
inline uint32_t load_shared_4(uint32_t address) {
  uint32_t v;
  emulator::load_shared(address, &v, 4);
  return v;
}
inline void store_shared_4(uint32_t address, uint32_t v) { emulator::store_shared(address, &v, 4); }
inline float load_shared_float(uint32_t address) {
  float v;
  emulator::load_shared(address, &v, 4);
  return v;
}
inline void store_shared_float(uint32_t address, float v) { emulator::store_shared(address, &v, 4); }
inline uint32_t load_global_4(const void* pointer) {
  uint32_t v;
  emulator::load_global(pointer, &v, 4);
  return v;
}
inline uint16_t load_global_2(const void* pointer) {
  uint16_t v;
  emulator::load_global(pointer, &v, 2);
  return v;
}
inline void store_global_16(void* pointer, uint4 v) { emulator::store_global(pointer, &v, 16); }
inline void store_global_8(void* pointer, float x, float y) {
  const float2 v{x, y};
  emulator::store_global(pointer, &v, 8);
}

// Numbers too small for a normal float are zeros.
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }
inline float exp2_approx(float x) { return flushed(exp2f(flushed(x))); }
inline float reciprocal_approx(float x) { return flushed(1.f / flushed(x)); }

inline void wait_for_kernels_in_front() { emulator::wait_for_kernels_in_front(); }
inline void let_next_kernel_start() {}
inline uint32_t cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_sync() { emulator::sync_cluster(); }
// The block's rank stands above the bits of a shared address.
inline uint32_t cluster_address(uint32_t address, uint32_t rank) { return rank << 24 | address; }
inline float load_cluster_float(uint32_t address) {
  float v;
  emulator::load_cluster(address & 0xFFFFFF, address >> 24, &v, 4);
  return v;
}
inline void named_barrier(int number, int threads) { emulator::named_barrier(number, threads); }

inline void barrier_init(uint32_t barrier, uint32_t arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void barrier_init_fence() { emulator::barrier_init_fence(); }
inline void barrier_expect(uint32_t barrier, uint32_t bytes) { emulator::barrier_arrive(barrier, bytes); }
inline void barrier_arrive(uint32_t barrier) { emulator::barrier_arrive(barrier, 0); }
inline bool barrier_try_wait(uint32_t barrier, uint32_t parity) {
  emulator::barrier_wait(barrier, parity, "a barrier", 0);
  return true;
}
inline void barrier_wait(uint32_t barrier, uint32_t parity, const char* name, int iteration) {
  emulator::barrier_wait(barrier, parity, name, iteration);
}

inline void prefetch_map(const CUtensorMap* map) { emulator::prefetch_map(map); }
inline void load_2d(const CUtensorMap* map, uint32_t barrier, uint32_t to, int c, int row) {
  const int at[] = {c, row};
  emulator::load_box(map, barrier, to, 2, at, nullptr);
}
inline void load_3d(const CUtensorMap* map, uint32_t barrier, uint32_t to, int c, int tap, int row) {
  const int at[] = {c, tap, row};
  emulator::load_box(map, barrier, to, 3, at, nullptr);
}
inline void load_im2col(const CUtensorMap* map, uint32_t barrier, uint32_t to, int c, int x, int y, int b, int dx, int dy) {
  const int at[] = {c, x, y, b}, offsets[] = {dx, dy};
  emulator::load_box(map, barrier, to, 4, at, offsets);
}
inline void store_2d(const CUtensorMap* map, uint32_t from, int n, int row) {
  const int at[] = {n, row};
  emulator::store_box(map, from, 2, at);
}
inline void store_3d(const CUtensorMap* map, uint32_t from, int c, int tap, int row) {
  const int at[] = {c, tap, row};
  emulator::store_box(map, from, 3, at);
}
inline void store_commit() { emulator::store_commit(); }
template <int PENDING>
void store_wait_read() {
  emulator::store_wait(PENDING, true);
}
inline void store_wait_all() { emulator::store_wait(0, false); }
inline void fence_async() { emulator::fence_async(); }

inline void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  emulator::store_matrices(address, {a, b, c, d});
}
inline void load_matrices(uint32_t address, uint32_t (&r)[4]) { emulator::load_matrices(address, r, false); }
inline void load_matrices_transposed(uint32_t address, uint32_t (&r)[4]) { emulator::load_matrices(address, r, true); }

inline void copy_16(uint32_t to, const void* from, bool is_there) { emulator::copy_16(to, from, is_there); }
inline void copy_commit() { emulator::copy_commit(); }
template <int PENDING>
void copy_wait() {
  emulator::copy_wait(PENDING);
}
template <Element ELEMENT>
void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply_16x8x16(ELEMENT == Element::float16, d, a, b0, b1);
}

template <int COUNT>
void registers_up() {
  emulator::change_registers(COUNT, true);
}
template <int COUNT>
void registers_down() {
  emulator::change_registers(COUNT, false);
}

}  // namespace laco::ptx
