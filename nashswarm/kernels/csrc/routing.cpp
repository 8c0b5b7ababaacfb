// Routing of tokens to experts: the choice, sorting by expert, the experts, and the sums of their outputs.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "mixture.h"

using namespace nashswarm;

namespace {

constexpr int64_t ENOUGH_SCORES = 1 << 16;  // that justify one more thread
constexpr int64_t LANES = 16;  // numbers side by side, to fill a register
constexpr int64_t FEW = 8;  // assignments that are not worth sorting
constexpr int64_t MANY = 256;  // places among which few enter a ranking, so that branches are foreseen: rows one by one

int64_t rounded_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Finds the places of the `count` largest of value(0) … value(size − 1), in descending order; ties go to the earlier.
template <class Value>
void largest(Value value, int64_t size, int64_t count, float* best, int64_t* places) {
    for (int64_t place = 0; place < size; ++place) {
        const float own = value(place);
        if (place >= count && !(own > best[count - 1])) continue;
        int64_t rank = place < count ? place : count - 1;
        for (; rank > 0 && own > best[rank - 1]; --rank) {
            best[rank] = best[rank - 1];
            places[rank] = places[rank - 1];
        }
        best[rank] = own;
        places[rank] = place;
    }
}

#define EXPORTED __attribute__((visibility("default")))
#if defined(__x86_64__) && defined(__GLIBC__)
#define WIDENED __attribute__((target_clones("avx512f", "avx2", "default")))  // the same sums in wider registers
#else
#define WIDENED
#endif

// What `nashswarm_route` is given.
struct Choice {
    const float *scores, *entry, *cost, *price;
    int64_t size, flock, k;
    int64_t* chosen;
    float* gates;
};

// Writes the gates of the experts that a row has chosen.
void write_gates(const Choice& all, int64_t row) {
    const float* own = all.scores + row * all.size;
    const int64_t* found = all.chosen + row * all.k;
    float* gate = all.gates + row * all.k;
    const auto paid = [&](int64_t place) { return own[place] - all.price[place]; };
    float most = paid(found[0]), sum = 0;
    for (int64_t rank = 1; rank < all.k; ++rank) most = std::fmax(most, paid(found[rank]));
    for (int64_t rank = 0; rank < all.k; ++rank) sum += gate[rank] = std::exp(paid(found[rank]) - most);
    if (all.k == 1)
        for (int64_t place = 0; place < all.size; ++place)
            if (place != found[0]) sum += std::exp(paid(place) - most);
    for (int64_t rank = 0; rank < all.k; ++rank) gate[rank] /= sum;
}

// Chooses for one row.
void choose(const Choice& all, int64_t row, float* scratch) {
    const float* own = all.scores + row * all.size;
    int64_t* found = all.chosen + row * all.k;
    auto* near = reinterpret_cast<int64_t*>(scratch);
    auto *values = reinterpret_cast<float*>(near + all.flock), *best = values + all.flock;
    if (all.flock == all.size) {
        largest([&](int64_t place) { return own[place] - all.cost[place]; }, all.size, all.k, best, found);
    } else {
        largest([&](int64_t place) { return own[place] - all.entry[place]; }, all.size, all.flock, values, near);
        largest([&](int64_t place) { return own[near[place]] - all.cost[near[place]]; }, all.flock, all.k, best, found);
        for (int64_t rank = 0; rank < all.k; ++rank) found[rank] = near[found[rank]];
    }
    write_gates(all, row);
}

// Does as `largest` for LANES rows side by side, without a branch that depends on one row: a value that enters the ranking
// pushes all after it one rank down.  `values`, `best` and `places` have the numbers of the rows next to one another.
WIDENED void largest_side_by_side(const float* values, int64_t size, int64_t count, float* best, int32_t* places) {
    for (int64_t place = 0; place < size; ++place) {
        if (place >= count) {
            int32_t reached = 0;
            for (int64_t lane = 0; lane < LANES; ++lane)
                reached |= int32_t(values[place * LANES + lane] > best[(count - 1) * LANES + lane]);
            if (!reached) continue;
        }
        float pushed[LANES];
        int32_t whose[LANES], enters[LANES] = {};
        for (int64_t lane = 0; lane < LANES; ++lane) pushed[lane] = values[place * LANES + lane];
        for (int64_t lane = 0; lane < LANES; ++lane) whose[lane] = int32_t(place);
        const int64_t ranked = place < count ? place : count;
        for (int64_t rank = 0; rank < ranked; ++rank) {
            float* held = best + rank * LANES;
            int32_t* holder = places + rank * LANES;
            for (int64_t lane = 0; lane < LANES; ++lane) {
                enters[lane] |= -int32_t(pushed[lane] > held[lane]);
                const float value = enters[lane] ? pushed[lane] : held[lane];
                const int32_t owner = enters[lane] ? whose[lane] : holder[lane];
                pushed[lane] = enters[lane] ? held[lane] : pushed[lane];
                whose[lane] = enters[lane] ? holder[lane] : whose[lane];
                held[lane] = value;
                holder[lane] = owner;
            }
        }
        if (ranked == count) continue;
        std::memcpy(best + ranked * LANES, pushed, sizeof(pushed));
        std::memcpy(places + ranked * LANES, whose, sizeof(whose));
    }
}

// Chooses for LANES rows from `first` on.
void choose_side_by_side(const Choice& all, int64_t first, float* scratch) {
    const float* own = all.scores + first * all.size;
    float *values = scratch, *best = values + all.size * LANES;
    auto* near = reinterpret_cast<int32_t*>(best + all.flock * LANES);
    auto* found = near + all.flock * LANES;
    const bool all_near = all.flock == all.size;
    const float* charged = all_near ? all.cost : all.entry;
    for (int64_t begin = 0; begin < all.size; begin += LANES) {  // squares, as whole rows would leave the cache
        const int64_t end = begin + LANES < all.size ? begin + LANES : all.size;
        for (int64_t lane = 0; lane < LANES; ++lane)
            for (int64_t place = begin; place < end; ++place)
                values[place * LANES + lane] = own[lane * all.size + place] - charged[place];
    }
    largest_side_by_side(values, all.size, all_near ? all.k : all.flock, best, near);
    if (!all_near) {
        for (int64_t rank = 0; rank < all.flock; ++rank)
            for (int64_t lane = 0; lane < LANES; ++lane) {
                const int32_t place = near[rank * LANES + lane];
                values[rank * LANES + lane] = own[lane * all.size + place] - all.cost[place];
            }
        largest_side_by_side(values, all.flock, all.k, best, found);
    }
    for (int64_t lane = 0; lane < LANES; ++lane) {
        for (int64_t rank = 0; rank < all.k; ++rank) {
            const int64_t chosen = all_near ? rank : found[rank * LANES + lane];
            all.chosen[(first + lane) * all.k + rank] = near[chosen * LANES + lane];
        }
        write_gates(all, first + lane);
    }
}

inline float product(const float* a, const float* b, int64_t size) {
    float lanes[LANES] = {}, sum = 0;
    int64_t place = 0;
    for (; place + LANES <= size; place += LANES)
        for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += a[place + lane] * b[place + lane];
    for (; place < size; ++place) sum += a[place] * b[place];
    for (float lane : lanes) sum += lane;
    return sum;
}

// x (1 + tanh u) / 2, with tanh written as an exponential.
inline float gelu(float x) { return x / (1 + std::exp(-1.5957691216f * (x + 0.044715f * x * x * x))); }

}  // namespace

