// The functions that Python calls for trellis-coded matrices: tables, products and single rows.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "trellis.h"

using namespace nashswarm;

namespace {

constexpr int64_t ENOUGH = 1 << 20;  // weights times rows of x that justify one more thread
constexpr int64_t FEW = 8;           // rows that are found by a search in the order instead of inverting it
constexpr int64_t AT_ONCE = 16;      // places in an order that are compared together
constexpr int HEADER = 20;           // bytes

int64_t aligned(int64_t bytes) { return (bytes + 7) / 8 * 8; }
int64_t rounded_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

namespace nashswarm {

const TrellisPath* const trellis_paths[] = {
    &trellis_portable,
#if defined(__x86_64__)
    &trellis_avx2,
    &trellis_avx512,
    &trellis_avx512vbmi,
#elif defined(__aarch64__)
    &trellis_portable,
    &trellis_portable,
    &trellis_portable,
    &trellis_neon,
#endif
};

Trellis read_trellis(const uint8_t* content, const int64_t* starts) {
    uint32_t rows, columns;
    Trellis matrix;
    std::memcpy(&rows, content + 8, 4);
    std::memcpy(&columns, content + 12, 4);
    std::memcpy(&matrix.scale, content + 16, 4);
    matrix.rows = rows;
    matrix.columns = columns;
    matrix.rotated = content[4];
    matrix.starts = starts;
    const bool ordered_rows = content[5] & 1, ordered_columns = content[5] & 2;
    int64_t end = HEADER;
    const auto section = [&](int64_t bytes) {
        const uint8_t* start = content + aligned(end);
        end = aligned(end) + bytes;
        return start;
    };
    matrix.rates = section(matrix.groups() * matrix.pairs());
    matrix.row_size = section(matrix.groups() * GROUP_ROWS / 2);
    matrix.row_scale = section(rows);
    matrix.row_order = section(ordered_rows ? matrix.rows * (Trellis::wide(rows) ? 4 : 2) : 0);
    matrix.column_scale = section(matrix.across() * TILE_COLUMNS);
    matrix.column_order = section(ordered_columns ? matrix.columns * (Trellis::wide(columns) ? 4 : 2) : 0);
    matrix.payload = content + rounded_up(end);
    if (!ordered_rows) matrix.row_order = nullptr;
    if (!ordered_columns) matrix.column_order = nullptr;
    return matrix;
}

int64_t activation_bytes(const Trellis& matrix, int64_t batch, int count) {
    const int64_t numbers = batch * matrix.rounded();
    return 2 * numbers * count * ROUNDED + rounded_up(numbers * sizeof(float)) + rounded_up(batch * sizeof(float));
}

Activations place_activations(const Trellis& matrix, int64_t batch, int count, int8_t* bytes) {
    const int64_t numbers = batch * matrix.rounded(), digits = numbers * count * ROUNDED;
    int8_t* const steps = bytes + 2 * digits;
    return {bytes, reinterpret_cast<int32_t*>(bytes + digits), reinterpret_cast<float*>(steps),
            reinterpret_cast<float*>(steps + rounded_up(numbers * sizeof(float)))};
}

}  // namespace nashswarm

namespace {

// Returns the place of a row in an order.
template <class Index>
int64_t find_place(const uint8_t* order, int64_t rows, Index row) {
    int64_t place = 0;
    for (; place + AT_ONCE <= rows; place += AT_ONCE) {
        Index some[AT_ONCE], found = 0;
        std::memcpy(some, order + place * sizeof(Index), sizeof some);
        for (const Index own : some) found |= own == row;
        if (found) break;
    }
    for (Index own;; ++place) {
        std::memcpy(&own, order + place * sizeof(Index), sizeof own);
        if (own == row) return place;
    }
}

// Writes the places of the rows `ids` in the stored order.  Returns false if there is no memory.
bool find_places(const Trellis& matrix, const int64_t* ids, int64_t count, int64_t* places) {
    if (!matrix.row_order) {
        std::copy(ids, ids + count, places);
        return true;
    }
    if (count <= FEW) {
        for (int64_t number = 0; number < count; ++number)
            places[number] = Trellis::wide(matrix.rows) ? find_place(matrix.row_order, matrix.rows, uint32_t(ids[number]))
                                                        : find_place(matrix.row_order, matrix.rows, uint16_t(ids[number]));
        return true;
    }
    auto* inverse = static_cast<int64_t*>(std::malloc(matrix.rows * sizeof(int64_t)));
    if (!inverse) return false;
    for (int64_t place = 0; place < matrix.rows; ++place) inverse[matrix.row_at(place)] = place;
    for (int64_t number = 0; number < count; ++number) places[number] = inverse[ids[number]];
    std::free(inverse);
    return true;
}

// The weights of the values of a group in the row at `place`.
void weigh(const Trellis& matrix, int64_t place, float* weights) {
    const int own = int(place % GROUP_ROWS);
    const float scale = matrix.scale * float(std::exp2((matrix.row_scale[place] - 128) / 8.0)) / UNIT;
    for (int row = 0; row < GROUP_ROWS; ++row) {
        const int code = matrix.row_size[place / GROUP_ROWS * (GROUP_ROWS / 2) + row / 2] >> row % 2 * 4 & 15;
        const float turned = __builtin_parity(own & row) ? -0.125f : 0.125f, kept = row == own ? 1.0f : 0.0f;
        weights[row] = (matrix.rotated ? turned : kept) * scale * float(std::exp2(-code / 4.0));
    }
}

}  // namespace

namespace nashswarm {

int64_t look_up_rows(const Trellis& matrix, const int64_t* ids, float* out, int64_t count, int threads, int path) {
    for (int64_t number = 0; number < count; ++number)
        if (ids[number] < 0 || ids[number] >= matrix.rows) return number;
    if (!count) return -1;
    const int64_t width = matrix.across() * TILE_COLUMNS, work = count * GROUP_ROWS * width / ENOUGH;
    const int woken = work < threads ? (work < 1 ? 1 : int(work)) : threads;
    const int64_t each = rounded_up((width + GROUP_ROWS) * FEW * sizeof(float));
    auto* scratch = static_cast<char*>(
        std::aligned_alloc(64, woken * each + rounded_up(width * sizeof(float)) + rounded_up(2 * count * sizeof(int64_t))));
    if (!scratch) return -2;
    auto* scales = reinterpret_cast<float*>(scratch + woken * each);
    auto* places = reinterpret_cast<int64_t*>(scratch + woken * each + rounded_up(width * sizeof(float)));
    auto* sorted = places + count;
    if (!find_places(matrix, ids, count, places)) {
        std::free(scratch);
        return -2;
    }
    for (int64_t column = 0; column < matrix.columns; ++column)
        scales[column] = float(std::exp2((matrix.column_scale[column] - 128) / 16.0));
    for (int64_t number = 0; number < count; ++number) sorted[number] = number;
    std::sort(sorted, sorted + count, [&](int64_t a, int64_t b) { return places[a] < places[b]; });
#pragma omp parallel for num_threads(woken) if (woken > 1) schedule(static)
    for (int part = 0; part < woken; ++part) {
        auto* weights = reinterpret_cast<float*>(scratch + part * each);
        auto* sums = weights + FEW * GROUP_ROWS;
        const int64_t last = count * (part + 1) / woken;
        for (int64_t first = count * part / woken, end; first < last; first = end) {  // rows of one group at a time
            const int64_t group = places[sorted[first]] / GROUP_ROWS;
            for (end = first; end < last && end < first + FEW && places[sorted[end]] / GROUP_ROWS == group; ++end)
                weigh(matrix, places[sorted[end]], weights + (end - first) * GROUP_ROWS);
            trellis_paths[path]->sum_rows(matrix, group, weights, end - first, sums);
            for (int64_t number = first; number < end; ++number) {
                float* row = out + sorted[number] * matrix.columns;
                const float* own = sums + (number - first) * width;
                for (int64_t column = 0; column < matrix.columns; ++column)
                    row[matrix.column_at(column)] = own[column] * scales[column];
            }
        }
    }
    std::free(scratch);
    return -1;
}

}  // namespace nashswarm

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

int nashswarm_supports(int path);

// Makes the tables of every path that this processor supports from those of the form: 128 entries for each rate from 0 to 7.
EXPORTED void nashswarm_trellis_tables(const int8_t* tables) {
    const auto given = reinterpret_cast<const int8_t(*)[LARGEST_TABLE]>(tables);
    for (int path = 0; path < int(sizeof trellis_paths / sizeof trellis_paths[0]); ++path)
        if (nashswarm_supports(path)) trellis_paths[path]->prepare(given);
}

// Computes y = x Wᵀ + bias.  Returns 1 if there is no memory, else 0.
EXPORTED int nashswarm_trellis_matmul(const uint8_t* content, const int64_t* starts, const float* x, const float* bias,
                                      float* y, int64_t batch, int count, int threads, int path) {
    const Trellis matrix = read_trellis(content, starts);
    auto* scratch = static_cast<int8_t*>(std::aligned_alloc(64, activation_bytes(matrix, batch, count) + 64));
    if (!scratch) return 1;
    const int64_t work = matrix.rows * matrix.columns * batch / ENOUGH;
    const int woken = work < threads ? (work < 1 ? 1 : int(work)) : threads;
    const TrellisProduct job{matrix, x, bias, y, matrix.rows, batch, count, place_activations(matrix, batch, count, scratch)};
#pragma omp parallel num_threads(woken) if (woken > 1)
    trellis_paths[path]->multiply(&job, 1);
    std::free(scratch);
    return 0;
}

// Writes the rows `ids` of the dequantized matrix.  Returns the place of the first id that does not exist, -1 if all do, or
// -2 if there is no memory.
EXPORTED int64_t nashswarm_trellis_rows(const uint8_t* content, const int64_t* starts, const int64_t* ids, float* out,
                                        int64_t count, int threads, int path) {
    return look_up_rows(read_trellis(content, starts), ids, out, count, threads, path);
}

}  // extern "C"
