// y = x Wᵀ for a trellis-coded W: the algorithm, included once for each instruction set.
//
// A row of x is put into the stored order of columns, multiplied by the column scales, and converted to integers, 64
// columns at a time: to one signed byte each, or to three.  Products and sums of 64 columns are exact in int32, and only
// the sum over them rounds.  The result therefore does not depend on the batch or on the number of threads.
//
// An instruction set `Set` processes BYTES bytes of a step at a time: BYTES / 16 rows of the 16 columns of a tile.  It
// defines the types Codes (unsigned bytes), Inputs (activations of a tile, for all rows), Sum (int32, one for each quad of
// columns of each row) and Value (the same as floats), and the operations on them.  HALVES halves of a tile share a pass.
// Values of the tables are stored plus OFFSET, so that a set can multiply unsigned by signed bytes.
#pragma once

#include <cmath>
#include <utility>

#include "trellis_round.h"
#include "trellis_rows.h"

namespace nashswarm {
namespace {

constexpr int BLOCK = 32;        // rows of x that share decoded values
constexpr int PLANE = STEPS * STEP_BYTES / 4;  // sums of a row group, for quads of columns: [step][row of the step][quad]

// The tiles of 64 columns of a row group.
struct Tiles {
    const uint8_t* payload;
    int rates[ROUNDED_TILES];
};

ALWAYS_INLINE int rate_at(const uint8_t* rates, int64_t tile) { return rates[tile / 2] >> (tile % 2 * 4) & 15; }

// Reads the rates of 64 columns; a tile after the last column has rate 0.
ALWAYS_INLINE void read_rates(const Trellis& matrix, const uint8_t* rates, int64_t rounded, Tiles& tiles) {
    for (int tile = 0; tile < ROUNDED_TILES; ++tile) {
        const int64_t place = rounded * ROUNDED_TILES + tile;
        tiles.rates[tile] = place < matrix.across() ? rate_at(rates, place) : 0;
    }
}

// The rate of all tiles of 64 columns, or -1.
ALWAYS_INLINE int uniform_rate(const Trellis& matrix, const uint8_t* rates, int64_t rounded) {
    static_assert(ROUNDED_TILES == 4, "two bytes of rates");
    const uint8_t* pair = rates + 2 * rounded;
    return 4 * rounded + 4 <= matrix.across() && pair[0] == pair[1] && pair[0] % 16 == pair[0] / 16 ? pair[0] % 16 : -1;
}

constexpr int64_t tile_bytes(int rate) { return int64_t(rate) * 2 * STEP_BYTES; }

// Calls take(step, values) for the HALVES halves from `half` on of a tile; `tile` points to BYTES of its first register.
template <class Set, int RATE, int HALVES, class Take, int... STEP>
ALWAYS_INLINE void decode_steps(const uint8_t* tile, int half, const Tables& tables, Take take,
                                std::integer_sequence<int, STEP...>) {
    for (int number = 0; number < HALVES; ++number) {
        if constexpr (RATE == RATES) {
            const uint8_t* bytes = tile + (half + number) * HALF * STEP_BYTES;
            (take(number * HALF + STEP, Set::from_signed(Set::load(bytes + STEP * STEP_BYTES))), ...);
        } else {
            const auto read = read_half<Set, RATE>(tile, half + number);
            (take(number * HALF + STEP,
                  Set::template look<index_bits(RATE)>(tables.of[RATE][STEP], index_of<Set, RATE, STEP>(read))),
             ...);
        }
    }
}

// The activations of 64 columns.
struct Rounded {
    const int8_t* digits;
    const int32_t* bases;
    const float* step;
};

// Adds the products of whole 64 columns, all of whose tiles have one rate, to the totals of a row group: `count` times 64.
template <class Set, int RATE>
__attribute__((noinline)) void multiply_uniform(const uint8_t* tiles, int64_t count, const Tables& tables, Rounded rounded,
                                                float* totals) {
    constexpr int HALVES = Set::HALVES;
    for (; count > 0; --count) {
        auto base = Set::nothing();
        if (Set::OFFSET)
            for (int tile = 0; tile < ROUNDED_TILES; ++tile) base = Set::add(base, Set::quads(rounded.bases + 4 * tile));
        for (int part = 0; part < STEP_BYTES; part += Set::BYTES) {
            for (int half = 0; half < 2; half += HALVES) {
                typename Set::Sum sums[HALVES * HALF];
                for (auto& sum : sums) sum = base;
                for (int tile = 0; tile < ROUNDED_TILES; ++tile) {
                    const auto inputs = Set::inputs(rounded.digits + tile * TILE_COLUMNS);
                    decode_steps<Set, RATE, HALVES>(
                        tiles + tile * tile_bytes(RATE) + part, half, tables,
                        [&](int step, auto values) {
                            sums[step] = Set::template multiply<RATE == RATES>(sums[step], values, inputs);
                        },
                        std::make_integer_sequence<int, HALF>());
                }
                float* place = totals + (half * HALF * STEP_BYTES + part) / 4;
                for (int step = 0; step < HALVES * HALF; ++step, place += STEP_BYTES / 4)
                    Set::store(place, Set::plus_product(Set::load_floats(place), Set::to_float(sums[step]), *rounded.step));
            }
        }
        tiles += ROUNDED_TILES * tile_bytes(RATE);
        rounded = {rounded.digits + ROUNDED, rounded.bases + ROUNDED / 4, rounded.step + 1};
    }
}

template <class Set>
void multiply_uniform_rate(int rate, const uint8_t* tiles, int64_t count, const Tables& tables, const Rounded& rounded,
                           float* totals) {
    switch (rate) {
        case 1: return multiply_uniform<Set, 1>(tiles, count, tables, rounded, totals);
        case 2: return multiply_uniform<Set, 2>(tiles, count, tables, rounded, totals);
        case 3: return multiply_uniform<Set, 3>(tiles, count, tables, rounded, totals);
        case 4: return multiply_uniform<Set, 4>(tiles, count, tables, rounded, totals);
        case 5: return multiply_uniform<Set, 5>(tiles, count, tables, rounded, totals);
        case 6: return multiply_uniform<Set, 6>(tiles, count, tables, rounded, totals);
        case 7: return multiply_uniform<Set, 7>(tiles, count, tables, rounded, totals);
        case 8: return multiply_uniform<Set, 8>(tiles, count, tables, rounded, totals);
        default: return;
    }
}

// A tile among those that are processed together.
struct Place {
    int32_t start;   // in the payload, from that of the first
    int32_t number;  // from the first
};

// Adds the products of tiles of one rate to the sums of their 64 columns.
template <class Set, int RATE>
__attribute__((noinline)) void multiply_tiles(const Place* place, int count, const uint8_t* payload, const Tables& tables,
                                              const int8_t* digits, int32_t* sums_of_all) {
    constexpr int HALVES = Set::HALVES;
    for (; count > 0; --count, ++place) {
        const auto inputs = Set::inputs(digits + place->number * TILE_COLUMNS);
        const uint8_t* tile = payload + place->start;
        for (int part = 0; part < STEP_BYTES; part += Set::BYTES) {
            for (int half = 0; half < 2; half += HALVES) {
                int32_t* sums = sums_of_all + place->number / ROUNDED_TILES * PLANE + (half * HALF * STEP_BYTES + part) / 4;
                decode_steps<Set, RATE, HALVES>(
                    tile + part, half, tables,
                    [&](int step, auto values) {
                        int32_t* own = sums + step * (STEP_BYTES / 4);
                        Set::store_sums(own, Set::template multiply<RATE == RATES>(Set::load_sums(own), values, inputs));
                    },
                    std::make_integer_sequence<int, HALF>());
            }
        }
    }
}

constexpr int MIXED = 8;  // times 64 columns whose tiles are processed together, rate by rate

// Adds the products of `count` times 64 columns, of tiles of several rates, to the totals of a row group: all tiles of one
// rate one after another, so that branches depend on few rates, not on every tile.  Returns the end of the tiles.
template <class Set>
const uint8_t* multiply_mixed(const Trellis& matrix, const uint8_t* rates, int64_t number, int count, const uint8_t* payload,
                              const Tables& tables, const Rounded& rounded, float* totals) {
    alignas(64) int32_t sums[MIXED * PLANE];
    Place places[RATES + 1][MIXED * ROUNDED_TILES];
    int counts[RATES + 1] = {};
    int32_t start = 0;
    for (int own = 0; own < count; ++own) {
        Tiles tiles;
        read_rates(matrix, rates, number + own, tiles);
        auto base = Set::nothing();
        for (int tile = 0; tile < ROUNDED_TILES; ++tile) {
            const int rate = tiles.rates[tile], place = own * ROUNDED_TILES + tile;
            if (Set::OFFSET && rate) base = Set::add(base, Set::quads(rounded.bases + 4 * place));
            places[rate][counts[rate]++] = {start, place};
            start += int32_t(tile_bytes(rate));
        }
        for (int place = 0; place < PLANE; place += Set::BYTES / 4) Set::store_sums(sums + own * PLANE + place, base);
    }
    multiply_tiles<Set, 1>(places[1], counts[1], payload, tables, rounded.digits, sums);
    multiply_tiles<Set, 2>(places[2], counts[2], payload, tables, rounded.digits, sums);
    multiply_tiles<Set, 3>(places[3], counts[3], payload, tables, rounded.digits, sums);
    multiply_tiles<Set, 4>(places[4], counts[4], payload, tables, rounded.digits, sums);
    multiply_tiles<Set, 5>(places[5], counts[5], payload, tables, rounded.digits, sums);
    multiply_tiles<Set, 6>(places[6], counts[6], payload, tables, rounded.digits, sums);
    multiply_tiles<Set, 7>(places[7], counts[7], payload, tables, rounded.digits, sums);
    multiply_tiles<Set, 8>(places[8], counts[8], payload, tables, rounded.digits, sums);
    for (int own = 0; own < count; ++own)
        for (int place = 0; place < PLANE; place += Set::BYTES / 4) {
            const auto part = Set::to_float(Set::load_sums(sums + own * PLANE + place));
            Set::store(totals + place, Set::plus_product(Set::load_floats(totals + place), part, rounded.step[own]));
        }
    return payload + start;
}

template <class Set, int RATE>
ALWAYS_INLINE void decode_tile(const uint8_t* tile, const Tables& tables, uint8_t* values) {
    for (int part = 0; part < STEP_BYTES; part += Set::BYTES)
        decode_steps<Set, RATE, 2>(
            tile + part, 0, tables,
            [&](int step, auto found) { Set::store_codes(values + step * STEP_BYTES + part, found); },
            std::make_integer_sequence<int, HALF>());
}

// Writes the values of a tile plus OFFSET: [step][byte].
template <class Set>
__attribute__((noinline)) void decode(const uint8_t* tile, int rate, const Tables& tables, uint8_t* values) {
    switch (rate) {
        case 1: return decode_tile<Set, 1>(tile, tables, values);
        case 2: return decode_tile<Set, 2>(tile, tables, values);
        case 3: return decode_tile<Set, 3>(tile, tables, values);
        case 4: return decode_tile<Set, 4>(tile, tables, values);
        case 5: return decode_tile<Set, 5>(tile, tables, values);
        case 6: return decode_tile<Set, 6>(tile, tables, values);
        case 7: return decode_tile<Set, 7>(tile, tables, values);
        case 8: return decode_tile<Set, 8>(tile, tables, values);
        default: std::memset(values, Set::OFFSET, STEPS * STEP_BYTES);
    }
}

// Adds the products of 64 columns to the totals of ROWS rows of x, from decoded values, for COUNT digits of an activation.
// WIDE: values may be -128.  `rounded`: from the activations of a row to those of the next, in times 64 columns.
template <class Set, int COUNT, bool WIDE, int ROWS>
__attribute__((noinline)) void multiply_values(const uint8_t* values, const Rounded& first_row, int64_t rounded,
                                               float (*totals)[PLANE]) {
    constexpr int WIDTH = Set::HALVES * HALF;
    const int64_t apart = rounded * COUNT * ROUNDED;
    for (int part = 0; part < STEP_BYTES; part += Set::BYTES) {
        for (int first = 0; first < STEPS; first += WIDTH) {
            typename Set::Value whole[ROWS][WIDTH];
            for (int digit = COUNT - 1; digit >= 0; --digit) {
                typename Set::Sum sums[ROWS][WIDTH];
                for (int row = 0; row < ROWS; ++row) {
                    auto base = Set::nothing();
                    const int32_t* bases = first_row.bases + row * apart / 4 + digit * TILE_COLUMNS;
                    if (Set::OFFSET)
                        for (int tile = 0; tile < ROUNDED_TILES; ++tile) base = Set::add(base, Set::quads(bases + 4 * tile));
                    for (auto& sum : sums[row]) sum = base;
                }
                for (int tile = 0; tile < ROUNDED_TILES; ++tile) {
                    const int8_t* digits = first_row.digits + digit * ROUNDED + tile * TILE_COLUMNS;
                    typename Set::Inputs inputs[ROWS];
                    for (int row = 0; row < ROWS; ++row) inputs[row] = Set::inputs(digits + row * apart);
                    const uint8_t* own = values + (tile * STEPS + first) * STEP_BYTES + part;
                    for (int number = 0; number < WIDTH; ++number) {
                        const auto codes = Set::load(own + number * STEP_BYTES);
                        for (int row = 0; row < ROWS; ++row)
                            sums[row][number] = Set::template multiply<WIDE>(sums[row][number], codes, inputs[row]);
                    }
                }
                for (int row = 0; row < ROWS; ++row)
                    for (int number = 0; number < WIDTH; ++number) {
                        const auto own = Set::to_float(sums[row][number]);
                        whole[row][number] = digit == COUNT - 1 ? own : Set::plus_product(own, whole[row][number], 256.0f);
                    }
            }
            for (int row = 0; row < ROWS; ++row) {
                float* place = totals[row] + (first * STEP_BYTES + part) / 4;
                for (int number = 0; number < WIDTH; ++number, place += STEP_BYTES / 4)
                    Set::store(place, Set::plus_product(Set::load_floats(place), whole[row][number], first_row.step[row * rounded]));
            }
        }
    }
}

template <class Set>
void multiply_single(const TrellisProduct& job, const Tables& tables, int64_t group) {
    const Trellis& matrix = job.matrix;
    alignas(64) float totals[PLANE];
    for (int place = 0; place < PLANE; place += Set::BYTES / 4) Set::store(totals + place, Set::to_float(Set::nothing()));
    const int64_t rounded = matrix.rounded();
    const uint8_t* rates = matrix.rates + group * matrix.pairs();
    const uint8_t* payload = matrix.payload + matrix.starts[group];
    const auto& [digits, bases, steps, extras] = job.activations;
    for (int64_t number = 0, count; number < rounded; number += count) {
        const int rate = uniform_rate(matrix, rates, number);
        const Rounded first{digits + number * ROUNDED, bases + number * (ROUNDED / 4), steps + number};
        for (count = 1; number + count < rounded && (rate >= 0 || count < MIXED); ++count)
            if (uniform_rate(matrix, rates, number + count) != rate) break;
        if (rate < 0) {
            payload = multiply_mixed<Set>(matrix, rates, number, int(count), payload, tables, first, totals);
        } else {
            multiply_uniform_rate<Set>(rate, payload, count, tables, first, totals);
            payload += count * ROUNDED_TILES * tile_bytes(rate);
        }
    }
    RowFactors factors;
    read_factors<Set>(matrix, tables, group, factors);
    write_rows<Set>(job, group, 0, factors, totals);
}

template <class Set, int COUNT>
void multiply_batch(const TrellisProduct& job, const Tables& tables, int64_t group) {
    const Trellis& matrix = job.matrix;
    alignas(64) float totals[BLOCK][PLANE];
    alignas(64) uint8_t values[ROUNDED_TILES * STEPS * STEP_BYTES];
    const int64_t rounded = matrix.rounded();
    const uint8_t* rates = matrix.rates + group * matrix.pairs();
    RowFactors factors;
    read_factors<Set>(matrix, tables, group, factors);
    for (int64_t first = 0; first < job.batch; first += BLOCK) {
        const int64_t rows = job.batch - first < BLOCK ? job.batch - first : BLOCK;
        std::memset(totals, 0, rows * sizeof totals[0]);
        Tiles tiles;
        tiles.payload = matrix.payload + matrix.starts[group];
        for (int64_t number = 0; number < rounded; ++number) {
            read_rates(matrix, rates, number, tiles);
            bool wide = false;
            for (int tile = 0; tile < ROUNDED_TILES; ++tile) {
                decode<Set>(tiles.payload, tiles.rates[tile], tables, values + tile * STEPS * STEP_BYTES);
                tiles.payload += tile_bytes(tiles.rates[tile]);
                wide |= tiles.rates[tile] == RATES;
            }
            constexpr int TOGETHER = COUNT == 1 ? Set::TOGETHER : 1;
            const auto together = wide ? multiply_values<Set, COUNT, true, TOGETHER> : multiply_values<Set, COUNT, false, TOGETHER>;
            const auto alone = wide ? multiply_values<Set, COUNT, true, 1> : multiply_values<Set, COUNT, false, 1>;
            for (int64_t row = 0, step; row < rows; row += step) {
                const int64_t side = (first + row) * rounded + number;
                step = row + TOGETHER <= rows ? TOGETHER : 1;
                (step == 1 ? alone : together)(
                    values,
                    {job.activations.digits + side * COUNT * ROUNDED, job.activations.bases + side * COUNT * (ROUNDED / 4),
                     job.activations.steps + side},
                    rounded, totals + row);
            }
        }
        for (int64_t row = 0; row < rows; ++row) write_rows<Set>(job, group, first + row, factors, totals[row]);
    }
}

// The loops are shared by the threads of the region that the function is called in.
template <class Set, int COUNT>
void multiply_digits(const TrellisProduct* jobs, int64_t number, const Tables& tables) {
    const int64_t batch = jobs[0].batch;
    int64_t groups = 0;
    for (int64_t job = 0; job < number; ++job) groups += jobs[job].matrix.groups();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < number * batch; ++row) round_row<Set, COUNT>(jobs[row / batch], tables, row % batch);
#pragma omp for schedule(static)
    for (int64_t place = 0; place < groups; ++place) {
        const TrellisProduct* job = jobs;
        int64_t group = place;
        for (; group >= job->matrix.groups(); ++job) group -= job->matrix.groups();
        if (COUNT == 1 && batch == 1) multiply_single<Set>(*job, tables, group);
        else multiply_batch<Set, COUNT>(*job, tables, group);
    }
}

template <class Set>
void sum_group(const Trellis& matrix, const Tables& tables, int64_t group, const float* weights, int64_t count,
               float* out) {
    alignas(64) uint8_t values[STEPS * STEP_BYTES];
    const uint8_t* rates = matrix.rates + group * matrix.pairs();
    const uint8_t* payload = matrix.payload + matrix.starts[group];
    const int64_t across = matrix.across();
    for (int64_t tile = 0; tile < across; ++tile) {
        const int rate = rate_at(rates, tile);
        decode<Set>(payload, rate, tables, values);
        payload += tile_bytes(rate);
        for (int64_t number = 0; number < count; ++number) {
            float sums[TILE_COLUMNS] = {};
            for (int row = 0; rate && row < GROUP_ROWS; ++row) {
                const float weight = weights[number * GROUP_ROWS + row];
                if (weight == 0.0f) continue;
                for (int column = 0; column < TILE_COLUMNS; ++column)
                    sums[column] += weight * float(int8_t(values[row * TILE_COLUMNS + column] - Set::OFFSET));
            }
            std::memcpy(out + (number * across + tile) * TILE_COLUMNS, sums, sizeof sums);
        }
    }
}

// The functions of a path, whose tables are its own.
template <class Set>
struct PathOf {
    static inline Tables tables;
    static void prepare(const int8_t (*given)[LARGEST_TABLE]) {
        arrange<Set>(given, tables, std::make_integer_sequence<int, RATES - 1>());
    }
    static void multiply(const TrellisProduct* jobs, int64_t number) {
        if (jobs[0].count == 1) multiply_digits<Set, 1>(jobs, number, tables);
        else multiply_digits<Set, 3>(jobs, number, tables);
    }
    static void sum_rows(const Trellis& matrix, int64_t group, const float* weights, int64_t count, float* out) {
        sum_group<Set>(matrix, tables, group, weights, count, out);
    }
};

}  // namespace
}  // namespace nashswarm
