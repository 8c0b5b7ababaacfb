// y = x Wᵀ for packed W: the algorithm, included once for each instruction set.
//
// A row of x is converted to integers, group by group: to one signed byte each, or to three, which are as precise as a
// float.  All products and sums within a group are then exact in int32, and only the sum over groups rounds.  The result
// therefore does not depend on the batch or on the number of threads.
//
// An instruction set `Set` processes LANES rows at a time.  It defines the types Codes (four unsigned bytes in each lane),
// Partial (sums of products over up to one chunk), Sum (int32) and Value (float), and the operations on them.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#include "matrix.h"

#define ALWAYS_INLINE __attribute__((always_inline)) inline

namespace nashswarm {
namespace {

constexpr float LEAST = 1e-30f;  // lower bound for the largest activation of a group: keeps its inverse finite

// The first bit of the code of a position within its bytes.
constexpr int bit_of(int width, int position) {
    return width != 3 ? position % (8 / width) * width : position < 6 ? position % 2 * 3 : position - 2;
}

// The codes of a position, one per byte: left at bit_of if IN_PLACE, else shifted down.
template <class Set, int WIDTH, bool IN_PLACE, int POSITION>
ALWAYS_INLINE typename Set::Codes codes_of(const typename Set::Codes (&registers)[WIDTH]) {
    constexpr int BIT = bit_of(WIDTH, POSITION), MASK = (1 << WIDTH) - 1;
    if constexpr (WIDTH == 8) {
        return registers[POSITION];
    } else if constexpr (WIDTH == 3 && POSITION >= 6) {
        const auto joined = Set::template join<6 - BIT, 4 << BIT>(registers[POSITION - 6], registers[2]);
        if constexpr (IN_PLACE) return joined;
        else return Set::template mask<MASK>(Set::template shift<BIT>(joined));
    } else {
        const auto bytes = registers[WIDTH == 3 ? POSITION / 2 : POSITION * WIDTH / 8];
        if constexpr (IN_PLACE) return Set::template mask<MASK << BIT>(bytes);
        else return Set::template mask<MASK>(Set::template shift<BIT>(bytes));
    }
}

// The accumulator for the products of a position: one for each place in a byte, and at least four, so that consecutive
// sums do not depend on each other.
constexpr int place_of(int width, int position) {
    return width != 3 ? position % 4 : position < 6 ? position % 2 : position - 4;
}

template <class Set, int WIDTH, int FACTORS, int PLACES, class Partial, int... POSITION>
ALWAYS_INLINE void multiply_positions(const typename Set::Codes (&registers)[WIDTH], const int8_t* digits,
                                      Partial (&sums)[FACTORS][PLACES], std::integer_sequence<int, POSITION...>) {
    const auto one = [&](auto codes, int position, int place) {
        for (int factor = 0; factor < FACTORS; ++factor)
            sums[factor][place] = Set::multiply(sums[factor][place], codes, digits + 4 * (FACTORS * position + factor));
    };
    (one(codes_of<Set, WIDTH, PLACES != 1, POSITION>(registers), POSITION, PLACES != 1 ? place_of(WIDTH, POSITION) : 0),
     ...);
}

// The sum over the places of a byte, each shifted down to the lowest one.
template <class Set, int WIDTH>
ALWAYS_INLINE typename Set::Sum whole(const typename Set::Sum (&sums)[1]) {
    return sums[0];
}

template <class Set, int WIDTH>
ALWAYS_INLINE typename Set::Sum whole(const typename Set::Sum (&sums)[4]) {
    if constexpr (WIDTH == 8) return Set::add(Set::add(sums[0], sums[1]), Set::add(sums[2], sums[3]));
    if constexpr (WIDTH == 4)
        return Set::add(Set::add(sums[0], sums[2]), Set::template down<4>(Set::add(sums[1], sums[3])));
    constexpr int BITS[] = {0, WIDTH == 3 ? 3 : 2, 4, WIDTH == 3 ? 5 : 6};
    const auto upper = Set::add(sums[2], Set::template down<BITS[3] - BITS[2]>(sums[3]));
    const auto middle = Set::add(sums[1], Set::template down<BITS[2] - BITS[1]>(upper));
    return Set::add(sums[0], Set::template down<BITS[1]>(middle));
}

// The operands of one pass over the tiles of a span, with COLUMNS rows of x.
struct Pass {
    const uint8_t* payload;
    const uint16_t* scale;  // scales of the span, or null
    const uint8_t* zero_point;
    const int8_t* digits;
    const float* steps;
    const float* sums;
    int64_t groups, group_size;
};

// Adds the products of LANES rows of a tile with COLUMNS rows of x to `totals`, which has SPAN · 16 floats for each.
//
// With PLACES = 4, codes stay at their place within the byte, which saves a shift, and each place has an accumulator that
// is shifted once at the end.  With PLACES = 1, codes are shifted down.  GROUP is the group size, or 0 for any.
template <class Set, int WIDTH, int COLUMNS, int COUNT, int GROUP>
ALWAYS_INLINE void multiply_lanes(const Pass& pass, const Tile& tile, int lane, float* totals) {
    constexpr int FACTORS = COLUMNS * COUNT, PLACES = Set::IN_PLACE && COLUMNS == 1 ? 4 : 1;
    const int64_t group = tile.where / SPAN, block = tile.where % SPAN;
    const uint8_t* payload = pass.payload + int64_t(tile.place) * REGISTER + 4 * lane;
    const int64_t group_size = GROUP ? GROUP : pass.group_size;
    const int8_t* digits = pass.digits + group * group_size * FACTORS;

    typename Set::Sum sums[FACTORS][PLACES];
    for (auto& factor : sums)
        for (auto& sum : factor) sum = Set::nothing();
    for (int64_t chunk = 0; chunk < group_size; chunk += CHUNK) {
        typename Set::Codes registers[WIDTH];
        for (int number = 0; number < WIDTH; ++number) registers[number] = Set::load(payload + number * REGISTER);
        typename Set::template Partial<WIDTH> partials[FACTORS][PLACES];
        for (int factor = 0; factor < FACTORS; ++factor)
            for (int place = 0; place < PLACES; ++place)
                partials[factor][place] = Set::template begin<WIDTH>(sums[factor][place]);
        multiply_positions<Set, WIDTH, FACTORS, PLACES>(registers, digits, partials,
                                                        std::make_integer_sequence<int, POSITIONS>());
        for (int factor = 0; factor < FACTORS; ++factor)
            for (int place = 0; place < PLACES; ++place)
                sums[factor][place] = Set::end(sums[factor][place], partials[factor][place]);
        payload += WIDTH * REGISTER;
        digits += CHUNK * FACTORS;
    }

    const int64_t side = (block * pass.groups + group) * TILE_ROWS + lane;
    const auto zero_point = pass.scale ? Set::from_bytes(pass.zero_point + side) : Set::all(float(1 << (WIDTH - 1)));
    const auto scale = pass.scale ? Set::from_halves(pass.scale + side) : Set::all(1.0f);
    for (int column = 0; column < COLUMNS; ++column) {
        auto total = Set::all(0.0f);
        for (int digit = COUNT - 1; digit >= 0; --digit) {
            const int factor = column * COUNT + digit;
            // Exact: both terms are integers below 2^24 for groups of up to 512 inputs.
            const auto part = Set::minus_product(Set::to_float(whole<Set, WIDTH>(sums[factor])), zero_point,
                                                 pass.sums[group * FACTORS + factor]);
            total = digit == COUNT - 1 ? part : Set::plus_product(part, total, 256.0f);
        }
        float* place = totals + (column * SPAN + block) * TILE_ROWS + lane;
        const auto step = Set::times(scale, pass.steps[group * COLUMNS + column]);
        Set::store(place, Set::plus_product(Set::load_floats(place), total, step));
    }
}

template <class Set, int WIDTH, int COLUMNS, int COUNT, int GROUP>
__attribute__((noinline)) void multiply_group_size(const Pass& given, const Tile* tile, const Tile* end, float* totals) {
    const Pass pass = given;
    for (; tile < end; ++tile)
        for (int lane = 0; lane < TILE_ROWS; lane += Set::LANES)
            multiply_lanes<Set, WIDTH, COLUMNS, COUNT, GROUP>(pass, *tile, lane, totals);
}

template <class Set, int WIDTH, int COLUMNS, int COUNT>
void multiply_tiles(const Pass& pass, const Tile* tile, const Tile* end, float* totals) {
    if (tile == end) return;
    if (pass.group_size == 64 && COLUMNS == 1) multiply_group_size<Set, WIDTH, 1, COUNT, 64>(pass, tile, end, totals);
    else multiply_group_size<Set, WIDTH, COLUMNS, COUNT, 0>(pass, tile, end, totals);
}

// Multiplies the rows of a span with COLUMNS rows of x, starting at `first`.
template <class Set, int COLUMNS, int COUNT>
void multiply_span(const Product& job, int64_t first, int64_t span) {
    const Matrix& matrix = job.matrix;
    alignas(64) float totals[COLUMNS][SPAN * TILE_ROWS] = {};
    const int64_t groups = matrix.groups(), side = span * SPAN * groups * TILE_ROWS;
    const Pass pass{matrix.payload,
                    matrix.scale ? matrix.scale + side : nullptr,
                    matrix.scale ? matrix.zero_point + side : nullptr,
                    job.digits.digits + first * groups * matrix.group_size * COUNT,
                    job.digits.steps + first * groups,
                    job.digits.sums + first * groups * COUNT,
                    groups,
                    matrix.group_size};
    const int32_t* starts = matrix.starts + 4 * span;
    const Tile* tiles = matrix.tiles;
    multiply_tiles<Set, 2, COLUMNS, COUNT>(pass, tiles + starts[0], tiles + starts[1], totals[0]);
    multiply_tiles<Set, 3, COLUMNS, COUNT>(pass, tiles + starts[1], tiles + starts[2], totals[0]);
    multiply_tiles<Set, 4, COLUMNS, COUNT>(pass, tiles + starts[2], tiles + starts[3], totals[0]);
    multiply_tiles<Set, 8, COLUMNS, COUNT>(pass, tiles + starts[3], tiles + starts[4], totals[0]);

    const int64_t begin = span * SPAN * TILE_ROWS;
    const int64_t rows = matrix.rows - begin < SPAN * TILE_ROWS ? matrix.rows - begin : SPAN * TILE_ROWS;
    for (int column = 0; column < COLUMNS; ++column) {
        const float* x = job.x + (first + column) * matrix.columns;
        for (int64_t block = 0; block * TILE_ROWS < rows; ++block) {
            const int32_t* bounds = matrix.escape_starts + span * SPAN + block;
            for (int32_t number = bounds[0]; number < bounds[1]; ++number) {
                const int32_t place = matrix.escape_places[number], input = place / TILE_ROWS;
                const float scaled = matrix.column_scale ? x[input] * matrix.column_scale[input] : x[input];
                totals[column][block * TILE_ROWS + place % TILE_ROWS] += float(matrix.escape_codes[number]) * scaled;
            }
        }
        float* y = job.y + (first + column) * matrix.rows + begin;
        if (matrix.row_scale)
            for (int64_t row = 0; row < rows; ++row) totals[column][row] *= matrix.row_scale[begin + row];
        if (job.bias)
            for (int64_t row = 0; row < rows; ++row) totals[column][row] += job.bias[begin + row];
        std::memcpy(y, totals[column], rows * sizeof(float));
    }
}

// The number of rows of x in the next pass, given how many are left.
template <int COUNT>
int64_t columns_of_pass(int64_t left) {
    return left >= 8 && COUNT == 1 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// Reads a chunk of one row of x, multiplied by the column scales; zeros after the last column.
ALWAYS_INLINE void read_chunk(const Product& job, int64_t row, int64_t begin, float (&values)[CHUNK]) {
    const Matrix& matrix = job.matrix;
    const float* x = job.x + row * matrix.columns + begin;
    const float* scale = matrix.column_scale ? matrix.column_scale + begin : nullptr;
    const int64_t left = matrix.columns - begin;
    if (left >= CHUNK) {
        for (int input = 0; input < CHUNK; ++input) values[input] = scale ? x[input] * scale[input] : x[input];
    } else {
        for (int input = 0; input < CHUNK; ++input)
            values[input] = input >= left ? 0.0f : scale ? x[input] * scale[input] : x[input];
    }
}

// Writes step, digits and sums of digits of one row of x; `columns` rows of x share its pass.
template <int COUNT>
void write_digits(const Product& job, int64_t first, int64_t columns, int64_t column) {
    // Every digit stays within -128 … 127, even if rounding enlarges the largest activation by an eighth of a millionth.
    constexpr float LEVELS = COUNT == 1 ? 127 : 127 * (1 + 256 + 65536) - 8;
    const Matrix& matrix = job.matrix;
    const int64_t groups = matrix.groups(), row = first + column;
    int8_t* out = job.digits.digits + (first * groups * matrix.group_size + 4 * column) * COUNT;
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t begin = group * matrix.group_size, end = begin + matrix.group_size;
        float values[CHUNK];
        int32_t patterns[CHUNK] = {};  // bit patterns of magnitudes: ordered like the floats, with nan above all
        for (int64_t at = begin; at < end; at += CHUNK) {
            read_chunk(job, row, at, values);
            int32_t bits[CHUNK];
            std::memcpy(bits, values, sizeof bits);
            for (int input = 0; input < CHUNK; ++input) {
                const int32_t pattern = bits[input] & 0x7fffffff;
                patterns[input] = pattern > patterns[input] ? pattern : patterns[input];
            }
        }
        int32_t pattern = 0;
        for (int input = 0; input < CHUNK; ++input) pattern = patterns[input] > pattern ? patterns[input] : pattern;
        float largest;
        std::memcpy(&largest, &pattern, sizeof largest);
        const bool finite = pattern < 0x7f800000;
        if (!finite || largest < LEAST) largest = LEAST;
        const float inverse = LEVELS / largest;
        int32_t sums[COUNT] = {};
        for (int64_t at = begin; at < end; at += CHUNK) {
            read_chunk(job, row, at, values);
            if (!finite) std::memset(values, 0, sizeof values);
            int32_t rest[CHUNK];
            for (int input = 0; input < CHUNK; ++input) {
                const float scaled = values[input] * inverse;
                rest[input] = int32_t(scaled + std::copysign(0.5f, scaled));
            }
            for (int digit = 0; digit < COUNT; ++digit) {
                int8_t low[CHUNK];
                for (int input = 0; input < CHUNK; ++input) {
                    low[input] = int8_t(rest[input]);
                    sums[digit] += low[input];
                    rest[input] = (rest[input] - low[input]) / 256;
                }
                for (int input = 0; input < CHUNK; input += 4)
                    std::memcpy(out + (at + input) * columns * COUNT + 4 * digit, low + input, 4);
            }
        }
        const int64_t side = first * groups + group * columns + column;
        job.digits.steps[side] = finite ? largest / LEVELS : NAN;
        for (int digit = 0; digit < COUNT; ++digit) job.digits.sums[side * COUNT + digit] = float(sums[digit]);
    }
}

template <class Set, int COUNT>
void multiply_digits(const Product& job) {
    const int64_t spans = job.matrix.spans();
#pragma omp parallel num_threads(job.threads) if (job.threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < job.batch; ++row) {
            int64_t first = 0, columns = columns_of_pass<COUNT>(job.batch);
            while (first + columns <= row) {
                first += columns;
                columns = columns_of_pass<COUNT>(job.batch - first);
            }
            write_digits<COUNT>(job, first, columns, row - first);
        }
#pragma omp for schedule(static)
        for (int64_t span = 0; span < spans; ++span) {
            for (int64_t first = 0, columns; first < job.batch; first += columns) {
                columns = columns_of_pass<COUNT>(job.batch - first);
                if (columns == 8) multiply_span<Set, COUNT == 1 ? 8 : 4, COUNT>(job, first, span);
                else if (columns == 4) multiply_span<Set, 4, COUNT>(job, first, span);
                else if (columns == 2) multiply_span<Set, 2, COUNT>(job, first, span);
                else multiply_span<Set, 1, COUNT>(job, first, span);
            }
        }
    }
}

template <class Set>
void multiply(const Product& job) {
    if (job.count == 1) multiply_digits<Set, 1>(job);
    else multiply_digits<Set, 3>(job);
}

}  // namespace
}  // namespace nashswarm
