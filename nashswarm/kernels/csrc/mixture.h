// The experts of many tokens: a tile of tokens passes through both matrices of its expert while they are in cache.
#pragma once

#include <cstdint>

namespace nashswarm {

// The tokens of one expert.  An assignment is a token times k plus the rank of the expert among the token's k.
struct MixtureTile {
    const float *x, *up, *down;  // tokens × width, hidden × width, width × hidden
    const float* gates;          // one an assignment
    const int64_t* assignments;
    int64_t count, k, width, hidden;
    float* outputs;  // assignments × width: gate · down · gelu(up · x)
};

struct MixtureSteps {
    int64_t tokens;  // of a tile at most
    void (*compute)(const MixtureTile& tile, float* scratch);  // scratch: tokens · (width + hidden), aligned to 64 bytes
};

extern const MixtureSteps mixture_portable, mixture_avx2, mixture_avx512;

}  // namespace nashswarm
