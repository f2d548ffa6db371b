// The CUDA runtime: one emulated device, and launches that have ended when they return.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "cuda.h"
#include "engine.h"
#include "tensor_maps.h"

using namespace emulator;

namespace {

constexpr int REGISTERS = 65536, MOST_SHARED = 232448, WITHOUT_ASKING = 49152;
cudaError_t last_error = cudaSuccess;
std::string last_failure;

std::unordered_map<const void*, int>& allowed_shared() {
  static std::unordered_map<const void*, int> all;
  return all;
}

cudaError_t error(cudaError_t code) {
  if (code != cudaSuccess) last_error = code;
  return code;
}

}  // namespace

cudaError_t cudaGetDeviceCount(int* count) {
  *count = settings.devices;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return device >= 0 && device < settings.devices ? cudaSuccess : error(cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= settings.devices) return error(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = settings.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = settings.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = settings.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = MOST_SHARED;
      break;
    default:
      return error(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t code) {
  switch (code) {
    case cudaSuccess:
      return "no error";
    case cudaErrorLaunchFailure:
      return last_failure.c_str();
    case cudaErrorInvalidDevice:
      return "CUDA: invalid device ordinal";
    case cudaErrorInvalidConfiguration:
      return last_failure.c_str();
    default:
      return "CUDA: invalid argument";
  }
}

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t code = last_error;
  last_error = cudaSuccess;
  return code;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = nullptr;
  if (std::strcmp(name, "cuTensorMapEncodeTiled") == 0) *function = reinterpret_cast<void*>(&encode_tiled);
  if (std::strcmp(name, "cuTensorMapEncodeIm2col") == 0) *function = reinterpret_cast<void*>(&encode_im2col);
  if (result != nullptr) *result = *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > MOST_SHARED)
    return error(cudaErrorInvalidValue);
  allowed_shared()[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  if (config->numAttrs != 1 || config->attrs->id != cudaLaunchAttributeClusterDimension || !allowed_shared().count(kernel))
    return error(cudaErrorInvalidValue);
  *clusters = emulator::settings.multiprocessors / int(config->attrs->val.clusterDim.x);
  return cudaSuccess;
}

namespace emulator {
namespace {

Timing choose(Timing timing, std::mt19937_64& random) { return timing == Timing::any ? Timing(random() % 3) : timing; }

struct Launch {
  const cudaLaunchConfig_t& config;
  unsigned cluster = 1;
  bool dependent = false;

  explicit Launch(const cudaLaunchConfig_t& config_, const void* kernel) : config(config_) {
    for (unsigned i = 0; i < config.numAttrs; ++i) {
      const cudaLaunchAttribute& one = config.attrs[i];
      if (one.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
        dependent = one.val.programmaticStreamSerializationAllowed != 0;
        continue;
      }
      if (one.val.clusterDim.y != 1 || one.val.clusterDim.z != 1) fail("clusters of more than one dimension are not emulated");
      cluster = one.val.clusterDim.x;
    }
    const auto found = allowed_shared().find(kernel);
    const size_t allowed = found == allowed_shared().end() ? WITHOUT_ASKING : std::max(found->second, WITHOUT_ASKING);
    const dim3 grid = config.gridDim;
    const uint64_t threads = uint64_t{config.blockDim.x} * config.blockDim.y * config.blockDim.z;
    if (config.dynamicSmemBytes > allowed)
      fail("%zu bytes of shared memory, where %zu are allowed", config.dynamicSmemBytes, allowed);
    if (threads < 1 || threads > 1024) fail("a block of %zu threads", size_t(threads));
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535)
      fail("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
    if (cluster < 1 || cluster > 8 || grid.x % cluster != 0) fail("clusters of %u blocks in a grid of %u", cluster, grid.x);
  }

  void add_block(Machine& all, uint3 index, uint32_t rank) const {
    Block& block = all.blocks.emplace_back();
    block.index = index, block.rank = rank;
    // Shared memory begins anywhere that 16 divides, in all blocks of a cluster at one address, and with NaN of any type in it.
    block.base = rank == 0 ? 1024 + uint32_t(all.random() % 64) * 16 : all.blocks.front().base;
    block.memory.assign(config.dynamicSmemBytes, char(0xFF));
    block.granules.resize(config.dynamicSmemBytes / 16 + 2);
    const dim3 size = config.blockDim;
    const int threads = int(size.x * size.y * size.z), warps = (threads + 31) / 32;
    const int registers = std::min(REGISTERS / threads / 8 * 8, 255 / 8 * 8);
    block.warps.resize(warps), block.threads.resize(threads);
    for (int i = 0; i < warps; ++i)
      block.warps[i].block = &block, block.warps[i].number = i, block.warps[i].registers = registers;
    for (int i = 0; i < threads; ++i) {
      Thread& thread = block.threads[i];
      thread.block = &block, thread.number = i, thread.lane = i % 32, thread.warp = &block.warps[i / 32];
      thread.warp->lanes[thread.lane] = &thread;
      thread.index = {unsigned(i) % size.x, unsigned(i) / size.x % size.y, unsigned(i) / size.x / size.y};
    }
  }

  // `how` says what it takes to see the launch again.
  void run(const std::function<void()>& call, std::string& how) const {
    const uint64_t seed = settings.seed + statistics.launches++;
    std::mt19937_64 random(seed);
    const dim3 grid = config.gridDim;
    std::vector<unsigned> clusters(grid.x / cluster * grid.y * grid.z);
    std::iota(clusters.begin(), clusters.end(), 0u);
    std::shuffle(clusters.begin(), clusters.end(), random);
    Machine all;
    all.copies = choose(settings.copies, random), all.products = choose(settings.products, random);
    all.stores = choose(settings.stores, random);
    all.order = Order(random() % 4), all.random = random, all.kernel = &call;
    all.dependent = dependent;
    static const char* const names[] = {"early", "late", "mixed"};
    static const char* const orders[] = {"first", "last", "any", "uneven"};
    how = " (seed " + std::to_string(seed) + ": copies " + names[int(all.copies)] + ", products " + names[int(all.products)] +
          ", stores " + names[int(all.stores)] + ", order " + orders[int(all.order)] + ")";
    all.grid = grid, all.block_size = config.blockDim;
    for (const unsigned i : clusters) {
      all.blocks.clear(), all.runnable.clear(), all.slow.clear(), all.events.clear();
      all.next_pace = 0;
      all.cluster = {};
      const unsigned x = i % (grid.x / cluster) * cluster, rest = i / (grid.x / cluster);
      for (unsigned rank = 0; rank < cluster; ++rank) add_block(all, {x + rank, rest % grid.y, rest / grid.y}, rank);
      machine = &all;
      run_cluster();
    }
  }
};

}  // namespace

uint3 thread_index() { return self().index; }
uint3 block_index() { return self().block->index; }
dim3 block_size() { return machine->block_size; }
dim3 grid_size() { return machine->grid; }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& call) {
  cudaError_t code = cudaErrorInvalidConfiguration;
  std::string how;
  try {
    const Launch launch(config, kernel);
    code = cudaErrorLaunchFailure;
    launch.run(call, how);
    code = cudaSuccess;
  } catch (const Failure& failure) { last_failure = "emulated GPU: " + failure.text + how; }
  machine = nullptr;
  return error(code);
}

}  // namespace emulator
