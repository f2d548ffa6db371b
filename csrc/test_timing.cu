// Times every tile on the shapes that matter: graphs of 20 launches, five rounds in which the tiles take turns, the median.
// The result of the twentieth launch is checked.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "test_hopper.h"

namespace {

struct Shape {
  Problem problem;
  const char* note;  // what cuBLAS and Triton took on an H200, without and with an activation
};

const Shape SHAPES[] = {
    {{"9216x4096x4096", 1, 1, 9216, 0, 4096, 1, 4096, 1, true, 0, false}, "cuBLAS 403 us"},
    {{"9216x4096x4096 erf", 1, 1, 9216, 0, 4096, 1, 4096, 1, true, 1, false}, "Triton, bias + GELU 454 us"},
    {{"9216x4096x4096 tanh", 1, 1, 9216, 0, 4096, 1, 4096, 1, true, 2, false}, ""},
    {{"9216x4096x4096 erf save", 1, 1, 9216, 0, 4096, 1, 4096, 1, true, 1, true}, ""},
    {{"9216x4096x4096 windows erf", 64, 24, 24, 0, 1024, 1, 4096, 2, true, 1, false}, ""},
    {{"9216x1024x4096", 1, 1, 9216, 0, 4096, 1, 1024, 1, true, 0, false}, "cuBLAS 108 us"},
    {{"9216x1024x4096 residual", 64, 12, 12, 0, 4096, 1, 1024, 1, true, 0, false, 1, 24, 24, 0}, ""},
    {{"2304x4096x4096", 1, 1, 2304, 0, 4096, 1, 4096, 1, true, 0, false}, "cuBLAS 101 us"},
    {{"2304x4096x4096 windows erf", 16, 24, 24, 0, 1024, 1, 4096, 2, true, 1, false}, ""},
    {{"9216x1024x8192 8 sources cls erf", 16, 24, 24, 1, 1024, 8, 1024, 1, true, 1, false}, ""},
    {{"144x4096x4096", 1, 1, 144, 0, 4096, 1, 4096, 1, true, 0, false}, "cuBLAS 15.2 us"},
};

constexpr int LAUNCHES = 20, ROUNDS = 5;

struct Entry {
  std::string name;
  cudaGraphExec_t graph;
  std::vector<float> microseconds;
  bool right;
};

}  // namespace

void time_everything(const std::vector<laco::GemmTile>& chosen) {
  cudaStream_t stream;
  cudaStreamCreate(&stream);
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  for (const Shape& shape : SHAPES) {
    Tensors tensors(shape.problem);
    compute_reference(tensors);
    std::vector<Entry> entries;
    for (const auto& tile : chosen) {
      cudaGraph_t graph;
      Entry entry{tile.name, nullptr, {}, false};
      cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
      const char* error = nullptr;
      for (int i = 0; i < LAUNCHES && !error; ++i) error = tile.launch(tensors.gemm, stream);
      const bool captured = cudaStreamEndCapture(stream, &graph) == cudaSuccess && !error;
      if (!captured || cudaGraphInstantiate(&entry.graph, graph, 0) != cudaSuccess) {
        printf("%s %s: not captured: %s\n", shape.problem.name, entry.name.c_str(), error ? error : "");
        cudaGetLastError();
        continue;
      }
      cudaGraphDestroy(graph);
      tensors.poison_outputs();
      cudaGraphLaunch(entry.graph, stream);
      finish_or_exit(stream, 3, std::string("time ") + shape.problem.name + " " + entry.name);
      entry.right = check(tensors, shape.problem.name + std::string(" ") + entry.name, true);
      entries.push_back(entry);
    }
    for (int round = 0; round < ROUNDS; ++round) {
      for (Entry& entry : entries) {
        cudaEventRecord(start, stream);
        cudaGraphLaunch(entry.graph, stream);
        cudaEventRecord(stop, stream);
        finish_or_exit(stream, 3, std::string("time ") + shape.problem.name + " " + entry.name);
        float milliseconds = 0;
        cudaEventElapsedTime(&milliseconds, start, stop);
        entry.microseconds.push_back(milliseconds * 1000 / LAUNCHES);
      }
    }
    printf("\n%s  (%s)\n", shape.problem.name, shape.note);
    for (Entry& entry : entries) std::sort(entry.microseconds.begin(), entry.microseconds.end());
    std::sort(entries.begin(), entries.end(),
              [](const Entry& a, const Entry& b) { return a.microseconds[ROUNDS / 2] < b.microseconds[ROUNDS / 2]; });
    const double flops = 2.0 * tensors.problem.m() * tensors.problem.n * tensors.problem.k();
    for (Entry& entry : entries) {
      const float middle = entry.microseconds[ROUNDS / 2];
      printf("  %-22s %8.2f us  (%.2f to %.2f)  %6.1f TFLOP/s%s\n", entry.name.c_str(), middle, entry.microseconds.front(),
             entry.microseconds.back(), flops / middle * 1e-6, entry.right ? "" : "  WRONG");
      cudaGraphExecDestroy(entry.graph);
    }
    fflush(stdout);
  }
}
