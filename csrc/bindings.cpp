// laco_kernels._cuda: pointers, sizes and a stream in; None or what is wrong out. Importing it touches no GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "hopper_gemm.h"
#include "schedule.h"

namespace py = pybind11;
using laco::GemmProblem, laco::GemmTile;

namespace {

const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }

const char* gemm(int element, const std::vector<uintptr_t>& sources, int batch, int height, int width, int64_t stride_b, int64_t stride_t,
                 int side, int channels, uintptr_t weight, uintptr_t bias, int n, int activation, uintptr_t out,
                 int out_prefix, uintptr_t pre, uintptr_t residual, int64_t residual_stride_b, int64_t residual_stride_t,
                 int residual_height, int residual_width, int residual_side, bool residual_block, int device, uintptr_t stream) {
  GemmProblem q{};
  if (sources.empty() || sources.size() > std::size(q.sources)) return "there must be 1 to 8 sources";
  std::transform(sources.begin(), sources.end(), q.sources, pointer);
  q.num_sources = int(sources.size());
  q.batch = batch, q.height = height, q.width = width, q.stride_b = stride_b, q.stride_t = stride_t;
  q.element = static_cast<laco::Element>(element), q.side = side, q.channels = channels;
  q.weight = pointer(weight), q.bias = pointer(bias), q.n = n, q.activation = activation;
  q.out = const_cast<void*>(pointer(out)), q.out_prefix = out_prefix, q.pre = const_cast<void*>(pointer(pre));
  q.residual = pointer(residual), q.residual_stride_b = residual_stride_b, q.residual_stride_t = residual_stride_t;
  q.residual_height = residual_height, q.residual_width = residual_width;
  q.residual_side = residual_side, q.residual_block = residual_block;
  if (const char* error = laco::refusal(q)) return error;
  if (batch == 0 || n == 0) return nullptr;
  // This library has a CUDA runtime of its own, which need not know what device another one made current.
  int multiprocessors = 0;
  if (cudaSetDevice(device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return cudaGetErrorString(cudaGetLastError());
  }
  return laco::choose_tile(q.rows() * batch, n, multiprocessors).launch(q, reinterpret_cast<cudaStream_t>(stream));
}

const char* problem() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? nullptr : cudaGetErrorString(cudaGetLastError());
}

const GemmTile& tile_named(const std::string& name) {
  for (const GemmTile& tile : laco::TILES) {
    if (name == tile.name) return tile;
  }
  throw std::invalid_argument("no tile of that name");
}

std::vector<std::pair<int, int>> schedule(const std::string& name, int m, int n, int block, int blocks) {
  const GemmTile& tile = tile_named(name);
  const laco::Schedule order((m + tile.bm - 1) / tile.bm, (n + tile.bn - 1) / tile.bn, laco::GROUP);
  std::vector<std::pair<int, int>> found;
  for (int i = block; i < order.tiles(); i += blocks) {
    int row, column;
    order.find(i, row, column);
    found.emplace_back(row * tile.bm, column * tile.bn);
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The Hopper matrix product of csrc/, free of torch.";
  module.def("gemm", gemm, "Launch out = act(A weight^T + bias) + residual, see csrc/hopper_gemm.h; None or what is wrong.",
             py::kw_only(), py::arg("element") = 0, py::arg("sources"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("stride_b"),
             py::arg("stride_t"), py::arg("side") = 1, py::arg("channels"), py::arg("weight"),
             py::arg("bias") = 0, py::arg("n"), py::arg("activation") = 0, py::arg("out"), py::arg("out_prefix") = 0,
             py::arg("pre") = 0, py::arg("residual") = 0, py::arg("residual_stride_b") = 0, py::arg("residual_stride_t") = 0,
             py::arg("residual_height") = 0, py::arg("residual_width") = 0, py::arg("residual_side") = 2,
             py::arg("residual_block") = false, py::arg("device") = 0, py::arg("stream") = 0);
  module.def("problem", problem, "What keeps the CUDA runtime from this machine's GPUs, or None.");
  module.def(
      "choose_tile", [](int64_t m, int64_t n, int multiprocessors) { return laco::choose_tile(m, n, multiprocessors).name; },
      "The name of the tile for a result [m, n].", py::arg("m"), py::arg("n"), py::arg("multiprocessors"));
  module.def("schedule", schedule, "The first (row, column) of the tiles that one of `blocks` blocks works on, in order.",
             py::arg("tile"), py::arg("m"), py::arg("n"), py::arg("block"), py::arg("blocks"));
  py::dict tiles;
  for (const GemmTile& tile : laco::TILES) tiles[tile.name] = py::make_tuple(tile.bm, tile.bn, tile.wave);
  module.attr("TILES") = tiles;
}
