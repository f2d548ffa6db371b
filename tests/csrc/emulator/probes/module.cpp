// The module `_emulator`, in the same library as `_cuda`: what a test can choose, and probes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "probes.h"
#include "settings.h"

namespace py = pybind11;
using namespace py::literals;
using emulator::settings, emulator::statistics, emulator::Timing;

namespace {

Timing timing(const std::string& name) {
  if (name == "early") return Timing::early;
  if (name == "late") return Timing::late;
  if (name == "mixed") return Timing::mixed;
  if (name == "any") return Timing::any;
  throw std::invalid_argument("timing: got '" + name + "', expected early, late, mixed or any");
}

void choose(uint64_t seed, int multiprocessors, std::pair<int, int> capability, int devices, const std::string& copies,
            const std::string& products, const std::string& stores) {
  settings = {seed,           devices,          multiprocessors, capability.first, capability.second,
              timing(copies), timing(products), timing(stores)};
  statistics = {};
}

}  // namespace

PYBIND11_MODULE(_emulator, module) {
  module.doc() = "The GPU that csrc's kernels run on here.";
  module.def(
      "choose", choose,
      "Choose the device and the order of what happens at the same time: `seed` draws it, anew for every launch from this "
      "one on. `copies`, `products` and `stores` happen as `early` or as `late` as they may, `mixed`, or `any` of these.",
      "seed"_a = 0, "multiprocessors"_a = 132, "capability"_a = std::pair(9, 0), "devices"_a = 1, "copies"_a = "any",
      "products"_a = "any", "stores"_a = "any");
  module.def(
      "statistics",
      [] {
        py::dict found;
        found["launches"] = statistics.launches, found["switches"] = statistics.switches, found["events"] = statistics.events;
        return found;
      },
      "Launches, switches from thread to thread and events since the last choice.");

  module.def("run", probes::run, "Each thread follows its steps; what is wrong, and (thread, value) of every note.",
             "programs"_a, "blocks"_a = 1, "memory"_a = 0);
  module.def(
      "encode",
      [](uintptr_t address, int element_bytes, const std::vector<uint64_t>& sizes, const std::vector<uint64_t>& strides,
         const std::vector<uint32_t>& box, const std::vector<uint32_t>& steps, const std::vector<int>& corners, bool swizzled) {
        return py::bytes(probes::encode(address, element_bytes, sizes, strides, box, steps, corners, swizzled));
      },
      "A tensor map, empty if the encoder refuses.", py::kw_only(), "address"_a, "element_bytes"_a = 2, "sizes"_a, "strides"_a,
      "box"_a, "steps"_a, "corners"_a = std::vector<int>{}, "swizzled"_a = true);
  module.def("move_box", probes::move_box, "Load a box into `memory`, as it lies in shared memory, or store one from there.",
             py::kw_only(), "map"_a, "at"_a, "offsets"_a = std::vector<int>{}, "bytes"_a, "memory"_a, "store"_a = false);
  module.def("product", probes::product, "64 of depth by wgmma.", py::kw_only(), "half"_a, "a_mn"_a, "b_mn"_a, "n"_a,
             "operands"_a, "d"_a, "accumulate"_a);
  module.def("warp_product", probes::warp_product, "mma.m16n8k16 of 32 lanes' registers.", "half"_a, "a"_a, "b"_a, "d"_a);
  module.def("matrices", probes::matrices, "Four 8 x 8 matrices through ldmatrix, and back by stmatrix.", "source"_a,
             "registers"_a, "stored"_a, "transposed"_a);
}
