// Checks the Hopper product against a slow kernel, and times it. The cases go from the simplest to the riskiest.
//
//   test_hopper probe                                  what the im2col copies bring, pixel by pixel
//   test_hopper check [--skip TILE,..] [--from N] [--only CASE] [--tile TILE]
//   test_hopper time [--skip TILE,..]
//
// Exit status: 0 all passed, 1 wrong results, 3 a kernel hung or failed (its case number is in the last line).
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "test_hopper.h"

namespace {

int current_case = 0;

// name, batch, height, width, prefix, channels, sources, n, side, bias, activation, save, residual, its height, width, out_prefix,
// residual_side, element
const Problem PROBLEMS[] = {
    {"k64", 1, 1, 128, 0, 64, 1, 256, 1, false, 0, false},
    {"k128", 1, 1, 128, 0, 128, 1, 256, 1, false, 0, false},
    {"k1024", 1, 1, 128, 0, 1024, 1, 256, 1, true, 0, false},
    {"tiles-4x4", 1, 1, 512, 0, 256, 1, 1024, 1, true, 0, false},
    {"persistent", 1, 1, 2304, 0, 1024, 1, 4096, 1, true, 0, false},
    {"m144", 1, 12, 12, 0, 4096, 1, 4096, 1, true, 0, false},
    {"ragged", 1, 1, 203, 0, 1160, 1, 1160, 1, true, 1, false},
    {"erf", 3, 24, 24, 0, 1152, 1, 1152, 1, true, 1, false},
    {"tanh", 3, 24, 24, 0, 1152, 1, 1152, 1, true, 2, false},
    {"erf-save", 3, 24, 24, 0, 1152, 1, 4096, 1, true, 1, true},
    {"sources", 3, 24, 24, 0, 128, 8, 1024, 1, true, 1, false},
    {"windows", 4, 24, 24, 0, 1024, 1, 1024, 2, true, 1, false},
    {"windows-odd", 3, 27, 27, 0, 1152, 1, 1152, 2, true, 1, false},
    {"windows-odd-cls", 2, 27, 27, 1, 1152, 1, 1152, 2, true, 2, true},
    {"windows-small", 3, 5, 7, 1, 72, 1, 136, 2, true, 1, false},
    {"sources-cls", 3, 24, 24, 1, 1024, 8, 1024, 1, true, 1, false},
    {"residual-block", 4, 12, 12, 0, 1024, 1, 1024, 1, true, 0, false, 2, 24, 24, 0},
    {"residual", 4, 12, 12, 0, 1024, 1, 1024, 1, true, 0, false, 1, 24, 24, 0},
    {"residual-odd-cls", 3, 14, 14, 0, 1152, 1, 1152, 1, true, 0, false, 1, 27, 27, 1},
    {"windows-3", 2, 26, 25, 1, 72, 1, 136, 3, true, 1, true},
    {"windows-4", 3, 24, 24, 0, 1024, 1, 1024, 4, true, 2, false},
    {"residual-3-odd-cls", 3, 9, 9, 0, 1152, 1, 1152, 1, true, 0, false, 1, 26, 27, 1, 3},
    {"residual-4-block", 4, 6, 6, 0, 1024, 1, 1024, 1, true, 0, false, 2, 24, 24, 0, 4},
    {"half-erf-save", 3, 24, 24, 0, 1152, 1, 1152, 1, true, 1, true, 0, 0, 0, 0, 2, laco::Element::float16},
    {"half-windows-odd-tanh", 3, 27, 27, 1, 1152, 1, 1152, 2, true, 2, true, 0, 0, 0, 0, 2, laco::Element::float16},
    {"half-residual-odd-cls", 3, 14, 14, 0, 1152, 1, 1152, 1, true, 0, false, 1, 27, 27, 1, 2, laco::Element::float16},
    {"large", 16, 24, 24, 0, 4096, 1, 4096, 1, true, 1, true},
};

std::vector<laco::GemmTile> choose(int argc, char** argv) {
  std::string skip = ",", only;
  for (int i = 2; i + 1 < argc; ++i) {
    if (!strcmp(argv[i], "--skip")) skip += std::string(argv[i + 1]) + ",";
    if (!strcmp(argv[i], "--tile")) only = argv[i + 1];
  }
  std::vector<laco::GemmTile> chosen;
  for (const auto& v : laco::TILES) {
    if (skip.find("," + std::string(v.name) + ",") != std::string::npos) continue;
    if (only.empty() || only == v.name) chosen.push_back(v);
  }
  return chosen;
}

int check_everything(int argc, char** argv) {
  const auto chosen = choose(argc, argv);
  int from = 0;
  std::string only;
  for (int i = 2; i + 1 < argc; ++i) {
    if (!strcmp(argv[i], "--from")) from = atoi(argv[i + 1]);
    if (!strcmp(argv[i], "--only")) only = argv[i + 1];
  }
  cudaStream_t stream;
  cudaStreamCreate(&stream);
  bool good = true;
  current_case = -1;
  for (const Problem& problem : PROBLEMS) {
    ++current_case;
    if (current_case < from || (!only.empty() && only != problem.name)) continue;
    Tensors tensors(problem);
    compute_reference(tensors);
    for (const auto& tile : chosen) {
      const std::string label = std::string(problem.name) + " " + tile.name;
      tensors.poison_outputs();
      if (const char* error = tile.launch(tensors.gemm, stream)) {
        printf("FAIL %s: not launched: %s\n", label.c_str(), error);
        good = false;
        continue;
      }
      finish_or_exit(stream, 2, label);
      good &= check(tensors, label);
    }
  }
  printf("%s\n", good ? "ALL PASS" : "SOME FAILED");
  return good ? 0 : 1;
}

}  // namespace

void finish_or_exit(cudaStream_t stream, double seconds, const std::string& label) {
  const auto start = std::chrono::steady_clock::now();
  cudaError_t state;
  while ((state = cudaStreamQuery(stream)) == cudaErrorNotReady) {
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) continue;
    break;
  }
  if (state == cudaSuccess) return;
  printf("%s %s %s\n", state == cudaErrorNotReady ? "HANG" : "CRASH", label.c_str(), cudaGetErrorString(state));
  printf("STOPPED %d %s\n", current_case, label.c_str());
  fflush(stdout);
  _exit(3);
}

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess || device.major != 9) {
    printf("no Hopper GPU\n");
    return 2;
  }
  if (what == "probe") return probe_im2col() ? 0 : 1;
  if (what == "check") return check_everything(argc, argv);
  if (what == "time") {
    printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
    time_everything(choose(argc, argv));
    return 0;
  }
  printf("usage: test_hopper probe | check | time\n");
  return 2;
}
