// The Hopper instructions that CUDA C++ has no name for, one short function each.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#ifdef LACO_TRACE_WAITS
#include <cstdio>
#endif

namespace laco::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarriers: addresses are 32-bit shared addresses ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes the initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool barrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

#ifdef LACO_TRACE_WAITS
// Once one wait has given up all do, so that a kernel that hangs ends and its messages are printed.
static __device__ volatile int gave_up;
static __device__ int complaints;
#endif

// `name` says which wait hangs when built with LACO_TRACE_WAITS.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity, const char* name, int iteration) {
#ifdef LACO_TRACE_WAITS
  for (long long start = clock64(); !barrier_try_wait(barrier, parity);) {
    const bool late = clock64() - start > 200'000'000LL;
    if (late && threadIdx.x % 32 == 0 && atomicAdd(&complaints, 1) < 100) {
      printf("stuck: block %d thread %d waits for %s, iteration %d, parity %u, barrier at %u\n", int(blockIdx.x),
             int(threadIdx.x), name, iteration, parity, barrier);
    }
    if (late) __nanosleep(1'000'000), gave_up = 1;
    if (late || (gave_up && clock64() - start > 20'000'000LL)) return;
  }
#else
  while (!barrier_try_wait(barrier, parity)) {
  }
#endif
}

// ---- the copy engine (TMA) ----

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

__device__ __forceinline__ void load_2d(const CUtensorMap* map, uint32_t barrier, uint32_t to, int c, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(c), "r"(row)
      : "memory");
}

__device__ __forceinline__ void load_3d(const CUtensorMap* map, uint32_t barrier, uint32_t to, int c, int tap, int row) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(c), "r"(tap), "r"(row)
      : "memory");
}

// A run of pixels that starts at (x, y) of image b and wraps to the next line and image, each displaced by (dx, dy).
__device__ __forceinline__ void load_im2col(const CUtensorMap* map, uint32_t barrier, uint32_t to, int c, int x, int y, int b,
                                            int dx, int dy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(c), "r"(x), "r"(y), "r"(b), "h"(static_cast<uint16_t>(dx)),
      "h"(static_cast<uint16_t>(dy))
      : "memory");
}

__device__ __forceinline__ void store_2d(const CUtensorMap* map, uint32_t from, int n, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(from), "r"(n), "r"(row)
               : "memory");
}

__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but the `PENDING` newest stores have read their shared memory.
template <int PENDING>
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void store_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Ordinary stores to shared memory become visible to the copy engine.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- matrices in shared memory ----

__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// ---- registers ----

template <int COUNT>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

}  // namespace laco::ptx
