// Activations as integers.
#pragma once

#include <cmath>

#include "trellis_tables.h"

namespace nashswarm {
namespace {

constexpr float LEAST = 1e-30f;  // lower bound for the largest activation of 64 columns: keeps its inverse finite

// Writes the integers of one row of x.
template <class Set, int COUNT>
void round_row(const TrellisProduct& job, const Tables& tables, int64_t row) {
    // Every digit stays within -128 … 127, even if rounding enlarges the largest activation by an eighth of a millionth.
    constexpr float LEVELS = COUNT == 1 ? 127 : 127 * (1 + 256 + 65536) - 8;
    const Trellis& matrix = job.matrix;
    const int64_t rounded = matrix.rounded();
    const float* x = job.x + row * matrix.columns;
    bool all_finite = true;
    for (int64_t number = 0; number < rounded; ++number) {
        const int64_t begin = number * ROUNDED, side = row * rounded + number;
        const int left = int(matrix.columns - begin < ROUNDED ? matrix.columns - begin : ROUNDED);
        alignas(64) float values[ROUNDED];
        Set::read_inputs(matrix, x, begin, left, tables, values);
        int32_t bits[ROUNDED], pattern = 0;  // bit patterns of magnitudes: ordered like the floats, with nan above all
        std::memcpy(bits, values, sizeof bits);
        for (int place = 0; place < ROUNDED; ++place) {
            const int32_t own = bits[place] & 0x7fffffff;
            pattern = own > pattern ? own : pattern;
        }
        float largest;
        std::memcpy(&largest, &pattern, sizeof largest);
        const bool finite = pattern < 0x7f800000;
        all_finite &= finite;
        if (!finite || largest < LEAST) largest = LEAST;
        if (!finite) std::memset(values, 0, sizeof values);
        const float inverse = LEVELS / largest;
        int32_t rest[ROUNDED];
        for (int place = 0; place < ROUNDED; ++place) {
            const float scaled = values[place] * inverse;
            rest[place] = int32_t(scaled + std::copysign(0.5f, scaled));
        }
        for (int digit = 0; digit < COUNT; ++digit) {
            int8_t* digits = job.activations.digits + (side * COUNT + digit) * ROUNDED;
            for (int place = 0; place < ROUNDED; ++place) {
                digits[place] = int8_t(rest[place]);
                rest[place] = (rest[place] - digits[place]) / 256;
            }
            if (Set::OFFSET) Set::find_bases(digits, job.activations.bases + (side * COUNT + digit) * (ROUNDED / 4));
        }
        job.activations.steps[side] = largest / LEVELS;
    }
    job.activations.extras[row] = all_finite ? 0.0f : NAN;
}

}  // namespace
}  // namespace nashswarm
