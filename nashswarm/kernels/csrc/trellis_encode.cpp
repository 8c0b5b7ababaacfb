// The encoder of trellis tiles (see trellis.py for their form): best paths of columns, inside error feedback and sweeps.
//
// A batch is up to four groups of 64 rows: sixteen sequences of 16 steps, one in each lane of a vector.  Lane 4i + q and
// step t belong to row 64 g_i + 4t + q.  Path costs are weighted squared errors; the best path is exact, over all start
// states, since a path must end in the state that it starts from.
#include <cmath>
#include <cstring>
#include <utility>

#include "encoding.h"

namespace {

constexpr int ROWS = 64, COLUMNS = 16, STEPS = 16, LANES = 16, GROUPS = 4, RATES = 9, INT8 = 8, SIDE = 4, ENTRIES = 128;
constexpr float UNIT = 36.0f, FAR = 1e30f;
constexpr double LOWEST = -128, HIGHEST = 127;  // logarithms of scales, in 1/16 octave
constexpr int MEMORY[] = {0, 5, 4, 3, 3, 2, 1, 0};

// Targets, weights and results of sixteen sequences.  Targets and values are in units of the tables.
struct Batch {
    Floats target[STEPS], weight[STEPS];
    Ints code[STEPS];
    Floats value[STEPS];
};

// The values after each window of coded bits in ascending order, with the plain bits of each, and what lies half-way between
// a value and the next one.
struct Book {
    float value[ENTRIES], middle[ENTRIES];
    uint8_t plain[ENTRIES];
};

// The books of rates 1 … 7, from their tables.
struct Books {
    Book by_rate[INT8 - 1];

    explicit Books(const float* tables) {
        for (int rate = 1; rate < INT8; ++rate) {
            Book& book = by_rate[rate - 1];
            const float* table = tables + ENTRIES * (rate - 1);
            const int width = 1 << (rate - 1), size = 2 * width << MEMORY[rate];
            for (int entry = 0; entry < size; ++entry) {
                const int first = entry / width * width;
                int place = entry;
                for (; place > first && book.value[place - 1] > table[entry]; --place) {
                    book.value[place] = book.value[place - 1];
                    book.plain[place] = book.plain[place - 1];
                }
                book.value[place] = table[entry];
                book.plain[place] = uint8_t(entry - first);
            }
            for (int entry = 0; entry + 1 < size; ++entry) book.middle[entry] = (book.value[entry] + book.value[entry + 1]) / 2;
        }
    }

