// Every thread of a cluster follows a list of steps.
#include "engine.h"
#include "probes.h"
#include "tensor_maps.h"

using namespace laco;

namespace probes {
namespace {

__global__ void follow(const Programs* programs, const CUtensorMap* map, uintptr_t global, Log* log) {
  const uint32_t base = aligned_shared();
  const int thread = int(ptx::cluster_rank() * blockDim.x + threadIdx.x);
  for (const auto& [name, a, b] : (*programs)[thread]) {
    const auto is = [&, &what = name](const char* other) { return what == other; };
    const uint32_t at = base + uint32_t(a);
    const auto note = [&](float x) { log->emplace_back(thread, int64_t(x)); };
    if (is("init"))
      ptx::barrier_init(at, uint32_t(b));
    else if (is("init_fence"))
      ptx::barrier_init_fence();
    else if (is("arrive"))
      ptx::barrier_arrive(at);
    else if (is("expect"))
      ptx::barrier_expect(at, uint32_t(b));
    else if (is("wait"))
      ptx::barrier_wait(at, uint32_t(b), "its barrier", 7);
    else if (is("note"))
      note(float(a));
    else if (is("sync_block"))
      __syncthreads();
    else if (is("sync_warp"))
      __syncwarp();
    else if (is("sync_cluster"))
      ptx::cluster_sync();
    else if (is("named"))
      ptx::named_barrier(int(a), int(b));
    else if (is("store"))
      ptx::store_shared_float(at, float(b));
    else if (is("load"))
      note(ptx::load_shared_float(at));
    else if (is("load_cluster"))
      note(ptx::load_cluster_float(ptx::cluster_address(at, uint32_t(b))));
    else if (is("shuffle"))
      note(float(__shfl_xor_sync(0xFFFFFFFF, int(threadIdx.x), int(a))));
    else if (is("fence"))
      ptx::fence_async();
    else if (is("load_box"))
      ptx::load_2d(map, base + uint32_t(b), at, 0, 0);
    else if (is("store_box"))
      ptx::store_2d(map, at, 0, 0);
    else if (is("store_commit"))
      ptx::store_commit();
    else if (is("store_wait"))
      ptx::store_wait_all();
    else if (is("copy"))
      ptx::copy_16(at, reinterpret_cast<const char*>(global), b != 0);
    else if (is("copy_commit"))
      ptx::copy_commit();
    else if (is("copy_wait"))
      a == 0 ? ptx::copy_wait<0>() : ptx::copy_wait<1>();
    else if (is("registers"))
      b != 0 ? emulator::change_registers(int(a), true) : emulator::change_registers(int(a), false);
    else
      emulator::fail("no step %s", name.c_str());
  }
}

}  // namespace

std::pair<std::string, Log> run(const Programs& programs, int blocks, uintptr_t global) {
  // A matrix of 8 x 32 floats at `global`, all of which is the map's box.
  CUtensorMap map{};
  const cuuint64_t sizes[] = {32, 8}, strides[] = {128};
  const cuuint32_t box[] = {32, 8}, steps[] = {1, 1};
  if (global != 0) {
    emulator::encode_tiled(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, reinterpret_cast<void*>(global), sizes, strides, box,
                           steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  }
  Log log;
  const int threads = int(programs.size()) / blocks;
  std::string error = launch<const Programs*, const CUtensorMap*, uintptr_t, Log*>(follow, blocks, threads, blocks, &programs,
                                                                                   &map, global, &log);
  return {error, log};
}

}  // namespace probes
