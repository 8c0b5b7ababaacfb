// A packed matrix as Python passes it; tiles.py documents the layout.
#pragma once

#include <cstdint>

namespace nashswarm {

constexpr int TILE_ROWS = 16;  // rows in a row block
constexpr int REGISTER = 64;   // bytes: four consecutive inputs of every row
constexpr int CHUNK = 32;      // inputs
constexpr int POSITIONS = 8;   // in a chunk, of four inputs each
constexpr int SPAN = 8;        // row blocks whose tiles are processed together

struct Tile {
    uint32_t place;  // in the payload, in registers
    uint32_t where;  // SPAN · group + row block in the span
};

struct Matrix {
    int64_t rows, columns, group_size;
    const uint8_t* payload;
    const uint16_t* scale;       // half precision; null: all one
    const uint8_t* zero_point;   // null if scale is; then it is the middle of the width's range
    const float* row_scale;      // null: all one
    const float* column_scale;   // null: all one
    const int32_t* escape_starts;
    const int32_t* escape_places;
    const int32_t* escape_codes;
    const int32_t* starts;  // first tile of each span and width, and the end
    const Tile* tiles;

    int64_t groups() const { return (columns + group_size - 1) / group_size; }
    int64_t row_blocks() const { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
    int64_t spans() const { return (row_blocks() + SPAN - 1) / SPAN; }
};

// Activations as integers: in each group of each row of x, x ≈ step · Σ 256^d · digit d.  The digits of all rows of x in
// a pass are interleaved, so that everything a register of weights is multiplied by is contiguous in memory.
struct Digits {
    int8_t* digits;  // for each pass: [groups · group_size / 4][columns][count][4]
    float* steps;    // for each pass: [groups][columns]
    float* sums;     // sums of the digits of a group; for each pass: [groups][columns][count]
};

struct Product {
    const Matrix& matrix;
    const float* x;     // [batch][columns]
    const float* bias;  // [rows], or null
    float* y;           // [batch][rows]
    int64_t batch;
    int count;  // digits of an activation: 1 for int8, 3 for float32
    int threads;
    Digits digits;
};

using Multiply = void(const Product&);
Multiply multiply_portable;
#if defined(__x86_64__)
Multiply multiply_avx2, multiply_avx512;
#endif

}  // namespace nashswarm
