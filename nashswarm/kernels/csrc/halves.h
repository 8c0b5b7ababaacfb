// Conversion of half-precision floats without hardware support.
#pragma once

#include <cstdint>
#include <cstring>

namespace nashswarm {
namespace {

inline float to_single(uint16_t half) {
    const uint32_t rest = half & 0x7fff;
    const uint32_t bits = rest >= 0x7c00 ? 0x7f800000 | rest << 13 : (rest << 13) + (112u << 23);
    float value = 0.0f;
    std::memcpy(&value, &bits, 4);
    if (rest < 0x0400) value = float(rest) / float(1 << 24);  // subnormal
    return half & 0x8000 ? -value : value;
}

}  // namespace
}  // namespace nashswarm