extern "C" {

int nashswarm_supports(int path);

// For each row, chooses the k places of the largest score − cost among the `flock` of the largest score − entry.  The gates
// are the softmax of score − price over them, or over all places if k is 1.  Returns 1 if there is no memory, else 0.
EXPORTED int nashswarm_route(const float* scores, const float* entry, const float* cost, const float* price, int64_t rows,
                             int64_t size, int64_t flock, int64_t k, int64_t* chosen, float* gates, int threads) {
    const int64_t work = rows * size / ENOUGH_SCORES;
    const int woken = work < threads ? (work < 1 ? 1 : int(work)) : threads;
    const int64_t each = rounded_up((size + 2 * flock + k) * LANES * sizeof(float) + flock * sizeof(int64_t));
    auto* scratch = static_cast<char*>(std::aligned_alloc(64, woken * each));
    if (!scratch) return 1;
    const Choice choice{scores, entry, cost, price, size, flock, k, chosen, gates};
    const int64_t blocks = (rows + LANES - 1) / LANES;
#pragma omp parallel for num_threads(woken) schedule(static)
    for (int part = 0; part < woken; ++part) {
        auto* own = reinterpret_cast<float*>(scratch + part * each);
        for (int64_t block = blocks * part / woken; block < blocks * (part + 1) / woken; ++block) {
            const int64_t first = block * LANES, last = first + LANES;
            if (last <= rows && size <= MANY) choose_side_by_side(choice, first, own);
            else
                for (int64_t row = first; row < last && row < rows; ++row) choose(choice, row, own);
        }
    }
    std::free(scratch);
    return 0;
}

// For each token, sums the rows at its k places, multiplied by their gates.
EXPORTED void nashswarm_sums(const float* rows, const int64_t* places, const float* gates, int64_t tokens, int64_t k,
                             int64_t width, float* sums, int threads) {
    const int64_t work = tokens * k * width / ENOUGH_SCORES;
    const int woken = work < threads ? (work < 1 ? 1 : int(work)) : threads;
#pragma omp parallel for num_threads(woken) schedule(static)
    for (int64_t token = 0; token < tokens; ++token) {
        float* sum = sums + token * width;
        std::memset(sum, 0, width * sizeof(float));
        for (int64_t rank = token * k; rank < (token + 1) * k; ++rank) {
            const float *row = rows + places[rank] * width, gate = gates[rank];
            for (int64_t place = 0; place < width; ++place) sum[place] += gate * row[place];
        }
    }
}

// Sorts `count` numbers below `size` (stably): writes the order, the place of each number in it, and where the run of each
// number ends.  Returns the place of the first number that is not below `size`, or -1.
EXPORTED int64_t nashswarm_group(const int64_t* numbers, int64_t count, int64_t size, int64_t* order, int64_t* places,
                                 int32_t* ends) {
    std::memset(ends, 0, size * sizeof(int32_t));
    for (int64_t place = 0; place < count; ++place) {
        if (numbers[place] < 0 || numbers[place] >= size) return place;
        ++ends[numbers[place]];
    }
    int32_t before = 0;
    for (int64_t number = 0; number < size; ++number) {
        const int32_t own = ends[number];
        ends[number] = before;
        before += own;
    }
    for (int64_t place = 0; place < count; ++place) {
        places[place] = ends[numbers[place]]++;
        order[places[place]] = place;
    }
    return -1;
}

}  // extern "C"