    const Book& of(int rate) const { return by_rate[rate > 0 && rate < INT8 ? rate - 1 : 0]; }
};

// Finds the value that is nearest after each window of coded bits: what it costs, and its number among those of the window.
template <int RATE, int WINDOWS>
INLINE void branches(const Batch& batch, const Book& book, Floats (*cost)[WINDOWS], Ints (*rank)[WINDOWS]) {
    constexpr int PLAIN = 1 << (RATE - 1);
    for (int window = 0; window < WINDOWS; ++window) {
        const float *values = book.value + window * PLAIN, *middles = book.middle + window * PLAIN;
        for (int step = 0; step < STEPS; ++step) {
            Floats nearest = fill(values[0]);
            Ints number = {};
            for (int bits = 1; bits < PLAIN; ++bits) {
                const Ints above = batch.target[step] > middles[bits - 1];
                nearest = above ? values[bits] : nearest;
                number = above ? Ints{} + bits : number;
            }
            const Floats error = batch.target[step] - nearest;
            cost[step][window] = error * error * batch.weight[step];
            rank[step][window] = number;
        }
    }
}

// Takes the better of the two ways into a state, and returns whether it is the one whose window begins with a one.
template <int STATES>
INLINE Ints best_way(const Floats* state, const Floats* cost, int at, Floats& total) {
    const Floats zero = state[at >> 1] + cost[at], one = state[(at | STATES) >> 1] + cost[at | STATES];
    const Ints better = one < zero;
    total = better ? one : zero;
    return better;
}

// Returns the cost of the best path from a state back to itself.  A state is the last `BITS` coded bits: in as many steps one
// way leads from the start to each state, and in the last ones only states matter that can still become the start.
template <int BITS, int WINDOWS>
INLINE Floats best_circle(const Floats (*cost)[WINDOWS], int start) {
    constexpr int STATES = 1 << BITS;
    Floats one[STATES], other[STATES], *state = one, *next = other;
    state[0] = Floats{};
    for (int step = 0; step < BITS; ++step) {
        const Floats* first = cost[step] + (start << (step + 1) & (WINDOWS - 1));  // of the first of 2^step states and a zero
        for (int after = 0; after < 2 << step; ++after) next[after] = state[after >> 1] + first[after];
        std::swap(state, next);
    }
    for (int step = BITS; step < STEPS - BITS; ++step) {
        for (int at = 0; at < STATES; ++at) best_way<STATES>(state, cost[step], at, next[at]);
        std::swap(state, next);
    }
    // From here on state[n] is that of the state start >> left | n << (BITS - left), where `left` steps are left.
    for (int left = BITS - 1; left >= 0; --left) {
        const Floats* costs = cost[STEPS - 1 - left] + (start >> left);
        for (int number = 0; number < 1 << left; ++number) {
            const Floats low = state[number] + costs[number << (BITS - left)];
            const Floats high = state[number | 1 << left] + costs[number << (BITS - left) | STATES];
            next[number] = high < low ? high : low;
        }
        std::swap(state, next);
    }
    return state[0];
}

template <int RATE>
INLINE void best_paths(Batch& batch, const Book& book) {
    constexpr int BITS = MEMORY[RATE], STATES = 1 << BITS, WINDOWS = 2 * STATES, PLAIN = 1 << (RATE - 1);
    Floats cost[STEPS][WINDOWS];
    Ints rank[STEPS][WINDOWS];
    branches<RATE, WINDOWS>(batch, book, cost, rank);
    Floats state[STATES], next[STATES], least = fill(FAR);
    Ints first = {};
    for (int start = 0; start < STATES && STATES > 1; ++start) {
        const Floats circle = best_circle<BITS, WINDOWS>(cost, start);
        const Ints better = circle < least;
        least = better ? circle : least;
        first = better ? Ints{} + start : first;
    }
    Ints high[STEPS][STATES];  // whether the oldest bit of the window of the best path into a state is one
    for (int at = 0; at < STATES; ++at) state[at] = first == at ? fill(0.0f) : fill(FAR);
    for (int step = 0; step < STEPS; ++step) {
        for (int at = 0; at < STATES; ++at) high[step][at] = best_way<STATES>(state, cost[step], at, next[at]);
        std::memcpy(state, next, sizeof state);
    }
    for (int lane = 0; lane < LANES; ++lane) {
        int at = first[lane];
        for (int step = STEPS - 1; step >= 0; --step) {
            const int window = at | (high[step][at][lane] & STATES);  // without a branch, which nobody could predict
            const int entry = window * PLAIN + rank[step][window][lane];
            // A window of one bit (no memory) is its own coded bit; otherwise the coded bit is the newest of the window.
            batch.code[step][lane] = book.plain[entry] << 1 | (window & 1);
            batch.value[step][lane] = book.value[entry];
            at = window >> 1;
        }
    }
}

INLINE void nearest_bytes(Batch& batch) {
    for (int step = 0; step < STEPS; ++step)
        for (int lane = 0; lane < LANES; ++lane) {
            float value = __builtin_rintf(batch.target[step][lane]);
            value = value > 127.0f ? 127.0f : value < -127.0f ? -127.0f : value;
            batch.value[step][lane] = value;
            batch.code[step][lane] = uint8_t(int8_t(value));
        }
}

WIDENED void encode(Batch& batch, int rate, const Book& book) {
    switch (rate) {
        case 1: return best_paths<1>(batch, book);
        case 2: return best_paths<2>(batch, book);
        case 3: return best_paths<3>(batch, book);
        case 4: return best_paths<4>(batch, book);
        case 5: return best_paths<5>(batch, book);
        case 6: return best_paths<6>(batch, book);
        case 7: return best_paths<7>(batch, book);
        case INT8: return nearest_bytes(batch);
        default:
            std::memset(batch.code, 0, sizeof batch.code);
            std::memset(batch.value, 0, sizeof batch.value);
    }
}

// y += factor · x
WIDENED void add_product(float* y, const float* x, float factor, int64_t size) {
    for (int64_t place = 0; place < size; ++place) y[place] += factor * x[place];
}

}  // namespace

