// The functions that Python calls: supported instruction sets, products and single rows.
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

}  // namespace

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

EXPORTED int nashswarm_interface() { return 12; }

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

}  // extern "C"
