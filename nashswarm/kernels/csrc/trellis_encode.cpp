// The encoder of trellis tiles (see trellis.py for their form): best paths of columns, inside error feedback and sweeps.
//
// A batch is up to four groups of 64 rows: sixteen sequences of 16 steps, one in each lane of a vector.  Lane 4i + q and
// step t belong to row 64 g_i + 4t + q.  Path costs are weighted squared errors; the best path is exact, over all start
// states, since a path must end in the state that it starts from.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int ROWS = 64, COLUMNS = 16, STEPS = 16, LANES = 16, GROUPS = 4, RATES = 9, INT8 = 8, SIDE = 4;
constexpr float UNIT = 36.0f, FAR = 1e30f;
constexpr double LOWEST = -128, HIGHEST = 127;  // logarithms of scales, in 1/16 octave
constexpr int MEMORY[] = {0, 5, 4, 3, 3, 2, 1, 0};

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

#define INLINE __attribute__((always_inline)) inline
#define EXPORTED __attribute__((visibility("default")))
#if defined(__x86_64__) && defined(__GLIBC__)
#define WIDENED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDENED
#endif

INLINE Floats fill(float value) { return Floats{} + value; }

// Targets, weights and results of sixteen sequences.  Targets and values are in units of the tables.
struct Batch {
    Floats target[STEPS], weight[STEPS];
    Ints code[STEPS];
    Floats value[STEPS];
};

// Finds the plain bits that are best after each window of coded bits: their costs and codes.
template <int RATE, int WINDOWS>
INLINE void branches(const Batch& batch, const float* table, Floats (*cost)[WINDOWS], Ints (*plain)[WINDOWS]) {
    constexpr int PLAIN = 1 << (RATE - 1);
    for (int step = 0; step < STEPS; ++step)
        for (int window = 0; window < WINDOWS; ++window) {
            const float* values = table + window * PLAIN;
            Floats least = batch.target[step] - values[0];
            least *= least;
            Ints best = {};
            for (int bits = 1; bits < PLAIN; ++bits) {
                Floats other = batch.target[step] - values[bits];
                other *= other;
                const Ints better = other < least;
                least = better ? other : least;
                best = better ? Ints{} + bits : best;
            }
            cost[step][window] = least * batch.weight[step];
            plain[step][window] = best;
        }
}

