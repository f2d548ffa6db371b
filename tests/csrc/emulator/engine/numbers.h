// The two 16-bit types as float.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulator {

template <bool HALF>
inline float to_float(uint32_t bits) {
  if constexpr (HALF) {
    const auto low = static_cast<uint16_t>(bits);
    _Float16 x;
    std::memcpy(&x, &low, 2);
    return static_cast<float>(x);
  } else {
    bits <<= 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
}

}  // namespace emulator
