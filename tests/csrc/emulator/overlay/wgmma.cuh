// In place of csrc's wgmma.cuh, whose descriptors come first: build.py puts here what of it is no assembly.
#pragma once

#include "instructions.h"
#include "wgmma_plain.cuh"

namespace laco::wgmma {

inline void fence() { emulator::product_fence(); }
inline void commit() { emulator::product_commit(); }
inline void wait_previous() { emulator::product_wait(1); }
inline void wait_all() { emulator::product_wait(0); }

// Nothing moves in front of the emulator's functions, which the compiler cannot see into.
template <int SIZE>
void keep(float (&)[SIZE]) {}

template <Element ELEMENT, bool A_MN, bool B_MN, int SIZE>
void multiply(float (&d)[SIZE], uint64_t a, uint64_t b, int accumulate) {
  static_assert(SIZE % 8 == 0 && SIZE >= 32 && SIZE <= 128);
  emulator::product(ELEMENT == Element::float16, A_MN, B_MN, d, 2 * SIZE, a, b, accumulate != 0);
}

}  // namespace laco::wgmma