template <int RATE>
INLINE void best_paths(Batch& batch, const float* table) {
    constexpr int BITS = MEMORY[RATE], STATES = 1 << BITS, WINDOWS = 2 * STATES, PLAIN = 1 << (RATE - 1);
    Floats cost[STEPS][WINDOWS];
    Ints plain[STEPS][WINDOWS];
    branches<RATE, WINDOWS>(batch, table, cost, plain);
    Floats state[STATES], next[STATES], least = fill(FAR);
    Ints first = {};
    for (int start = 0; start < STATES && STATES > 1; ++start) {  // the cost of the best circle through each start
        for (int at = 0; at < STATES; ++at) state[at] = fill(at == start ? 0.0f : FAR);
        for (int step = 0; step < STEPS; ++step) {
            for (int at = 0; at < STATES; ++at) {
                const Floats zero = state[at >> 1] + cost[step][at];
                const Floats one = state[(at | STATES) >> 1] + cost[step][at | STATES];
                next[at] = one < zero ? one : zero;
            }
            std::memcpy(state, next, sizeof state);
        }
        const Ints better = state[start] < least;
        least = better ? state[start] : least;
        first = better ? Ints{} + start : first;
    }
    Ints high[STEPS][STATES];  // whether the oldest bit of the window of the best path into a state is one
    for (int at = 0; at < STATES; ++at) state[at] = first == at ? fill(0.0f) : fill(FAR);
    for (int step = 0; step < STEPS; ++step) {
        for (int at = 0; at < STATES; ++at) {
            const Floats zero = state[at >> 1] + cost[step][at];
            const Floats one = state[(at | STATES) >> 1] + cost[step][at | STATES];
            high[step][at] = one < zero;
            next[at] = one < zero ? one : zero;
        }
        std::memcpy(state, next, sizeof state);
    }
    for (int lane = 0; lane < LANES; ++lane) {
        int at = first[lane];
        for (int step = STEPS - 1; step >= 0; --step) {
            const int window = high[step][at][lane] ? at | STATES : at;
            const int bits = plain[step][window][lane];
            // A window of one bit (no memory) is its own coded bit; otherwise the coded bit is the newest of the window.
            batch.code[step][lane] = bits << 1 | (window & 1);
            batch.value[step][lane] = table[window * PLAIN + bits];
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

WIDENED void encode(Batch& batch, int rate, const float* table) {
    switch (rate) {
        case 1: return best_paths<1>(batch, table);
        case 2: return best_paths<2>(batch, table);
        case 3: return best_paths<3>(batch, table);
        case 4: return best_paths<4>(batch, table);
        case 5: return best_paths<5>(batch, table);
        case 6: return best_paths<6>(batch, table);
        case 7: return best_paths<7>(batch, table);
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
    const float* tables;      // of rates 1 … 7, 128 floats each
    const float* size;        // [rows]: a weight is expected to be as large as size · scale
};

}  // extern "C"

namespace {

const float* table_of(const Encoder& encoder, int rate) { return encoder.tables + 128 * (rate > 0 && rate < INT8 ? rate - 1 : 0); }

// Encodes the rows of up to four groups of one column, at the rates of the groups.  `column` receives codes and values.
WIDENED void encode_column(const Encoder& encoder, const float* target, float scale, const uint8_t* rates, int64_t group,
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
            const int64_t first = (group + members[slot]) * ROWS;
            for (int step = 0; step < STEPS; ++step)
                for (int lane = 0; lane < SIDE; ++lane) {
                    const float size = encoder.size[first + SIDE * step + lane];
                    batch.target[step][SIDE * slot + lane] = target[first + SIDE * step + lane] * UNIT / (size * scale);
                    batch.weight[step][SIDE * slot + lane] = size * size;
                }
        }
        encode(batch, rate, table_of(encoder, rate));
        for (int slot = 0; slot < found; ++slot) {
            const int64_t first = (group + members[slot]) * ROWS;
            for (int step = 0; step < STEPS; ++step)
                for (int lane = 0; lane < SIDE; ++lane) {
                    const int64_t row = first + SIDE * step + lane;
                    codes[row] = uint8_t(batch.code[step][SIDE * slot + lane]);
                    values[row] = batch.value[step][SIDE * slot + lane] * encoder.size[row] * scale / UNIT;
                }
        }
    }
}

}  // namespace

extern "C" {

// Finds the best codes of `count` sequences of 16 steps at one rate: targets[count][16] in units of the table.
EXPORTED void nashswarm_trellis_paths(const float* tables, int rate, const float* targets, const float* weights, int64_t count,
                                      uint8_t* codes, int threads) {
    const float* table = tables + 128 * (rate > 0 && rate < INT8 ? rate - 1 : 0);
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
        encode(batch, rate, table);
        for (int lane = 0; lane < LANES && first + lane < count; ++lane)
            for (int step = 0; step < STEPS; ++step) codes[(first + lane) * STEPS + step] = uint8_t(batch.code[step][lane]);
    }
}

// One block of columns of error feedback.  targets[columns][rows] are corrected in place; errors[columns][rows] receive
// what later columns have to compensate for: the later block subtracts factor · errors.  rates[columns][groups].  The scale
// of each column is the one of least error among `count` offsets, in 1/16 octave, from its root mean square.
EXPORTED void nashswarm_trellis_feedback(const Encoder* encoder, int64_t columns, float* targets, const float* factor,
                                         const int32_t* offsets, int64_t count, const uint8_t* rates, uint8_t* codes,
                                         float* values, float* scales, float* errors, double* costs, int threads) {
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
        int64_t best = 0;
        if (count > 1 && coded) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && batches * count > 2) schedule(dynamic)
            for (int64_t task = 0; task < batches * count; ++task) {
                const int64_t batch = task / count, begin = batch * GROUPS * ROWS, size = members(batch) * ROWS;
                float reply[GROUPS * ROWS];
                uint8_t code[GROUPS * ROWS];
                const Encoder part{size, encoder->tables, encoder->size + begin};
                encode_column(part, target + begin, scale_at(task % count), rate + batch * GROUPS, 0, members(batch), code,
                              reply);
                double cost = 0;
                for (int64_t row = 0; row < size; ++row) {
                    const double left = double(target[begin + row]) - reply[row];
                    cost += left * left;
                }
                costs[task] = cost;
            }
            double least = 0;
            for (int64_t choice = 0; choice < count; ++choice) {
                double total = 0;
                for (int64_t batch = 0; batch < batches; ++batch) total += costs[batch * count + choice];
                if (choice == 0 || total < least) {
                    least = total;
                    best = choice;
                }
            }
        }
        scales[column] = scale_at(best);
        const float diagonal = 1.0f / factor[column * columns + column];
