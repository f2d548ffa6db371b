// What a test can choose.
#pragma once

#include <cstdint>

namespace emulator {

enum class Timing { early, late, mixed, any };

struct Settings {
  uint64_t seed = 0;
  int devices = 1, multiprocessors = 132, major = 9, minor = 0;
  // When the copy engine's loads and cp.async arrive, products are computed, and the copy engine reads what it stores.
  Timing copies = Timing::any, products = Timing::any, stores = Timing::any;
};

extern Settings settings;

struct Statistics {
  uint64_t launches = 0, switches = 0, events = 0;
};

extern Statistics statistics;

}  // namespace emulator
