// A tile of tokens through its expert: the algorithm, included once for each instruction set.  Tokens lie across the
// registers, so that a weight is read once, where it is stored, and multiplies all tokens of the tile.
#pragma once

#include "decoder_steps.h"
#include "mixture.h"

namespace nashswarm {
namespace {

constexpr int WIDE = LANES == 16 ? 4 : 2;  // registers of tokens
constexpr int SUMS = LANES == 16 ? 24 : 8;  // registers of sums, so that all registers of the processor are used

// Adds up `count` rows of weights times the tokens, `size` numbers of each.
template <int REGISTERS, int COUNT>
ALWAYS_INLINE void multiply_rows(const float* weights, int64_t size, const float* tokens, float* out) {
    Vec sums[COUNT][REGISTERS] = {};
    for (int64_t place = 0; place < size; ++place) {
        __builtin_prefetch(weights + COUNT * size + place * COUNT);  // the rows after these: weights are read once
        Vec own[REGISTERS];
        for (int part = 0; part < REGISTERS; ++part) own[part] = load(tokens + (place * REGISTERS + part) * LANES);
        for (int row = 0; row < COUNT; ++row)
            for (int part = 0; part < REGISTERS; ++part) sums[row][part] += own[part] * weights[row * size + place];
    }
    for (int row = 0; row < COUNT; ++row)
        for (int part = 0; part < REGISTERS; ++part) store(out + (row * REGISTERS + part) * LANES, sums[row][part]);
}

template <int REGISTERS>
ALWAYS_INLINE void multiply_tokens(const float* weights, int64_t rows, int64_t size, const float* tokens, float* out) {
    constexpr int ROWS = SUMS / REGISTERS < 8 ? SUMS / REGISTERS : 8;
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS)
        multiply_rows<REGISTERS, ROWS>(weights + row * size, size, tokens, out + row * REGISTERS * LANES);
    for (; row < rows; ++row)
        multiply_rows<REGISTERS, 1>(weights + row * size, size, tokens, out + row * REGISTERS * LANES);
}

template <int REGISTERS>
void compute_registers(const MixtureTile& tile, float* scratch) {
    constexpr int64_t TOKENS = REGISTERS * LANES;
    float *across = scratch, *inner = scratch + tile.width * TOKENS;
    for (int64_t token = 0; token < TOKENS; ++token) {  // the last ones again, where there are fewer
        const int64_t assignment = tile.assignments[token < tile.count ? token : tile.count - 1];
        const float* own = tile.x + assignment / tile.k * tile.width;
        for (int64_t place = 0; place < tile.width; ++place) across[place * TOKENS + token] = own[place];
    }
    multiply_tokens<REGISTERS>(tile.up, tile.hidden, tile.width, across, inner);
    for (int64_t place = 0; place < tile.hidden * TOKENS; place += LANES) {
        const Vec x = load(inner + place);
        store(inner + place, x / (1.0f + exp_of((x + x * x * x * 0.044715f) * -1.5957691216f)));
    }
    multiply_tokens<REGISTERS>(tile.down, tile.width, tile.hidden, inner, across);
    for (int64_t token = 0; token < tile.count; ++token) {
        const int64_t assignment = tile.assignments[token];
        float *out = tile.outputs + assignment * tile.width, gate = tile.gates[assignment];
        for (int64_t place = 0; place < tile.width; ++place) out[place] = gate * across[place * TOKENS + token];
    }
}

void compute_tile(const MixtureTile& tile, float* scratch) {
    if (tile.count <= LANES) return compute_registers<1>(tile, scratch);
    if (tile.count <= 2 * LANES) return compute_registers<2>(tile, scratch);
    if constexpr (WIDE == 4) {
        if (tile.count <= 3 * LANES) return compute_registers<3>(tile, scratch);
        compute_registers<4>(tile, scratch);
    }
}

constexpr MixtureSteps MIXTURE_OF_SET{WIDE * LANES, compute_tile};

}  // namespace
}  // namespace nashswarm