#pragma omp parallel for num_threads(threads) if (threads > 1 && batches > 1) schedule(dynamic)
        for (int64_t batch = 0; batch < batches; ++batch) {
            const int64_t begin = batch * GROUPS * ROWS, size = members(batch) * ROWS;
            encode_column(*encoder, target, scales[column], rate + batch * GROUPS, batch * GROUPS, members(batch),
                          codes + column * rows, value);
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
            const Encoder part{size, encoder->tables, encoder->size + begin};
            encode_column(part, target, scales[column], rates + column * groups + group, 0, count, code, reply);
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

// What each tile of one tile column would gain in damage by each rate: its 16 (or fewer) columns reply one after another at
// the other rate, all other tiles staying.  slopes, values: [columns][rows]; changes[groups][9] receives damage after − before;
// rates not in `mask` are left out.  With `chosen`, the rates of the groups (255: keep), the replies are adopted instead:
// codes, values and moves change.
EXPORTED void nashswarm_trellis_deviations(const Encoder* encoder, int64_t columns, const float* slopes, const float* curvature,
                                           const float* scales, int mask, const uint8_t* chosen, uint8_t* codes,
                                           float* values, float* moves, double* changes, int threads) {
    const int64_t rows = encoder->rows, groups = rows / ROWS;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (int64_t group = 0; group < groups; group += GROUPS) {
        const int count = groups - group < GROUPS ? int(groups - group) : GROUPS;
        const int64_t begin = group * ROWS, size = count * ROWS;
        float slope[COLUMNS][GROUPS * ROWS], target[GROUPS * ROWS], reply[GROUPS * ROWS], step[GROUPS * ROWS];
        uint8_t code[GROUPS * ROWS], rates[GROUPS];
        const Encoder part{size, encoder->tables, encoder->size + begin};
        for (int rate = 0; rate < RATES; ++rate) {
            if (!(mask >> rate & 1)) continue;
            bool any = !chosen;
            for (int member = 0; member < count; ++member) {
                rates[member] = uint8_t(rate);
                any |= chosen && chosen[group + member] == rate;
            }
            if (!any) continue;
            for (int64_t column = 0; column < columns; ++column)
                std::memcpy(slope[column], slopes + column * rows + begin, size * sizeof(float));
            double change[GROUPS] = {};
            for (int64_t column = 0; column < columns; ++column) {
                float* value = values + column * rows + begin;
                const float stiffness = curvature[column * columns + column], inverse = 1.0f / stiffness;
                for (int64_t row = 0; row < size; ++row) target[row] = value[row] + slope[column][row] * inverse;
                encode_column(part, target, scales[column], rates, 0, count, code, reply);
                for (int member = 0; member < count; ++member) {
                    const bool takes = !chosen || chosen[group + member] == rate;
                    for (int64_t row = member * ROWS; row < (member + 1) * ROWS; ++row) {
                        const float by = takes ? reply[row] - value[row] : 0.0f;
                        change[member] -= double(by) * (slope[column][row] - 0.5 * double(stiffness) * by);
                        step[row] = by;
                    }
                    if (!chosen || !takes) continue;
                    for (int64_t row = member * ROWS; row < (member + 1) * ROWS; ++row) {
                        codes[column * rows + begin + row] = code[row];
                        value[row] = reply[row];
                        moves[column * rows + begin + row] += step[row];
                    }
                }
                for (int64_t other = column + 1; other < columns; ++other)
                    add_product(slope[other], step, -curvature[column * columns + other], size);
            }
            for (int member = 0; member < count; ++member) changes[(group + member) * RATES + rate] = change[member];
        }
    }
}

}  // extern "C"