extern "C" {

// What all functions share.  Matrices are columns of `rows` floats, rows being a multiple of 64.
struct Encoder {
    int64_t rows;
    const float* tables;  // of rates 1 … 7, 128 floats each
    const float* size;    // [rows]: a weight is expected to be as large as size · scale
};

}  // extern "C"

#include "encoding.h"

namespace {

// Encodes `count` groups of rows of one column, up to four, at their rates; `sizes` of the rows.
WIDENED void encode_column(const Books& books, const float* sizes, const float* target, float scale, const uint8_t* rates,
                           int count, uint8_t* codes, float* values) {
    Batch batch;
    bool done[GROUPS] = {};
    for (int lead = 0; lead < count; ++lead) {
        if (done[lead]) continue;
        const int rate = rates[lead];
        int members[GROUPS], found = 0;
        for (int other = lead; other < count; ++other)
            if (rates[other] == rate) {
                members[found++] = other;
                done[other] = true;
            }
        for (int slot = found; slot < GROUPS; ++slot) members[slot] = lead;
        for (int slot = 0; slot < GROUPS; ++slot) {
            const int64_t first = members[slot] * ROWS;
            for (int step = 0; step < STEPS; ++step)
                for (int lane = 0; lane < SIDE; ++lane) {
                    const float size = sizes[first + SIDE * step + lane];
                    batch.target[step][SIDE * slot + lane] = target[first + SIDE * step + lane] * UNIT / (size * scale);
                    batch.weight[step][SIDE * slot + lane] = size * size;
                }
        }
        encode(batch, rate, books.of(rate));
        for (int slot = 0; slot < found; ++slot) {
            const int64_t first = members[slot] * ROWS;
            for (int step = 0; step < STEPS; ++step)
                for (int lane = 0; lane < SIDE; ++lane) {
                    const int64_t row = first + SIDE * step + lane;
                    codes[row] = uint8_t(batch.code[step][SIDE * slot + lane]);
                    values[row] = batch.value[step][SIDE * slot + lane] * sizes[row] * scale / UNIT;
                }
        }
    }
}

}  // namespace

extern "C" {

// Finds the best codes of `count` sequences of 16 steps at one rate: targets[count][16] in units of the table.
EXPORTED void nashswarm_trellis_paths(const float* tables, int rate, const float* targets, const float* weights, int64_t count,
                                      uint8_t* codes, int threads) {
    const Books books(tables);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < count; first += LANES) {
        Batch batch;
        for (int lane = 0; lane < LANES; ++lane) {
            const int64_t sequence = first + lane < count ? first + lane : first;
            for (int step = 0; step < STEPS; ++step) {
                batch.target[step][lane] = targets[sequence * STEPS + step];
                batch.weight[step][lane] = weights[sequence * STEPS + step];
            }
        }
        encode(batch, rate, books.of(rate));
        for (int lane = 0; lane < LANES && first + lane < count; ++lane)
            for (int step = 0; step < STEPS; ++step) codes[(first + lane) * STEPS + step] = uint8_t(batch.code[step][lane]);
    }
}

