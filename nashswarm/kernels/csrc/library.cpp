// The functions that Python calls: supported instruction sets, products, single rows, and routing of tokens.
#include <cmath>
#include <cstdlib>
#include <cstring>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "halves.h"
#include "matrix.h"

using namespace nashswarm;

namespace {

constexpr int64_t ENOUGH = 1 << 20;  // weights times rows of x that justify one more thread
constexpr int64_t ENOUGH_SCORES = 1 << 16;

Multiply* const PATHS[] = {
    multiply_portable,
#if defined(__x86_64__)
    multiply_avx2,
    multiply_avx512,
    multiply_avx512,  // VBMI speeds up trellis-coded matrices alone
#elif defined(__aarch64__)
    multiply_portable,  // and so does NEON
    multiply_portable,
    multiply_portable,
    multiply_portable,
#endif
};

int64_t rounded_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Writes scale · (code − zero point) for the inputs of one row of a tile.
void write_row(const uint8_t* payload, int width, int row, float scale, float zero_point, float* out,
               int64_t size) {
    for (int64_t input = 0; input < size; ++input) {
        const int64_t position = input % CHUNK / 4;
        const uint8_t* lane = payload + input / CHUNK * width * REGISTER + 4 * row + input % 4;
        int code;
        if (width == 3 && position >= 6) {
            code = lane[(position - 6) * REGISTER] >> 6 | (lane[2 * REGISTER] >> position & 1) << 2;
        } else {
            const int64_t fields = 8 / width;
            code = lane[position / fields * REGISTER] >> position % fields * width & ((1 << width) - 1);
        }
        out[input] = scale * (float(code) - zero_point);
    }
}

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

constexpr int64_t LANES = 16;  // partial sums side by side, to fill a register

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

#define EXPORTED __attribute__((visibility("default")))
#if defined(__x86_64__) && defined(__GLIBC__)
#define WIDENED __attribute__((target_clones("avx512f", "avx2", "default")))  // the same sums in wider registers
#else
#define WIDENED
#endif

extern "C" {

EXPORTED int nashswarm_interface() { return 10; }

// Returns whether this processor supports a path: 0 portable, 1 AVX2, 2 AVX-512 with VNNI and GFNI, 3 the same with VBMI,
// 4 NEON with products of bytes.
EXPORTED int nashswarm_supports(int path) {
    if (path == 0) return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (path == 1)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (path == 2 || path == 3)
        return (path == 2 || __builtin_cpu_supports("avx512vbmi")) &&
               __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
#elif defined(__aarch64__) && defined(__linux__)
    if (path == 4) return getauxval(AT_HWCAP) >> 20 & 1;
#elif defined(__aarch64__)
    if (path == 4) return 1;
#endif
    return 0;
}

// Computes y = x Wᵀ + bias.  Returns 1 if there is no memory, else 0.
EXPORTED int nashswarm_matmul(const Matrix* matrix, const float* x, const float* bias, float* y, int64_t batch, int count,
                              int threads, int path) {
    const int64_t groups = matrix->groups();
    const int64_t digits = rounded_up(batch * count * groups * matrix->group_size);
    const int64_t steps = rounded_up(batch * groups * sizeof(float));
    const int64_t sums = batch * count * groups * sizeof(float);
    auto* scratch = static_cast<int8_t*>(std::aligned_alloc(64, rounded_up(digits + steps + sums + 1)));
    if (!scratch) return 1;
    const Digits integers{scratch, reinterpret_cast<float*>(scratch + digits),
                          reinterpret_cast<float*>(scratch + digits + steps)};
    const int64_t work = matrix->rows * matrix->columns * batch / ENOUGH;
    PATHS[path](Product{*matrix, x, bias, y, batch, count, work < threads ? (work < 1 ? 1 : int(work)) : threads, integers});
    std::free(scratch);
    return 0;
}

// Writes the rows `ids` of the dequantized matrix.  Returns the place of the first id that does not exist, or -1.
EXPORTED int64_t nashswarm_rows(const Matrix* matrix, const int64_t* ids, float* out, int64_t count) {
    constexpr int WIDTHS[] = {2, 3, 4, 8};
    const int64_t groups = matrix->groups();
    for (int64_t number = 0; number < count; ++number)
        if (ids[number] < 0 || ids[number] >= matrix->rows) return number;
    for (int64_t number = 0; number < count; ++number, out += matrix->columns) {
        const int64_t block = ids[number] / TILE_ROWS, row = ids[number] % TILE_ROWS;
        std::memset(out, 0, matrix->columns * sizeof(float));
        for (int kind = 0; kind < 4; ++kind) {
            const int32_t* bounds = matrix->starts + block / SPAN * 4 + kind;
            for (const Tile* tile = matrix->tiles + bounds[0]; tile < matrix->tiles + bounds[1]; ++tile) {
                if (int64_t(tile->where % SPAN) != block % SPAN) continue;
                const int64_t group = tile->where / SPAN, begin = group * matrix->group_size;
                const int64_t side = (block * groups + group) * TILE_ROWS + row;
                const int64_t rest = matrix->columns - begin;
                write_row(matrix->payload + int64_t(tile->place) * REGISTER, WIDTHS[kind], int(row),
                          matrix->scale ? to_single(matrix->scale[side]) : 1.0f,
                          matrix->scale ? float(matrix->zero_point[side]) : float(1 << (WIDTHS[kind] - 1)), out + begin,
                          rest < matrix->group_size ? rest : matrix->group_size);
            }
        }
        for (int32_t place = matrix->escape_starts[block]; place < matrix->escape_starts[block + 1]; ++place)
            if (matrix->escape_places[place] % TILE_ROWS == row)
                out[matrix->escape_places[place] / TILE_ROWS] += float(matrix->escape_codes[place]);
        if (matrix->row_scale)
            for (int64_t input = 0; input < matrix->columns; ++input) out[input] *= matrix->row_scale[ids[number]];
        if (matrix->column_scale)
            for (int64_t input = 0; input < matrix->columns; ++input) out[input] *= matrix->column_scale[input];
    }
    return -1;
}

// For each row, chooses the k places of the largest score − cost among the `flock` of the largest score − entry.  The gates
// are the softmax of score − price over them, or over all places if k is 1.  Returns 1 if there is no memory, else 0.
EXPORTED int nashswarm_route(const float* scores, const float* entry, const float* cost, const float* price, int64_t rows,
                             int64_t size, int64_t flock, int64_t k, int64_t* chosen, float* gates, int threads) {
    const int64_t work = rows * size / ENOUGH_SCORES;
    const int woken = work < threads ? (work < 1 ? 1 : int(work)) : threads;
    const int64_t each = rounded_up(flock * (sizeof(float) + sizeof(int64_t)) + k * sizeof(float));
    auto* scratch = static_cast<char*>(std::aligned_alloc(64, woken * each));
    if (!scratch) return 1;
#pragma omp parallel for num_threads(woken) schedule(static)
    for (int part = 0; part < woken; ++part) {
        auto* near = reinterpret_cast<int64_t*>(scratch + part * each);
        auto* values = reinterpret_cast<float*>(near + flock);
        auto* best = values + flock;
        for (int64_t row = rows * part / woken; row < rows * (part + 1) / woken; ++row) {
            const float* own = scores + row * size;
            int64_t* found = chosen + row * k;
            float* gate = gates + row * k;
            if (flock == size) {
                largest([&](int64_t place) { return own[place] - cost[place]; }, size, k, best, found);
            } else {
                largest([&](int64_t place) { return own[place] - entry[place]; }, size, flock, values, near);
                largest([&](int64_t place) { return own[near[place]] - cost[near[place]]; }, flock, k, best, found);
                for (int64_t rank = 0; rank < k; ++rank) found[rank] = near[found[rank]];
            }
            const auto paid = [&](int64_t place) { return own[place] - price[place]; };
            float most = paid(found[0]), sum = 0;
            for (int64_t rank = 1; rank < k; ++rank) most = std::fmax(most, paid(found[rank]));
            for (int64_t rank = 0; rank < k; ++rank) sum += gate[rank] = std::exp(paid(found[rank]) - most);
            if (k == 1)
                for (int64_t place = 0; place < size; ++place)
                    if (place != found[0]) sum += std::exp(paid(place) - most);
            for (int64_t rank = 0; rank < k; ++rank) gate[rank] /= sum;
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

// For each token, sums down · gelu(up · x) over its k experts, multiplied by their gates.  Experts are computed one after
// another, which is fastest for few tokens.  Returns the place of the first expert that does not exist, or -1.
EXPORTED WIDENED int64_t nashswarm_experts(const float* x, const float* up, const float* down, const int64_t* experts,
                                   const float* gates, int64_t tokens, int64_t k, int64_t count, int64_t width,
                                   int64_t hidden, float* inner, float* sums) {
    for (int64_t rank = 0; rank < tokens * k; ++rank)
        if (experts[rank] < 0 || experts[rank] >= count) return rank;
    std::memset(sums, 0, tokens * width * sizeof(float));
    for (int64_t rank = 0; rank < tokens * k; ++rank) {
        const float *own = x + rank / k * width, *first = up + experts[rank] * hidden * width;
        const float* second = down + experts[rank] * width * hidden;
        for (int64_t unit = 0; unit < hidden; ++unit) inner[unit] = gelu(product(own, first + unit * width, width));
        float* sum = sums + rank / k * width;
        for (int64_t place = 0; place < width; ++place)
            sum[place] += gates[rank] * product(inner, second + place * hidden, hidden);
    }
    return -1;
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
