// The encoder of lattice paths (see path_form.py for their form): best paths down columns, inside error feedback.
//
// Sixteen paths of a column are encoded together, one in each lane of a vector.  The cost of a path is its damage plus the
// price of its length in the code tables.  Of each set and parity three magnitudes are tried: the nearest one, the next one
// toward zero, and the least.
#include <cstring>

#include "encoding.h"

namespace {

constexpr int STATES = 32, STEPS = 192, LANES = 16, LOW = 8, HIGH = 37;               // as in path_form.py
constexpr int SYMBOLS = 49, TABLES = 18, LOWEST_LEVEL = -12, HIGHEST_LEVEL = 5, ESCAPE = 48;  // as in quant/entropy.py
constexpr float FAR = 1e30f, LARGEST = 1 << 28;

constexpr int parity(int bits) { return __builtin_popcount(unsigned(bits)) & 1; }

// A window is a state with the one before it: its oldest bit is the way that led to the state, whose bits are the others.
constexpr int subset(int window) { return 2 * parity(window & LOW) + parity(window & HIGH); }

}  // namespace

extern "C" {

// A block of columns of a matrix, transposed: [columns][rows] floats.
struct PathBlock {
    int64_t rows, columns;
    const float* prices;  // [set][table][symbol]: of a symbol with its sign, in nats per token
    const float* row_steps;
    const float* column_steps;
    const float* row_weights;  // sensitivities
    const int8_t* row_scale;
    const int8_t* row_size;
    const int8_t* column_scale;
    const int8_t* column_size;
    float* targets;       // corrected in place
    const float* factor;  // [columns][columns], the block of curvature.inverse_cholesky
    int32_t* codes;
    float* errors;     // what later columns have to compensate for
    float bit_price;   // of a sign that is not in the price of its symbol
};

}  // extern "C"

#include "encoding.h"