// One block of columns of error feedback.  targets[columns][rows] are corrected in place; errors[columns][rows] receive
// what later columns have to compensate for: the later block subtracts factor · errors.  rates[columns][groups].  The scale
// of each column is the one of least error among `count` offsets, in 1/16 octave, from its root mean square.  Costs and codes
// of the offsets are kept in costs[batches][count], tried_codes[count][rows] and tried_values[count][rows].
EXPORTED void nashswarm_trellis_feedback(const Encoder* encoder, int64_t columns, float* targets, const float* factor,
                                         const int32_t* offsets, int64_t count, const uint8_t* rates, uint8_t* codes,
                                         float* values, float* scales, float* errors, double* costs, uint8_t* tried_codes,
                                         float* tried_values, int threads) {
    const Books books(encoder->tables);
    const int64_t rows = encoder->rows, groups = rows / ROWS, batches = (groups + GROUPS - 1) / GROUPS;
    const auto members = [&](int64_t batch) { return int(groups - batch * GROUPS < GROUPS ? groups - batch * GROUPS : GROUPS); };
    for (int64_t column = 0; column < columns; ++column) {
        float *target = targets + column * rows, *error = errors + column * rows, *value = values + column * rows;
        const uint8_t* rate = rates + column * groups;
        double sum = 0;
        int64_t coded = 0;
        for (int64_t row = 0; row < rows; ++row) {
            if (!rate[row / ROWS]) continue;
            const float unit = target[row] / encoder->size[row];
            sum += double(unit) * unit;
            ++coded;
        }
        const double middle = coded && sum > 0 ? std::round(16 * std::log2(std::sqrt(sum / coded))) : LOWEST;
        const auto scale_at = [&](int64_t choice) {
            const double code = middle + offsets[choice];
            return float(std::exp2((code < LOWEST ? LOWEST : code > HIGHEST ? HIGHEST : code) / 16));
        };
        const int64_t choices = coded ? count : 1;
#pragma omp parallel for num_threads(threads) if (threads > 1 && batches * choices > 1) schedule(dynamic)
        for (int64_t task = 0; task < batches * choices; ++task) {
            const int64_t batch = task / choices, choice = task % choices, begin = batch * GROUPS * ROWS;
            const int64_t size = members(batch) * ROWS;
            float* reply = tried_values + choice * rows + begin;
            encode_column(books, encoder->size + begin, target + begin, scale_at(choice), rate + batch * GROUPS,
                          members(batch), tried_codes + choice * rows + begin, reply);
            double cost = 0;
            for (int64_t row = 0; row < size; ++row) {
                const double left = double(target[begin + row]) - reply[row];
                cost += left * left;
            }
            costs[batch * count + choice] = cost;
        }
        int64_t best = 0;
        double least = 0;
        for (int64_t choice = 0; choice < choices; ++choice) {
            double total = 0;
            for (int64_t batch = 0; batch < batches; ++batch) total += costs[batch * count + choice];
            if (choice == 0 || total < least) {
                least = total;
                best = choice;
            }
        }
        scales[column] = scale_at(best);
        std::memcpy(codes + column * rows, tried_codes + best * rows, rows);
        std::memcpy(value, tried_values + best * rows, rows * sizeof(float));
        const float diagonal = 1.0f / factor[column * columns + column];
#pragma omp parallel for num_threads(threads) if (threads > 1 && batches > 1) schedule(dynamic)
        for (int64_t batch = 0; batch < batches; ++batch) {
            const int64_t begin = batch * GROUPS * ROWS, size = members(batch) * ROWS;
            for (int64_t row = begin; row < begin + size; ++row) error[row] = (target[row] - value[row]) * diagonal;
            for (int64_t later = column + 1; later < columns; ++later)
                add_product(targets + later * rows + begin, error + begin, -factor[column * columns + later], size);
        }
    }
}

// One block of columns of a sweep: every column takes its best codes, all others staying.  slopes = (W − Q) H of the block
// follow the moves, which are added to values[columns][rows] and to moves[columns][rows].  Returns the number of sequences
// that changed; gains[groups] receives by how much the damage fell.
EXPORTED int64_t nashswarm_trellis_sweep(const Encoder* encoder, int64_t columns, float* slopes, const float* curvature,
                                         const float* scales, const uint8_t* rates, uint8_t* codes, float* values,
                                         float* moves, double* gains, int threads) {
    const Books books(encoder->tables);
    const int64_t rows = encoder->rows, groups = rows / ROWS;
    int64_t changed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic) reduction(+ : changed)
    for (int64_t group = 0; group < groups; group += GROUPS) {
        const int count = groups - group < GROUPS ? int(groups - group) : GROUPS;
        const int64_t begin = group * ROWS, size = count * ROWS;
        float target[GROUPS * ROWS], reply[GROUPS * ROWS], step[GROUPS * ROWS];
        uint8_t code[GROUPS * ROWS];
        for (int64_t column = 0; column < columns; ++column) {
            float *slope = slopes + column * rows + begin, *value = values + column * rows + begin;
            uint8_t* own = codes + column * rows + begin;
            const float stiffness = curvature[column * columns + column], inverse = 1.0f / stiffness;
            for (int64_t row = 0; row < size; ++row) target[row] = value[row] + slope[row] * inverse;
            encode_column(books, encoder->size + begin, target, scales[column], rates + column * groups + group, count, code,
                          reply);
            bool moved = false;
            for (int64_t first = 0; first < size; first += ROWS)
                for (int lane = 0; lane < SIDE; ++lane) {  // one sequence: rows first + lane, + 4, …
                    double gain = 0;
                    for (int at = lane; at < ROWS; at += SIDE) {
                        const double by = double(reply[first + at]) - value[first + at];
                        gain += by * (slope[first + at] - 0.5 * stiffness * by);
                    }
                    const bool better = gain > 0;
                    if (better) gains[group + first / ROWS] += gain;
                    changed += better;
                    moved |= better;
                    for (int at = lane; at < ROWS; at += SIDE) {
                        const int64_t row = first + at;
                        step[row] = better ? reply[row] - value[row] : 0.0f;
                        if (better) {
                            own[row] = code[row];
                            value[row] = reply[row];
                        }
                    }
                }
            if (!moved) continue;
            add_product(moves + column * rows + begin, step, 1.0f, size);
            for (int64_t other = 0; other < columns; ++other)
                add_product(slopes + other * rows + begin, step, -curvature[column * columns + other], size);
        }
    }
    return changed;
}

