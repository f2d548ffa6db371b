// Boxes of tensors, loaded and stored by the copy engine.
#include <algorithm>

#include "probes.h"
#include "tensor_maps.h"

using namespace laco;

namespace probes {
namespace {

struct Box {
  CUtensorMap map;
  std::vector<int> at, offsets;
  uint32_t bytes;
};

__global__ void load_box(const Box* box, uint32_t* out) {
  const uint32_t to = aligned_shared(), barrier = to + SHARED - 2048;
  if (threadIdx.x == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::barrier_init_fence();
    ptx::barrier_expect(barrier, box->bytes);
    emulator::load_box(&box->map, barrier, to, int(box->at.size()), box->at.data(),
                       box->offsets.empty() ? nullptr : box->offsets.data());
  }
  __syncthreads();
  ptx::barrier_wait(barrier, 0, "the box", 0);
  for (uint32_t i = threadIdx.x; i < box->bytes / 4; i += blockDim.x) out[i] = ptx::load_shared_4(to + 4 * i);
}

__global__ void store_box(const Box* box, const uint32_t* in) {
  const uint32_t from = aligned_shared();
  for (uint32_t i = threadIdx.x; i < box->bytes / 4; i += blockDim.x) ptx::store_shared_4(from + 4 * i, in[i]);
  ptx::fence_async();
  __syncthreads();
  if (threadIdx.x != 0) return;
  emulator::store_box(&box->map, from, int(box->at.size()), box->at.data());
  ptx::store_commit();
  ptx::store_wait_all();
}

}  // namespace

std::string encode(uintptr_t address, int element_bytes, const std::vector<uint64_t>& sizes,
                   const std::vector<uint64_t>& strides, const std::vector<uint32_t>& box, const std::vector<uint32_t>& steps,
                   const std::vector<int>& corners, bool swizzled) {
  const auto type = element_bytes == 2   ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                    : element_bytes == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                         : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const auto swizzle = swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE;
  CUtensorMap map{};
  void* base = reinterpret_cast<void*>(address);
  const auto rank = cuuint32_t(sizes.size());
  const CUresult result =
      corners.empty()
          ? emulator::encode_tiled(&map, type, rank, base, sizes.data(), strides.data(), box.data(), steps.data(),
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
          : emulator::encode_im2col(&map, type, rank, base, sizes.data(), strides.data(), corners.data(),
                                    corners.data() + rank - 2, box[0], box[1], steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
                                    swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return "";
  return {reinterpret_cast<const char*>(&map), sizeof map};
}

std::string move_box(const std::string& map, const std::vector<int>& at, const std::vector<int>& offsets, uint32_t bytes,
                     uintptr_t memory, bool store) {
  Box box{{}, at, offsets, bytes};
  std::copy(map.begin(), map.end(), reinterpret_cast<char*>(&box.map));
  if (store) return launch<const Box*, const uint32_t*>(store_box, 1, 64, 1, &box, reinterpret_cast<const uint32_t*>(memory));
  return launch<const Box*, uint32_t*>(load_box, 1, 64, 1, &box, reinterpret_cast<uint32_t*>(memory));
}

}  // namespace probes
