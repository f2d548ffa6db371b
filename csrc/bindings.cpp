// laco_kernels._cuda: pointers, sizes and a stream in; None or what is wrong out. Importing it touches no GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "operands.h"
#include "plan.h"
#include "problem.h"
#include "schedule.h"

namespace py = pybind11;
using namespace py::literals;
using namespace laco;

namespace {

const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* writable(uintptr_t address) { return reinterpret_cast<void*>(address); }

Tokens make_tokens(const std::vector<uintptr_t>& sources, int batch, int height, int width, int64_t stride_b, int64_t stride_t,
                   int side, int channels) {
  Tokens t{};
  t.num_sources = int(std::min<size_t>(sources.size(), MAX_SOURCES + 1));  // too many are refused later
  std::transform(sources.begin(), sources.begin() + std::min(t.num_sources, MAX_SOURCES), t.sources, pointer);
  t.batch = batch, t.height = height, t.width = width, t.stride_b = stride_b, t.stride_t = stride_t;
  t.side = side, t.channels = channels;
  return t;
}

Forward make_forward(int element, const Tokens& x, uintptr_t weight, uintptr_t bias, int n, int activation, uintptr_t out,
                     int out_prefix, uintptr_t pre, int residual_kind, const Tokens& residual, bool residual_block) {
  return {Element(element), x, pointer(weight), pointer(bias), n, Activation(activation), writable(out), out_prefix, writable(pre),
          Residual(residual_kind), residual, residual_block};
}

InputGradient make_input_gradient(int element, const Tokens& gradient, uintptr_t weight, int side, int channels, uintptr_t pre,
                                  int activation, uintptr_t act, uintptr_t sums, uintptr_t out, int out_prefix, int height,
                                  int width, int residual_kind, const Tokens& residual_gradient) {
  return {Element(element), gradient, pointer(weight), side, channels, pointer(pre), Activation(activation), writable(act),
          static_cast<float*>(writable(sums)), writable(out), out_prefix, height, width, Residual(residual_kind),
          residual_gradient};
}

WeightGradient make_weight_gradient(int element, const Tokens& gradient, const Tokens& x, uintptr_t out) {
  return {Element(element), gradient, x, writable(out)};
}

#ifdef LACO_AMPERE
constexpr bool HAS_AMPERE = true;
const char* ampere(const Forward& q, const Launch& how) { return forward_ampere(q, how); }
const char* ampere(const InputGradient& q, const Launch& how) { return input_gradient_ampere(q, how); }
const char* ampere(const WeightGradient& q, const Launch& how) { return weight_gradient_ampere(q, how); }
#else
constexpr bool HAS_AMPERE = false;
template <class Problem>
const char* ampere(const Problem&, const Launch&) { return "not built for this GPU's architecture"; }
#endif

#ifdef LACO_HOPPER
constexpr bool HAS_HOPPER = true;
// Asked for once a device, which is the current one.
Machine machine_of(int device, int multiprocessors) {
  static std::mutex mutex;
  static std::map<int, Machine> known;
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  if (found != known.end() && found->second.multiprocessors == multiprocessors) return found->second;
  return known[device] = {multiprocessors, clusters_at_once(2), clusters_at_once(4)};
}
const char* hopper(const GemmTile& tile, const Forward& q, const Launch& how) { return tile.forward(q, how); }
const char* hopper(const GemmTile& tile, const InputGradient& q, const Launch& how) { return tile.input_gradient(q, how); }
const char* hopper(const GemmTile& tile, const WeightGradient& q, const Launch& how) { return tile.weight_gradient(q, how); }
#else
constexpr bool HAS_HOPPER = false;
Machine machine_of(int, int multiprocessors) { return {multiprocessors, 0, 0}; }
template <class Problem>
const char* hopper(const GemmTile&, const Problem&, const Launch&) { return "not built for this GPU's architecture"; }
#endif

const GemmTile* find_tile(const std::string& name) {
  for (const GemmTile& tile : TILES) {
    if (name == tile.name) return &tile;
  }
  return nullptr;
}

// `tile`: a name of TILES, "ampere", or "" for what suits; `splits` 0 for what suits. The device stays the current one.
template <class Problem>
const char* run(const Problem& q, const std::string& tile, int splits, bool dependent, int device, uintptr_t stream) {
  if (const char* error = refusal(q)) return error;
  // This library has a CUDA runtime of its own, which need not know what device another one made current.
  int multiprocessors = 0, major = 0;
  if (cudaSetDevice(device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    return cudaGetErrorString(cudaGetLastError());
  }
  if (major < 8) return "the GPU must have compute capability 8.0 or newer";
  Launch how{reinterpret_cast<cudaStream_t>(stream), 1, dependent && major >= 9};
  if (tile == "ampere" || (tile.empty() && (major != 9 || !HAS_HOPPER))) return ampere(q, how);
  if (major != 9) return "this tile needs a GPU of compute capability 9.0";
  const GemmTile* wanted = find_tile(tile);
  how.splits = splits ? splits : 1;
  if (tile.empty()) {
    const Plan chosen = plan(q, machine_of(device, multiprocessors));
    wanted = chosen.tile;
    if (!splits) how.splits = chosen.splits;
  }
  if (wanted == nullptr) return "no tile of that name";
  if (const char* error = refusal(q, *wanted, how.splits)) return error;
  return hopper(*wanted, q, how);
}

const char* problem() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? nullptr : cudaGetErrorString(cudaGetLastError());
}

void throw_if(const char* error) {
  if (error) throw std::invalid_argument(error);
}

const GemmTile& tile_named(const std::string& name) {
  const GemmTile* tile = find_tile(name);
  throw_if(tile ? nullptr : "no tile of that name");
  return *tile;
}

std::vector<std::pair<int, int>> schedule(const std::string& name, int m, int columns, int block, int blocks) {
  const GemmTile& tile = tile_named(name);
  throw_if(m < 0 || m >= MOST || columns < 0 || columns >= MOST ? "sizes must be positive and below 2^30" : nullptr);
  throw_if(block < 0 || blocks <= block ? "there must be more blocks than the number of one" : nullptr);
  const int rows = (m + tile.bm - 1) / tile.bm, across = (columns + tile.bn - 1) / tile.bn;
  throw_if(int64_t(rows) * across >= int64_t(1) << 31 ? "too many tiles" : nullptr);
  const Schedule order(rows, across, GROUP);
  std::vector<std::pair<int, int>> found;
  for (int i = block; i < order.tiles(); i += blocks) {
    int row, column;
    order.find(i, row, column);
    found.emplace_back(row * tile.bm, column * tile.bn);
  }
  return found;
}

uintptr_t address_of(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

py::dict to_dict(const Plan& p) {
  return py::dict("tile"_a = p.tile->name, "splits"_a = p.splits, "tiles"_a = p.tiles, "waves"_a = p.waves,
                  "microseconds"_a = p.microseconds);
}

py::dict to_dict(const Rows& r) {
  return py::dict("im2col"_a = bool(r.im2col), "per_image"_a = r.per_image, "out_width"_a = r.out_width, "side"_a = r.side);
}

py::dict to_dict(const Map& m) {
  return py::dict("base"_a = address_of(m.base), "sizes"_a = std::vector(m.sizes, m.sizes + m.rank),
                  "strides"_a = std::vector(m.strides, m.strides + std::max(m.rank - 1, 0)),
                  "box"_a = std::vector(m.box, m.box + (m.side ? 2 : m.rank)), "side"_a = m.side);
}

py::dict to_dict(const Image& i) {
  return py::dict("base"_a = address_of(i.base), "stride_b"_a = i.stride_b, "stride_t"_a = i.stride_t,
                  "per_image"_a = i.per_image, "out_width"_a = i.out_width, "height"_a = i.height, "width"_a = i.width,
                  "side"_a = i.side, "channels"_a = i.channels);
}

// What a kernel of this tile is told; maps that there are none of are left out.
template <class Problem>
py::dict operands(const Problem& q, const std::string& name, int splits) {
  const GemmTile& tile = tile_named(name);
  throw_if(refusal(q));
  throw_if(refusal(q, tile, splits));
  const auto [p, maps, copied] = describe(q, tile.bm, tile.bn, splits);
  py::list sources;
  for (int i = 0; i < p.sources_count; ++i) sources.append(to_dict(maps.sources[i]));
  py::dict found("sources"_a = sources, "rows"_a = to_dict(p.rows), "other_rows"_a = to_dict(p.other_rows),
                 "added_rows"_a = to_dict(p.added_rows), "residual"_a = to_dict(p.residual), "grid"_a = to_dict(p.grid),
                 "out_tokens"_a = address_of(p.out_tokens), "bias"_a = address_of(p.bias), "sums"_a = address_of(p.sums),
                 "out_prefix"_a = p.out_prefix, "residual_kind"_a = int(p.residual_kind), "m"_a = p.m, "n"_a = p.n,
                 "columns"_a = p.columns, "steps"_a = p.steps, "channel_steps"_a = p.channel_steps, "taps"_a = p.taps,
                 "chunks_a_tap"_a = p.chunks_a_tap, "splits"_a = p.splits, "has_second"_a = bool(p.has_second),
                 "copied"_a = copied);
  const std::pair<const char*, const Map*> others[] = {
      {"other", &maps.other}, {"out", &maps.out}, {"second", &maps.second}, {"added", &maps.added}};
  for (const auto& [key, map] : others) {
    if (map->rank) found[key] = to_dict(*map);
  }
  return found;
}

// A product's three functions: launch it, and the host logic, which needs no GPU.
template <class Problem, class... Values, class... Names>
void define(py::module_& module, const std::string& name, const char* what, Problem (*make)(Values...), const Names&... names) {
  module.def(
      name.c_str(),
      [make](Values... values, const std::string& tile, int splits, bool dependent, int device, uintptr_t stream) {
        return run(make(values...), tile, splits, dependent, device, stream);
      },
      what, py::kw_only(), names..., "tile"_a = "", "splits"_a = 0, "dependent"_a = false, "device"_a = 0, "stream"_a = 0);
  module.def(
      (name + "_plan").c_str(),
      [make](Values... values, int multiprocessors, int pairs, int quads) {
        const Problem q = make(values...);
        throw_if(refusal(q));
        throw_if(multiprocessors < 1 || pairs < 0 || quads < 0 ? "a GPU has multiprocessors" : nullptr);
        return to_dict(plan(q, Machine{multiprocessors, pairs, quads}));
      },
      "The tile, the blocks that share its depth, tiles and waves on a Hopper GPU of so many multiprocessors, on which so many "
      "clusters of two and of four blocks run at once.",
      py::kw_only(), names..., "multiprocessors"_a, "pairs"_a, "quads"_a);
  module.def(
      (name + "_operands").c_str(),
      [make](Values... values, const std::string& tile, int splits) { return operands(make(values...), tile, splits); },
      "What a Hopper kernel is told, before tensor maps are encoded: csrc/operands.h.", py::kw_only(), names..., "tile"_a,
      "splits"_a = 1);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The matrix products of csrc/, free of torch.";
  const Tokens none{};
  // Of this module alone: the emulated one of the tests has another of the same name.
  py::class_<Tokens>(module, "Tokens", py::module_local(), "Where an operand's rows lie, see csrc/problem.h.")
      .def(py::init(&make_tokens), py::kw_only(), "sources"_a, "batch"_a, "height"_a = 1, "width"_a, "stride_b"_a, "stride_t"_a,
           "side"_a = 1, "channels"_a)
      .def_property_readonly("rows", [](const Tokens& t) { return throw_if(refusal(t)), t.rows(); })
      .def_property_readonly("depth", [](const Tokens& t) { return throw_if(refusal(t)), t.depth(); });
  define(module, "forward", "Launch out = act(x weight^T + bias) + residual, a Forward of csrc/problem.h; None or what is wrong.",
         make_forward, "element"_a, "x"_a, "weight"_a, "bias"_a = 0, "n"_a, "activation"_a = 0, "out"_a, "out_prefix"_a = 0,
         "pre"_a = 0, "residual_kind"_a = 0, "residual"_a = none, "residual_block"_a = false);
  define(module, "input_gradient", "Launch an InputGradient of csrc/problem.h; None or what is wrong.", make_input_gradient,
         "element"_a, "gradient"_a, "weight"_a, "side"_a = 1, "channels"_a, "pre"_a = 0, "activation"_a = 0, "act"_a = 0,
         "sums"_a = 0, "out"_a, "out_prefix"_a = 0, "height"_a = 1, "width"_a, "residual_kind"_a = 0,
         "residual_gradient"_a = none);
  define(module, "weight_gradient", "Launch a WeightGradient of csrc/problem.h; None or what is wrong.", make_weight_gradient,
         "element"_a, "gradient"_a, "x"_a, "out"_a);
  module.def("problem", problem, "What keeps the CUDA runtime from this machine's GPUs, or None.");
  module.def("sums_bytes", laco::sums_bytes, "Bytes of the column sums of an input gradient, the only workspace.", "rows"_a,
             "channels"_a);
  module.def("schedule", schedule, "The first (row, column) of the tiles that one of `blocks` blocks works on, in order.", "tile"_a,
             "m"_a, "columns"_a, "block"_a, "blocks"_a);
  py::dict tiles;  // by name: rows, columns, whether its depth may be shared, microseconds a wave, whether these were measured
  for (const GemmTile& tile : TILES) tiles[tile.name] = py::make_tuple(tile.bm, tile.bn, tile.splits, tile.wave, tile.measured);
  module.attr("TILES") = tiles;
  std::vector<std::string> architectures;
  if (HAS_AMPERE) architectures.push_back("80");
  if (HAS_HOPPER) architectures.push_back("90a");
  module.attr("ARCHITECTURES") = architectures;
  module.attr("SUM_ROWS") = SUM_ROWS;
}