// What each tile of one tile column would gain in damage by other rates: its 16 (or fewer) columns reply one after another at
// the other rate, all other tiles staying.  slopes, values: [columns][rows]; changes[groups][9] receives damage after − before
// at the rates whose bits are set in masks[groups].  If `adopted`, the replies are kept: codes, values and moves change, and a
// mask has one bit at most.
EXPORTED void nashswarm_trellis_deviations(const Encoder* encoder, int64_t columns, const float* slopes, const float* curvature,
                                           const float* scales, const int32_t* masks, int adopted, uint8_t* codes,
                                           float* values, float* moves, double* changes, int threads) {
    const Books books(encoder->tables);
    const int64_t rows = encoder->rows, groups = rows / ROWS;
    // A task is a rate and four of the groups that try it, which share a batch.
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (int64_t task = 0; task < RATES * ((groups + GROUPS - 1) / GROUPS); ++task) {
        const int rate = int(task % RATES);
        int64_t skipped = task / RATES * GROUPS, group[GROUPS];
        int count = 0;
        for (int64_t one = 0; one < groups && count < GROUPS; ++one)
            if (masks[one] >> rate & 1 && skipped-- <= 0) group[count++] = one;
        if (!count) continue;
        float slope[COLUMNS][GROUPS * ROWS], sizes[GROUPS * ROWS], target[GROUPS * ROWS], reply[GROUPS * ROWS];
        float step[GROUPS * ROWS];
        uint8_t code[GROUPS * ROWS], rates[GROUPS];
        double change[GROUPS] = {};
        for (int member = 0; member < count; ++member) {
            rates[member] = uint8_t(rate);
            std::memcpy(sizes + member * ROWS, encoder->size + group[member] * ROWS, ROWS * sizeof(float));
            for (int64_t column = 0; column < columns; ++column)
                std::memcpy(slope[column] + member * ROWS, slopes + column * rows + group[member] * ROWS, ROWS * sizeof(float));
        }
        for (int64_t column = 0; column < columns; ++column) {
            const float stiffness = curvature[column * columns + column], inverse = 1.0f / stiffness;
            const auto place = [&](int row) { return column * rows + group[row / ROWS] * ROWS + row % ROWS; };
            for (int row = 0; row < count * ROWS; ++row) target[row] = values[place(row)] + slope[column][row] * inverse;
            encode_column(books, sizes, target, scales[column], rates, count, code, reply);
            for (int row = 0; row < count * ROWS; ++row) {
                const float by = reply[row] - values[place(row)];
                change[row / ROWS] -= double(by) * (slope[column][row] - 0.5 * double(stiffness) * by);
                step[row] = by;
                if (!adopted) continue;
                codes[place(row)] = code[row];
                values[place(row)] = reply[row];
                moves[place(row)] += by;
            }
            for (int64_t other = column + 1; other < columns; ++other)
                add_product(slope[other], step, -curvature[column * columns + other], count * ROWS);
        }
        for (int member = 0; member < count; ++member) changes[group[member] * RATES + rate] = change[member];
    }
}

}  // extern "C"
