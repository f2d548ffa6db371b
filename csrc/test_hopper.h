// What the parts of the test program share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "hopper_gemm.h"

struct Problem {
  const char* name;
  int batch, height, width, prefix, channels, sources, n;
  bool windows;
  bool bias;
  int activation;
  bool save;
  int residual;  // 0 none, 1 raster, 2 block order; of a grid twice as fine, or residual_height x residual_width
  int residual_height, residual_width;
  int out_prefix;

  int rows() const { return windows ? (height + 1) / 2 * ((width + 1) / 2) : height * width; }
  int m() const { return batch * rows(); }
  int k() const { return sources * channels * (windows ? 4 : 1); }
};

// A problem's tensors on the device. What must not be read or written is NaN.
struct Tensors {
  explicit Tensors(const Problem& problem);
  ~Tensors();
  void poison_outputs();

  Problem problem;
  laco::GemmProblem gemm;
  std::vector<void*> memory;
  size_t out_elements, pre_elements;
  float *expected, *expected_pre;  // [M, n]

 private:
  __nv_bfloat16* allocate(size_t elements, unsigned seed, float scale);
};

void compute_reference(const Tensors& tensors);
// Prints the errors, and if they are too large what is wrong where; `label` is put in front.
bool check(const Tensors& tensors, const std::string& label, bool only_failures = false);

// Ends the program when the stream is not done in time or has failed: a hung kernel leaves nothing that could be used.
void finish_or_exit(cudaStream_t stream, double seconds, const std::string& label);

bool probe_im2col();
void time_everything(const std::vector<laco::GemmTile>& chosen);
