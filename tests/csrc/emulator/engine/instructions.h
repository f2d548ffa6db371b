// What the overlays of ptx.cuh and wgmma.cuh call: one function for each kind of instruction.
#pragma once

#include <cstdint>

#include "cuda.h"
#include "cuda_runtime.h"

namespace emulator {

// memory.cpp
uint32_t shared_memory();
void load_shared(uint32_t address, void* to, uint32_t bytes);
void store_shared(uint32_t address, const void* from, uint32_t bytes);
void load_cluster(uint32_t address, uint32_t rank, void* to, uint32_t bytes);
void load_global(const void* from, void* to, uint32_t bytes);
void store_global(void* to, const void* from, uint32_t bytes);
void wait_for_kernels_in_front();
uint32_t cluster_rank();
void fence_async();

// barriers.cpp
void sync_cluster();
void named_barrier(int number, int threads);
void barrier_init(uint32_t barrier, uint32_t arrivals);
void barrier_init_fence();
void barrier_arrive(uint32_t barrier, uint32_t bytes);
void barrier_wait(uint32_t barrier, uint32_t parity, const char* name, int iteration);
void change_registers(int count, bool up);

// copies.cpp
void prefetch_map(const CUtensorMap* map);
void load_box(const CUtensorMap* map, uint32_t barrier, uint32_t to, int rank, const int* at, const int* offsets);
void store_box(const CUtensorMap* map, uint32_t from, int rank, const int* at);
void store_commit();
void store_wait(int pending, bool only_read);
void copy_16(uint32_t to, const void* from, bool is_there);
void copy_commit();
void copy_wait(int pending);

// warps.cpp
void store_matrices(uint32_t address, const uint32_t (&values)[4]);
void load_matrices(uint32_t address, uint32_t (&values)[4], bool transposed);
void multiply_16x8x16(bool is_half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// products.cpp
void product_fence();
void product(bool is_half, bool a_mn, bool b_mn, float* d, int n, uint64_t a, uint64_t b, bool accumulate);
void product_commit();
void product_wait(int pending);

}  // namespace emulator
