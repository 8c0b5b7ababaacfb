// Before and after a product: numbers of x in the stored order, and rows turned back, scaled and put into their places.
#pragma once

#include "trellis_tables.h"

namespace nashswarm {
namespace {

// The factors of the rows of a group: their sizes before, and their scales after they are turned.
struct RowFactors {
    alignas(64) float sizes[GROUP_ROWS], scales[GROUP_ROWS];
    int32_t order[GROUP_ROWS];  // their places in y
};

// What a set does with indices and with the rows of a group, unless it knows better.
template <class Set>
struct AnySet {
    static constexpr int TOGETHER = 1;  // rows of x that are multiplied together, as far as registers reach
    static void finish_table(uint8_t*, int) {}
    template <int BITS, int MASK, class Codes>
    ALWAYS_INLINE static Codes index(const Codes& chosen, const Codes& rest) {
        if constexpr (MASK == 0xff) return chosen;
        else return Set::template merge<MASK>(chosen, rest);
    }

    // Reads `left` numbers of a row of x from a place of the stored order on, times the column scales.
    static void read_inputs(const Trellis& matrix, const float* x, int64_t begin, int left, const Tables& tables,
                            float* values) {
        for (int place = 0; place < left; ++place)
            values[place] = x[matrix.column_at(begin + place)] * tables.column_scale[matrix.column_scale[begin + place]];
        for (int place = left; place < ROUNDED; ++place) values[place] = 0.0f;
    }
    // What sums of products with values plus OFFSET start from, for each quad of digits.
    static void find_bases(const int8_t* digits, int32_t* bases) {
        for (int quad = 0; quad < ROUNDED / 4; ++quad) {
            const int8_t* own = digits + 4 * quad;
            bases[quad] = -Set::OFFSET * (own[0] + own[1] + own[2] + own[3]);
        }
    }
    // Reads the factors of the first `left` rows of a group, from its codes.
    static void read_factors(const uint8_t* sizes, const uint8_t* scales, int64_t left, float common, const Tables& tables,
                             RowFactors& factors) {
        for (int row = 0; row < GROUP_ROWS; ++row) {
            factors.sizes[row] = tables.row_size[sizes[row / 2] >> row % 2 * 4 & 15];
            factors.scales[row] = row < left ? common * tables.row_scale[scales[row]] : 0.0f;
        }
    }
    static void sum_quads(const float* totals, float* sums) {
        for (int row = 0; row < GROUP_ROWS; ++row) {
            const float* quads = totals + 4 * row;
            sums[row] = (quads[0] + quads[2]) + (quads[1] + quads[3]);
        }
    }
    template <int APART>
    ALWAYS_INLINE static void turn_pairs(float* rows) {
        for (int block = 0; block < GROUP_ROWS; block += 2 * APART)
            for (int row = block; row < block + APART; ++row) {
                const float low = rows[row], high = rows[row + APART];
                rows[row] = low + high;
                rows[row + APART] = low - high;
            }
    }
    // The Hadamard transform, times 8.
    static void turn(float* rows) {
        turn_pairs<1>(rows);
        turn_pairs<2>(rows);
        turn_pairs<4>(rows);
        turn_pairs<8>(rows);
        turn_pairs<16>(rows);
        turn_pairs<32>(rows);
    }
};

template <class Set>
ALWAYS_INLINE void read_factors(const Trellis& matrix, const Tables& tables, int64_t group, RowFactors& factors) {
    const int64_t first = group * GROUP_ROWS;
    const float common = matrix.scale / (UNIT * (matrix.rotated ? 8 : 1));
    Set::read_factors(matrix.row_size + first / 2, matrix.row_scale + first, matrix.rows - first, common, tables, factors);
    const int64_t rows = matrix.rows - first < GROUP_ROWS ? matrix.rows - first : GROUP_ROWS;
    for (int64_t row = 0; row < rows; ++row) factors.order[row] = int32_t(matrix.row_at(first + row));
}

// Sums quads, turns the rows back, and writes them to one row of y.
template <class Set>
ALWAYS_INLINE void write_rows(const TrellisProduct& job, int64_t group, int64_t row_of_x, const RowFactors& factors,
                              const float* totals) {
    const Trellis& matrix = job.matrix;
    alignas(64) float sums[GROUP_ROWS];
    Set::sum_quads(totals, sums);
    for (int row = 0; row < GROUP_ROWS; ++row) sums[row] *= factors.sizes[row];
    if (matrix.rotated) Set::turn(sums);
    const float extra = job.activations.extras[row_of_x];
    for (int row = 0; row < GROUP_ROWS; ++row) sums[row] = sums[row] * factors.scales[row] + extra;
    const int64_t first = group * GROUP_ROWS;
    const int64_t rows = matrix.rows - first < GROUP_ROWS ? matrix.rows - first : GROUP_ROWS;
    float* y = job.y + row_of_x * job.stride;
    if (job.bias)
        for (int64_t row = 0; row < rows; ++row) sums[row] += job.bias[factors.order[row]];
    if (matrix.row_order) {
        for (int64_t row = 0; row < rows; ++row) y[factors.order[row]] = sums[row];
    } else {
        std::memcpy(y + first, sums, rows * sizeof(float));
    }
}

}  // namespace
}  // namespace nashswarm