namespace {

// What is known of sixteen paths at one step.
struct Step {
    Floats target, weight;  // target: without its sign, in steps of the lattice; weight: of a squared error of one step
    Ints negative, shift, base, missing;
};

struct Work {
    Ints magnitude[STEPS][4], decisions[STEPS], negative[STEPS];
};

INLINE Step step_of(const PathBlock& block, int64_t column, float pivot, int64_t first, int64_t number) {
    Step step = {};
    const float* targets = block.targets + column * block.rows;
    for (int lane = 0; lane < LANES; ++lane) {
        const int64_t row = first + lane * STEPS + number;
        if (row >= block.rows) {
            step.missing[lane] = -1;
            continue;
        }
        const float size = block.row_steps[row] * block.column_steps[column];
        const float target = size > 0 ? targets[row] / size : 0.0f, magnitude = target < 0 ? -target : target;
        const int scale = int(block.row_scale[row]) + block.column_scale[column];
        const int level = int(block.row_size[row]) + block.column_size[column] - (scale >> 1);
        const int shift = level > HIGHEST_LEVEL ? (level - HIGHEST_LEVEL + 1) >> 1 : 0;
        const int least = level - 2 * shift < LOWEST_LEVEL ? LOWEST_LEVEL : level - 2 * shift;
        step.target[lane] = magnitude < LARGEST ? magnitude : LARGEST;
        step.weight[lane] = block.row_weights[row] * pivot * size * size * 0.5f;
        step.negative[lane] = target < 0 ? -1 : 0;
        step.shift[lane] = shift;
        step.base[lane] = (least - LOWEST_LEVEL) * SYMBOLS;
    }
    return step;
}

// Finds the cheapest magnitude of one set and parity: its cost in nats per token.
INLINE Floats cheapest(const Step& step, const float* prices, float bit_price, int set, int odd, Ints& magnitude) {
    const Floats exact = ((step.target + float(set)) * 0.5f - float(odd)) * 0.5f;
    Ints nearest = {};
    for (int lane = 0; lane < LANES; ++lane) nearest[lane] = int32_t(__builtin_rintf(exact[lane]));
    nearest = nearest * 2 + odd;
    Floats least = fill(FAR);
    for (int option = 0; option < 3; ++option) {
        Ints tried = option == 0 ? nearest : option == 1 ? nearest - 2 : Ints{} + odd;
        tried = tried < odd ? Ints{} + odd : tried;
        const Ints some = tried > 0;  // -1 where it is true
        const Floats error = step.target - __builtin_convertvector(2 * tried + (set ? some : Ints{}), Floats);
        Ints symbol = tried >> step.shift;
        const Ints lone_sign = (symbol == 0) & some;
        symbol = step.base + (symbol > ESCAPE ? Ints{} + ESCAPE : symbol);
        Floats cost;
        for (int lane = 0; lane < LANES; ++lane) cost[lane] = prices[symbol[lane]];
        cost = cost + __builtin_convertvector(-lone_sign, Floats) * bit_price;
        cost = cost + step.weight * error * error;
        const Ints better = cost < least;
        least = better ? cost : least;
        magnitude = better ? tried : magnitude;
    }
    return step.missing ? Floats{} : least;
}

// Encodes sixteen paths of a column, the first of which begins at row `first`.
WIDENED void encode(const PathBlock& block, int64_t column, float pivot, int64_t first, Work& work) {
    const int64_t steps = block.rows - first < STEPS ? block.rows - first : STEPS;
    Floats state[STATES], next[STATES];
    for (int at = 0; at < STATES; ++at) state[at] = fill(at ? FAR : 0.0f);
    for (int64_t number = 0; number < steps; ++number) {
        const Step step = step_of(block, column, pivot, first, number);
        work.negative[number] = step.negative;
        Floats cost[4];
        for (int set = 0; set < 2; ++set)
            for (int odd = 0; odd < 2; ++odd) {
                Ints magnitude = {};
                const float* prices = block.prices + set * TABLES * SYMBOLS;
                cost[2 * set + odd] = cheapest(step, prices, block.bit_price, set, odd, magnitude);
                work.magnitude[number][2 * set + odd] = magnitude;
            }
        Ints decisions = {};
        for (int at = 0; at < STATES; ++at) {
            const Floats zero = state[at >> 1] + cost[subset(at)];
            const Floats one = state[(at | STATES) >> 1] + cost[subset(at | STATES)];
            const Ints better = one < zero;
            next[at] = better ? one : zero;
            decisions |= better & (Ints{} + int32_t(1u << at));
        }
        std::memcpy(state, next, sizeof state);
        work.decisions[number] = decisions;
    }
    for (int lane = 0; lane < LANES && first + lane * STEPS < block.rows; ++lane) {
        const int64_t begin = first + lane * STEPS, left = block.rows - begin;
        int at = 0;
        for (int other = 1; other < STATES; ++other)
            if (state[other][lane] < state[at][lane]) at = other;
        for (int64_t number = steps - 1; number >= 0; --number) {
            const int way = (uint32_t(work.decisions[number][lane]) >> at) & 1, window = at | way * STATES;
            const int kind = subset(window), magnitude = work.magnitude[number][kind][lane];
            const int32_t code = 2 * magnitude - (kind >= 2 && magnitude > 0);
            if (number < left) block.codes[column * block.rows + begin + number] = work.negative[number][lane] ? -code : code;
            at = window >> 1;
        }
    }
}

// y -= factor · x
WIDENED void subtract_product(float* y, const float* x, float factor, int64_t size) {
    for (int64_t place = 0; place < size; ++place) y[place] -= factor * x[place];
}

}  // namespace

extern "C" {

// One block of columns of error feedback.  Rows share nothing, so that the result is the same for any number of threads.
EXPORTED void nashswarm_path_feedback(const PathBlock* block, int threads) {
    const int64_t rows = block->rows, columns = block->columns, run = LANES * STEPS, runs = (rows + run - 1) / run;
#pragma omp parallel for num_threads(threads) if (threads > 1 && runs > 1) schedule(dynamic)
    for (int64_t number = 0; number < runs; ++number) {
        Work work;
        const int64_t first = number * run, size = rows - first < run ? rows - first : run;
        for (int64_t column = 0; column < columns; ++column) {
            const float* factor = block->factor + column * columns;
            float *target = block->targets + column * rows, *error = block->errors + column * rows;
            encode(*block, column, 1 / (factor[column] * factor[column]), first, work);
            const int32_t* codes = block->codes + column * rows;
            for (int64_t row = first; row < first + size; ++row) {
                const float value = float(codes[row]) * (block->row_steps[row] * block->column_steps[column]);
                error[row] = (target[row] - value) / factor[column];
            }
            for (int64_t later = column + 1; later < columns; ++later)
                subtract_product(block->targets + later * rows + first, error + first, factor[later], size);
        }
    }
}

}  // extern "C"