namespace {

// What `nashswarm_experts` is given.
struct Experts {
    const float *x, *up, *down;
    const int64_t* experts;
    const float* gates;
    int64_t tokens, k, count, width, hidden;
};

WIDENED void compute_few(const Experts& all, float* inner, float* sums) {
    std::memset(sums, 0, all.tokens * all.width * sizeof(float));
    for (int64_t rank = 0; rank < all.tokens * all.k; ++rank) {
        const float *own = all.x + rank / all.k * all.width, *first = all.up + all.experts[rank] * all.hidden * all.width;
        const float* second = all.down + all.experts[rank] * all.width * all.hidden;
        for (int64_t unit = 0; unit < all.hidden; ++unit)
            inner[unit] = gelu(product(own, first + unit * all.width, all.width));
        float* sum = sums + rank / all.k * all.width;
        for (int64_t place = 0; place < all.width; ++place)
            sum[place] += all.gates[rank] * product(inner, second + place * all.hidden, all.hidden);
    }
}

// Returns the steps of the path that the user names, or of the fastest one that this processor supports.
const MixtureSteps& mixture_steps() {
#if defined(__x86_64__)
    const char* named = std::getenv("NASHSWARM_KERNEL");
    const bool any = !named || !*named;
    if ((any || !std::strncmp(named, "avx512", 6)) && nashswarm_supports(2)) return mixture_avx512;
    if ((any || !std::strcmp(named, "avx2")) && nashswarm_supports(1)) return mixture_avx2;
#endif
    return mixture_portable;
}

// Sorts assignments by expert, computes them tile by tile, and adds up those of each token.  Returns whether there was memory.
bool compute_many(const Experts& all, float* sums) {
    const MixtureSteps& steps = mixture_steps();
    const int64_t assignments = all.tokens * all.k, tiles = assignments / steps.tokens + all.count;  // at most
    auto* numbers = static_cast<int64_t*>(std::malloc((2 * assignments + 2 * tiles + all.count) * sizeof(int64_t)));
    auto* outputs = static_cast<float*>(std::malloc(assignments * all.width * sizeof(float)));
    bool enough = numbers && outputs;
    if (enough) {
        int64_t *order = numbers, *begins = order + 2 * assignments, *ends = begins + tiles, used = 0, begin = 0;
        auto* expert_ends = reinterpret_cast<int32_t*>(ends + tiles);
        nashswarm_group(all.experts, assignments, all.count, order, order + assignments, expert_ends);
        for (int64_t expert = 0; expert < all.count; ++expert)
            for (; begin < expert_ends[expert]; begin = ends[used++]) {
                begins[used] = begin;
                ends[used] = begin + steps.tokens < expert_ends[expert] ? begin + steps.tokens : expert_ends[expert];
            }
        const int64_t bytes = rounded_up(steps.tokens * (all.width + all.hidden) * sizeof(float));
#pragma omp parallel if (used > 1)
        {
            auto* scratch = static_cast<float*>(std::aligned_alloc(64, bytes));
            if (!scratch) {
#pragma omp atomic write
                enough = false;
            }
#pragma omp for schedule(static)
            for (int64_t tile = 0; tile < used; ++tile) {
                const int64_t matrix = all.experts[order[begins[tile]]] * all.width * all.hidden;
                if (scratch)
                    steps.compute({all.x, all.up + matrix, all.down + matrix, all.gates, order + begins[tile],
                                   ends[tile] - begins[tile], all.k, all.width, all.hidden, outputs}, scratch);
            }
            std::free(scratch);
#pragma omp for schedule(static)
            for (int64_t token = 0; token < all.tokens; ++token) {
                float* sum = sums + token * all.width;
                const float* own = outputs + token * all.k * all.width;
                for (int64_t place = 0; place < all.width; ++place) sum[place] = own[place];
                for (int64_t rank = 1; rank < all.k; ++rank)
                    for (int64_t place = 0; place < all.width; ++place) sum[place] += own[rank * all.width + place];
            }
        }
    }
    std::free(numbers);
    std::free(outputs);
    return enough;
}

}  // namespace

extern "C" {

// For each token, sums down · gelu(up · x) over its k experts, multiplied by their gates.  FEW assignments are computed one
// after another, more in tiles of one expert.  Returns the place of the first expert that does not exist, -1 if all exist,
// or -2 if there is no memory.
EXPORTED int64_t nashswarm_experts(const float* x, const float* up, const float* down, const int64_t* experts,
                                   const float* gates, int64_t tokens, int64_t k, int64_t count, int64_t width,
                                   int64_t hidden, float* inner, float* sums) {
    for (int64_t rank = 0; rank < tokens * k; ++rank)
        if (experts[rank] < 0 || experts[rank] >= count) return rank;
    const Experts all{x, up, down, experts, gates, tokens, k, count, width, hidden};
    if (tokens * k <= FEW) return compute_few(all, inner, sums), -1;
    return compute_many(all, sums) ? -1 : -2;
}

}  // extern "C"
