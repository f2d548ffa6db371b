// What one im2col copy brings into shared memory: pixels carry their own number, so that a wrong one names where it came from.
#include <cstdio>

#include "hopper_launch.cuh"
#include "test_hopper.h"

namespace {

constexpr int PIXELS = 128;

__global__ void probe_kernel(const __grid_constant__ CUtensorMap map, int c, int x, int y, int b, int dx, int dy, uint16_t* out) {
  extern __shared__ char shared[];
  const uint32_t base = (laco::ptx::shared_address(shared) + 1023) / 1024 * 1024, barrier = base + PIXELS * 128;
  if (threadIdx.x == 0) {
    laco::ptx::barrier_init(barrier, 1);
    laco::ptx::barrier_init_fence();
    laco::ptx::barrier_expect(barrier, PIXELS * 128);
    laco::ptx::load_im2col(&map, barrier, base, c, x, y, b, dx, dy);
  }
  __syncthreads();
  laco::ptx::barrier_wait(barrier, 0, "probe", 0);
  // Element 0 of pixel row r, behind the swizzle: 16-byte piece 0 lies at piece r % 8.
  const int r = threadIdx.x;
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(base + r * 128 + (r % 8) * 16));
  out[r] = value;
}

bool probe(int batch, int height, int width, int side, int prefix, int m0, int tap) {
  const int channels = 64, tokens = height * width + prefix, line = (width + side - 1) / side;
  const int rows = line * ((height + side - 1) / side);
  std::vector<uint16_t> x(size_t(batch) * tokens * channels, 0xFFFF);
  for (int b = 0; b < batch; ++b) {
    for (int t = 0; t < height * width; ++t) {
      for (int c = 0; c < channels; ++c) {
        x[(size_t(b) * tokens + prefix + t) * channels + c] = uint16_t(1 + b * height * width + t);
      }
    }
  }
  uint16_t *device_x, *device_out, out[PIXELS];
  cudaMalloc(&device_x, x.size() * 2), cudaMalloc(&device_out, sizeof out);
  cudaMemcpy(device_x, x.data(), x.size() * 2, cudaMemcpyHostToDevice);
  CUtensorMap map;
  char label[160];
  snprintf(label, sizeof label, "im2col %d images of %dx%d, side %d, prefix %d, row %d, tap %d", batch, height, width, side, prefix,
           m0, tap);
  if (!laco::encode_im2col(&map, laco::Element::bfloat16, device_x + prefix * channels, channels, width, height, batch, channels, int64_t(tokens) * channels,
                           side, PIXELS)) {
    printf("FAIL %s: no tensor map\n", label);
    return false;
  }
  cudaStream_t stream;
  cudaStreamCreate(&stream);
  const int q = m0 % rows;
  const int shared = PIXELS * 128 + 2048;
  probe_kernel<<<1, PIXELS, shared, stream>>>(map, 0, q % line * side, q / line * side, m0 / rows, tap % side, tap / side,
                                             device_out);
  finish_or_exit(stream, 2, label);
  cudaMemcpy(out, device_out, sizeof out, cudaMemcpyDeviceToHost);
  int wrong = 0;
  for (int r = 0; r < PIXELS; ++r) {
    const int m = m0 + r, b = m / rows, i = m % rows, py = i / line * side + tap / side, px = i % line * side + tap % side;
    const bool inside = b < batch && py < height && px < width;
    const int expected = inside ? 1 + b * height * width + py * width + px : 0;
    if (out[r] == expected) continue;
    if (++wrong <= 12) printf("    row %d (image %d, y %d, x %d): got pixel %d, expected %d\n", r, b, py, px, out[r], expected);
  }
  printf("%s %s: %d rows wrong\n", wrong ? "FAIL" : "PASS", label, wrong);
  fflush(stdout);
  cudaFree(device_x), cudaFree(device_out), cudaStreamDestroy(stream);
  return wrong == 0;
}

}  // namespace

bool probe_im2col() {
  bool good = true;
  good &= probe(1, 24, 24, 2, 0, 0, 0);
  for (int tap = 0; tap < 4; ++tap) good &= probe(3, 24, 24, 2, 0, 128, tap);
  for (int tap = 0; tap < 4; ++tap) good &= probe(3, 27, 27, 2, 1, 128, tap);
  good &= probe(3, 5, 7, 2, 1, 0, 3);
  good &= probe(2, 27, 27, 2, 0, 384, 3);  // ends behind the last image
  for (int tap = 0; tap < 9; ++tap) good &= probe(3, 26, 25, 3, 1, 128, tap);
  good &= probe(3, 1, 576, 1, 1, 512, 0);  // rows of a sequence behind a class token
  return good;
}
