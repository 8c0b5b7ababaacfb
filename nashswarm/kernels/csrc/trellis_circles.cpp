// Best circular paths for the certificate, in double precision.  It must not trust the encoder of trellis_encode.cpp, and
// shares no sum with it, only the form of the tables and how functions are compiled.  experiment/best_paths.py says what is
// computed, and does the same.
#include <limits>

#include "encoding.h"

namespace {

constexpr int STEPS = 16, LANES = 8;  // of a sequence; sequences at once
constexpr double ROUNDING = 1e-12;    // relative, more than sums in another order differ

typedef double Doubles __attribute__((vector_size(8 * LANES)));
typedef int64_t Longs __attribute__((vector_size(8 * LANES)));

// The window that is read at a step on the only way between two states in `BITS` steps.
template <int BITS>
INLINE int window_between(int start, int end, int step) {
    return (start << (step + 1) | end >> (BITS - 1 - step)) & ((2 << BITS) - 1);
}

// Takes one step from all states to all states; `one_first` tells whose best window begins with a one.
template <int STATES>
INLINE void advance(const Doubles* total, const Doubles* cost, Doubles* after, Longs* one_first) {
    for (int state = 0; state < STATES; ++state) {
        const Doubles zero = total[state >> 1] + cost[state];
        const Doubles one = total[(state | STATES) >> 1] + cost[state | STATES];
        one_first[state] = one < zero;
        after[state] = one < zero ? one : zero;
    }
}

// Takes all steps from `start`, of each lane.
template <int BITS>
INLINE void follow(const Doubles (*cost)[2 << BITS], const Longs& start, Doubles* total, Longs (*one_first)[1 << BITS]) {
    constexpr int STATES = 1 << BITS;
    Doubles after[STATES];
    for (int state = 0; state < STATES; ++state)
        total[state] = start == state ? Doubles{} : Doubles{} + std::numeric_limits<double>::infinity();
    for (int step = 0; step < STEPS; ++step) {
        advance<STATES>(total, cost[step], after, one_first[step]);
        for (int state = 0; state < STATES; ++state) total[state] = after[state];
    }
}

// Writes what a circle through each state costs at least: the best way to it from anywhere, and from it to anywhere.
template <int BITS>
INLINE void bound_circles(const Doubles (*cost)[2 << BITS], Doubles* bound) {
    constexpr int STATES = 1 << BITS;
    Doubles to[STATES] = {}, from[STATES] = {}, after[STATES];
    Longs unused[STATES];
    for (int step = 0; step < STEPS; ++step) {
        advance<STATES>(to, cost[step], after, unused);
        for (int state = 0; state < STATES; ++state) to[state] = after[state];
    }
    for (int step = STEPS - 1; step >= 0; --step) {
        for (int state = 0; state < STATES; ++state) {
            const int zero = 2 * state, one = 2 * state + 1;
            const Doubles by_zero = cost[step][zero] + from[zero & (STATES - 1)];
            const Doubles by_one = cost[step][one] + from[one & (STATES - 1)];
            after[state] = by_one < by_zero ? by_one : by_zero;
        }
        for (int state = 0; state < STATES; ++state) from[state] = after[state];
    }
    for (int state = 0; state < STATES; ++state)
        bound[state] = (from[state] < to[state] ? to[state] : from[state]) * (1 - ROUNDING);
}

INLINE bool any(const Longs& lanes) {
    int64_t all = 0;
    for (int lane = 0; lane < LANES; ++lane) all |= lanes[lane];
    return all != 0;
}

// Writes the best windows of some sequences; cost[step][window].  A circle through some state bounds the best from above;
// states whose own bound is above it, in every lane, are not tried.
template <int BITS>
INLINE void best_windows(const Doubles (*cost)[2 << BITS], Longs* window) {
    constexpr int STATES = 1 << BITS;
    Doubles total[STATES], after[STATES];
    Longs one_first[STEPS][STATES];
    Doubles least = Doubles{} + std::numeric_limits<double>::infinity();
    Longs best = {};
    Doubles bound[STATES] = {}, enough = least;
    if constexpr (BITS > 3) {  // fewer states are tried as fast as they are bounded
        bound_circles<BITS>(cost, bound);
        Doubles lowest = bound[0];
        for (int state = 1; state < STATES; ++state) {
            best = bound[state] < lowest ? Longs{} + state : best;
            lowest = bound[state] < lowest ? bound[state] : lowest;
        }
        follow<BITS>(cost, best, total, one_first);
        for (int state = 0; state < STATES; ++state) enough = best == state ? total[state] * (1 + ROUNDING) : enough;
    }
    for (int start = 0; start < STATES; ++start) {
        if (BITS > 3 && !any(bound[start] <= (least < enough ? least : enough))) continue;
        for (int state = 0; state < STATES; ++state) {
            total[state] = Doubles{};
            for (int step = 0; step < BITS; ++step)
                total[state] += cost[step][window_between<BITS>(start, state, step)];
        }
        for (int step = BITS; step < STEPS - BITS; ++step) {
            advance<STATES>(total, cost[step], after, one_first[step]);
            for (int state = 0; state < STATES; ++state) total[state] = after[state];
        }
        for (int state = 0; state < STATES; ++state) {
            Doubles last = {};
            for (int step = 0; step < BITS; ++step)
                last += cost[STEPS - BITS + step][window_between<BITS>(state, start, step)];
            const Doubles circle = total[state] + last;
            best = circle < least ? Longs{} + start : best;
            least = circle < least ? circle : least;
        }
    }
    follow<BITS>(cost, best, total, one_first);
    for (int lane = 0; lane < LANES; ++lane) {
        int64_t at = best[lane];
        for (int step = STEPS - 1; step >= 0; --step) {
            const int64_t read = at + (one_first[step][at][lane] ? STATES : 0);
            window[step][lane] = read;
            at = read >> 1;
        }
    }
}

// Finds the best values of the sequences from `begin`, at most `LANES`.
template <int BITS>
INLINE void best_values(const double* nearest, int64_t cells, const int64_t* cell, const double* target,
                        const double* weight, int64_t begin, int64_t count, double* value) {
    constexpr int WINDOWS = 2 << BITS;
    const int lanes = int(count - begin < LANES ? count - begin : LANES);
    Doubles cost[STEPS][WINDOWS];
    for (int step = 0; step < STEPS; ++step) {
        const int64_t place = step * count + begin;
        for (int window = 0; window < WINDOWS; ++window)
            for (int lane = 0; lane < LANES; ++lane) {
                const int64_t own = place + (lane < lanes ? lane : 0);
                const double error = nearest[window * cells + cell[own]] - target[own];
                cost[step][window][lane] = error * error * weight[own];
            }
    }
    Longs window[STEPS];
    best_windows<BITS>(cost, window);
    for (int step = 0; step < STEPS; ++step)
        for (int lane = 0; lane < lanes; ++lane) {
            const int64_t own = step * count + begin + lane;
            value[own] = nearest[window[step][lane] * cells + cell[own]];
        }
}

template <int BITS>
INLINE void all_values(const double* nearest, int64_t cells, const int64_t* cell, const double* target,
                       const double* weight, int64_t count, double* value) {
    for (int64_t begin = 0; begin < count; begin += LANES)
        best_values<BITS>(nearest, cells, cell, target, weight, begin, count, value);
}

}  // namespace

extern "C" {

// Finds the values of least weighted squared error of `count` sequences, target[16][count], of which one begins and ends
// in the same state.  nearest[2 << bits][cells] has the entry that is nearest in each cell; cell[16][count].
EXPORTED WIDENED void nashswarm_trellis_circles(const double* nearest, int64_t cells, int bits, const int64_t* cell,
                                                const double* target, const double* weight, int64_t count,
                                                double* value) {
    switch (bits) {
        case 0: return all_values<0>(nearest, cells, cell, target, weight, count, value);
        case 1: return all_values<1>(nearest, cells, cell, target, weight, count, value);
        case 2: return all_values<2>(nearest, cells, cell, target, weight, count, value);
        case 3: return all_values<3>(nearest, cells, cell, target, weight, count, value);
        case 4: return all_values<4>(nearest, cells, cell, target, weight, count, value);
        case 5: return all_values<5>(nearest, cells, cell, target, weight, count, value);
    }
}

}  // extern "C"
