// A trellis-coded matrix as it lies in memory, and what a product with it needs; kernels/trellis.py documents the form.
#pragma once

#include <cstdint>
#include <cstring>

#define ALWAYS_INLINE __attribute__((always_inline)) inline  // no copy of a function for one processor runs on another

namespace nashswarm {

constexpr int GROUP_ROWS = 64;  // rows of a row group, which are turned together
constexpr int TILE_COLUMNS = 16;
constexpr int STEPS = 16;         // of a tile, in two halves
constexpr int HALF = 8;           // steps
constexpr int STEP_BYTES = 64;    // bytes of a step: 4 rows of 16 columns
constexpr int ROUNDED = 64;       // columns whose activations are rounded with one step
constexpr int ROUNDED_TILES = ROUNDED / TILE_COLUMNS;
constexpr int RATES = 8;          // 0 … 7; and 8 is plain int8
constexpr int LARGEST_TABLE = 128;
constexpr int MEMORY[RATES] = {0, 5, 4, 3, 3, 2, 1, 0};
constexpr float UNIT = 36;

ALWAYS_INLINE uint32_t read_index(const uint8_t* bytes, int64_t place, bool wide) {
    uint32_t index = 0;
    if (wide) std::memcpy(&index, bytes + 4 * place, 4);
    else std::memcpy(&index, bytes + 2 * place, 2);
    return index;
}

struct Trellis {
    int64_t rows, columns;
    bool rotated;
    float scale;
    const uint8_t* rates;  // two to a byte, whole bytes for each row group
    const uint8_t* row_size;
    const uint8_t* row_scale;
    const uint8_t* row_order;  // null: the order of the matrix
    const uint8_t* column_scale;
    const uint8_t* column_order;  // null: the order of the matrix
    const uint8_t* payload;
    const int64_t* starts;  // of the tiles of each row group in the payload

    ALWAYS_INLINE int64_t groups() const { return (rows + GROUP_ROWS - 1) / GROUP_ROWS; }
    ALWAYS_INLINE int64_t across() const { return (columns + TILE_COLUMNS - 1) / TILE_COLUMNS; }
    ALWAYS_INLINE int64_t pairs() const { return (across() + 1) / 2; }
    ALWAYS_INLINE int64_t rounded() const { return (columns + ROUNDED - 1) / ROUNDED; }
    ALWAYS_INLINE int64_t row_at(int64_t place) const { return row_order ? read_index(row_order, place, wide(rows)) : place; }
    ALWAYS_INLINE int64_t column_at(int64_t place) const {
        return column_order ? read_index(column_order, place, wide(columns)) : place;
    }
    static ALWAYS_INLINE bool wide(int64_t size) { return size > 1 << 16; }
};

// Activations in the stored order of columns, as integers: in every 64 columns of a row of x, x ≈ step · Σ 256^d · digit d.
struct Activations {
    int8_t* digits;  // [batch][rounded][count][64]
    int32_t* bases;  // [batch][rounded][count][16]: what sums of a tile and a quad of columns start from
    float* steps;    // [batch][rounded]
    float* extras;   // [batch]: 0, or nan if a number of the row is not finite
};

struct TrellisProduct {
    const Trellis& matrix;
    const float* x;     // [batch][columns]
    const float* bias;  // [rows], or null
    float* y;           // [batch][stride], of which rows are written
    int64_t stride;
    int64_t batch;
    int count;  // digits of an activation: 1 for int8, 3 for float32
    Activations activations;
};

// What an instruction set computes.
struct TrellisPath {
    // Makes the tables of this path from those of the form, [rate][window · plain].
    void (*prepare)(const int8_t (*tables)[LARGEST_TABLE]);
    // Computes products that share their batch and count.  Called by all threads of a parallel region, or outside of one.
    void (*multiply)(const TrellisProduct* jobs, int64_t number);
    // Writes sums of the values of a row group down its rows, for each column in the stored order: one row of `out` (whole
    // tiles wide) for each 64 weights.
    void (*sum_rows)(const Trellis&, int64_t group, const float* weights, int64_t count, float* out);
};

extern const TrellisPath trellis_portable;
#if defined(__x86_64__)
extern const TrellisPath trellis_avx2, trellis_avx512, trellis_avx512vbmi;
#endif
#if defined(__aarch64__)
extern const TrellisPath trellis_neon;
#endif

extern const TrellisPath* const trellis_paths[];  // by number, as in native.py

// Finds the sections of the bytes of a matrix, which Python has checked.
Trellis read_trellis(const uint8_t* content, const int64_t* starts);

// The bytes of the activations of a product, a multiple of 64, and their parts in so many bytes.
int64_t activation_bytes(const Trellis& matrix, int64_t batch, int count);
Activations place_activations(const Trellis& matrix, int64_t batch, int count, int8_t* bytes);

// Writes the rows `ids` of the dequantized matrix, as nashswarm_trellis_rows.
int64_t look_up_rows(const Trellis& matrix, const int64_t* ids, float* out, int64_t count, int threads, int path);

}  // namespace nashswarm
