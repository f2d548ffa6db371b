// What the parts of the test program share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "hopper_gemm.h"

struct Problem {
  const char* name;
  int batch, height, width, prefix, channels, sources, n;
  int side;
  bool bias;
  int activation;
  bool save;
  int residual;  // 0 none, 1 raster, 2 block order; of residual_height x residual_width tokens
  int residual_height, residual_width;
  int out_prefix;
  int residual_side = 2;
  laco::Element element = laco::Element::bfloat16;

  int rows() const { return (height + side - 1) / side * ((width + side - 1) / side); }
  int m() const { return batch * rows(); }
  int k() const { return sources * channels * side * side; }
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
  uint16_t* allocate(size_t elements, unsigned seed, float scale);
};

void compute_reference(const Tensors& tensors);
// Prints the errors, and if they are too large what is wrong where; `label` is put in front.
bool check(const Tensors& tensors, const std::string& label, bool only_failures = false);

// Ends the program when the stream is not done in time or has failed: a hung kernel leaves nothing that could be used.
void finish_or_exit(cudaStream_t stream, double seconds, const std::string& label);

bool probe_im2col();
void time_everything(const std::vector<laco::GemmTile>& chosen);
