// The steps of a block beside its products: the algorithm, included once for each instruction set, whose registers have
// LANES floats.
#pragma once

#include <cmath>
#include <cstring>

#include "decoder.h"

namespace nashswarm {
namespace {

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Quad __attribute__((vector_size(16)));

ALWAYS_INLINE Vec load(const float* floats) {
    Vec vec;
    std::memcpy(&vec, floats, sizeof vec);
    return vec;
}
ALWAYS_INLINE void store(float* floats, Vec vec) { std::memcpy(floats, &vec, sizeof vec); }
ALWAYS_INLINE float sum_of(Vec vec) {
    Quad parts[LANES / 4];
    std::memcpy(parts, &vec, sizeof vec);
    for (int number = 1; number < LANES / 4; ++number) parts[0] += parts[number];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// Reads the `left` floats before the end of an array, and zeros after them.
ALWAYS_INLINE Vec load_part(const float* floats, int64_t left) {
    float part[LANES] = {};
    std::memcpy(part, floats, (left < LANES ? left : LANES) * sizeof(float));
    return load(part);
}
ALWAYS_INLINE void store_part(float* floats, Vec vec, int64_t left) {
    float part[LANES];
    store(part, vec);
    std::memcpy(floats, part, (left < LANES ? left : LANES) * sizeof(float));
}

// Calls take(place, load, store) for every register of an array.
template <class Take>
ALWAYS_INLINE void for_each(int64_t size, Take take) {
    int64_t place = 0;
    for (; place + LANES <= size; place += LANES) take(place, load, store);
    if (const int64_t left = size - place)
        take(place, [=](const float* floats) { return load_part(floats, left); },
             [=](float* floats, Vec vec) { store_part(floats, vec, left); });
}

ALWAYS_INLINE Vec exp_of(Vec x) {
    constexpr float ROUNDING = 12582912.0f;  // 1.5 · 2^23: a float of this size has no fraction
    x = x < -87.0f ? x * 0.0f - 87.0f : x;
    x = x > 88.0f ? x * 0.0f + 88.0f : x;
    const Vec shifted = x * 1.44269504f + ROUNDING, whole = shifted - ROUNDING;
    const Vec rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vec sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    Ints bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = ((bits - 0x4b400000) + 127) << 23;
    Vec power;
    std::memcpy(&power, &bits, sizeof power);
    return sum * power;
}

void norm(const float* x, const DecoderNorm& norm, bool layer_norm, float epsilon, int64_t size, float* out) {
    float mean = 0.0f;
    if (layer_norm) {
        Vec sum{};
        for_each(size, [&](int64_t place, auto read, auto) { sum += read(x + place); });
        mean = sum_of(sum) / float(size);
    }
    Vec squares{};
    int64_t place = 0;
    for (; place + LANES <= size; place += LANES) {
        const Vec own = load(x + place) - mean;
        squares += own * own;
    }
    float sum = sum_of(squares);
    for (; place < size; ++place) sum += (x[place] - mean) * (x[place] - mean);
    const float inverse = 1.0f / __builtin_sqrtf(sum / float(size) + epsilon);
    for_each(size, [&](int64_t place, auto read, auto write) {
        const Vec own = (read(x + place) - mean) * inverse * (read(norm.weight + place) + norm.offset);
        write(out + place, norm.bias ? own + read(norm.bias + place) : own);
    });
}

void add(float* x, const float* y, int64_t size) {
    for_each(size, [&](int64_t place, auto read, auto write) { write(x + place, read(x + place) + read(y + place)); });
}

ALWAYS_INLINE Vec tanh_of(Vec x) {
    const Vec square = x * x;
    Vec sum = square * 2.1869488536e-2f - 5.3968253968e-2f;  // for small x, where 1 - 1 would be left of the other form
    sum = sum * square + 1.3333333333e-1f;
    sum = sum * square - 3.3333333333e-1f;
    const Vec small = x + x * square * sum, large = 1.0f - 2.0f / (exp_of(x + x) + 1.0f);
    return square < 0.0625f ? small : large;
}

void cap(float* x, float scale, float cap, int64_t size) {
    const float inner = scale / cap;
    for_each(size, [&](int64_t place, auto read, auto write) { write(x + place, tanh_of(read(x + place) * inner) * cap); });
}

void rotate(float* head, const float* cosines, const float* sines, int64_t rotated) {
    const int64_t half = rotated / 2;
    for_each(half, [&](int64_t place, auto read, auto write) {
        const Vec low = read(head + place), high = read(head + half + place);
        const Vec cosine = read(cosines + place), sine = read(sines + place);
        write(head + place, low * cosine - high * sine);
        write(head + half + place, high * cosine + low * sine);
    });
}

template <int64_t ACTIVATION>
ALWAYS_INLINE Vec activated(Vec x) {
    if constexpr (ACTIVATION == SILU) return x / (1.0f + exp_of(-x));
    if constexpr (ACTIVATION == GELU_TANH) return x / (1.0f + exp_of((x + x * x * x * 0.044715f) * -1.5957691216f));
    float lanes[LANES];
    store(lanes, x);
    for (float& lane : lanes) lane *= 0.5f * (1.0f + erff(lane * 0.70710678f));
    return load(lanes);
}

template <int64_t ACTIVATION>
void activate_as(const float* inner, bool gated, int64_t size, float* out) {
    for_each(size, [&](int64_t place, auto read, auto write) {
        const Vec own = activated<ACTIVATION>(read(inner + place));
        write(out + place, gated ? own * read(inner + size + place) : own);
    });
}

void activate(const float* inner, bool gated, Activation activation, int64_t size, float* out) {
    if (activation == SILU) activate_as<SILU>(inner, gated, size, out);
    else if (activation == GELU_TANH) activate_as<GELU_TANH>(inner, gated, size, out);
    else activate_as<GELU>(inner, gated, size, out);
}

// Scores of ROWS queries against `count` keys one by one.
template <int ROWS>
void score(const float* const* queries, const float* keys, int64_t count, int64_t size, float* const* scores) {
    for (int64_t place = 0; place < count; ++place, keys += size) {
        Vec sums[ROWS] = {};
        int64_t column = 0;
        for (; column + LANES <= size; column += LANES) {
            const Vec key = load(keys + column);
            for (int row = 0; row < ROWS; ++row) sums[row] += key * load(queries[row] + column);
        }
        for (int row = 0; row < ROWS; ++row) {
            float sum = sum_of(sums[row]);
            for (int64_t rest = column; rest < size; ++rest) sum += keys[rest] * queries[row][rest];
            scores[row][place] = sum;
        }
    }
}

constexpr int REGISTERS = PACKED_KEYS / LANES;

// Scores of ROWS queries against PACKED_KEYS keys, [column][key].
template <int ROWS>
void score_packed(const float* const* queries, const float* packed, int64_t size, float* const* scores) {
    Vec sums[ROWS][REGISTERS] = {};
    for (int64_t column = 0; column < size; ++column)
        for (int part = 0; part < REGISTERS; ++part) {
            const Vec keys = load(packed + column * PACKED_KEYS + part * LANES);
            for (int row = 0; row < ROWS; ++row) sums[row][part] += keys * queries[row][column];
        }
    for (int row = 0; row < ROWS; ++row)
        for (int part = 0; part < REGISTERS; ++part) store(scores[row] + part * LANES, sums[row][part]);
}

// Sums of `count` values times the weights of ROWS queries, times a factor each.
template <int ROWS>
void weigh(const float* const* weights, const float* factors, const float* values, int64_t count, int64_t size,
           float* const* outputs) {
    constexpr int WIDE = 4;  // registers of a row
    int64_t column = 0;
    for (; column + WIDE * LANES <= size; column += WIDE * LANES) {
        Vec sums[ROWS][WIDE] = {};
        for (int64_t place = 0; place < count; ++place)
            for (int part = 0; part < WIDE; ++part) {
                const Vec value = load(values + place * size + column + part * LANES);
                for (int row = 0; row < ROWS; ++row) sums[row][part] += value * weights[row][place];
            }
        for (int row = 0; row < ROWS; ++row)
            for (int part = 0; part < WIDE; ++part) store(outputs[row] + column + part * LANES, sums[row][part] * factors[row]);
    }
    for (; column < size; column += LANES) {
        const int64_t left = size - column;
        Vec sums[ROWS] = {};
        for (int64_t place = 0; place < count; ++place) {
            const float* own = values + place * size + column;
            const Vec value = left < LANES ? load_part(own, left) : load(own);
            for (int row = 0; row < ROWS; ++row) sums[row] += value * weights[row][place];
        }
        for (int row = 0; row < ROWS; ++row) store_part(outputs[row] + column, sums[row] * factors[row], left);
    }
}

// Calls take(first, number) for rows four at a time, the number as a constant.
template <class Take>
ALWAYS_INLINE void by_four(int64_t rows, Take take) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) take(row, std::integral_constant<int, 4>());
    if (rows - row == 3) take(row, std::integral_constant<int, 3>());
    if (rows - row == 2) take(row, std::integral_constant<int, 2>());
    if (rows - row == 1) take(row, std::integral_constant<int, 1>());
}

// Turns scores into weights, zero outside of begin … end; times the factor that is returned they add up to one.
float soften(float* scores, int64_t begin, int64_t end, int64_t all, float scale) {
    Vec highest = scores[begin] + Vec{};
    int64_t place = begin;
    for (; place + LANES <= end; place += LANES) {
        const Vec own = load(scores + place);
        highest = own > highest ? own : highest;
    }
    float lanes[LANES], largest = scores[begin];
    store(lanes, highest);
    for (const float lane : lanes) largest = lane > largest ? lane : largest;
    for (; place < end; ++place) largest = scores[place] > largest ? scores[place] : largest;
    Vec sum{};
    float rest = 0.0f;
    for (place = begin; place + LANES <= end; place += LANES) {
        const Vec own = exp_of((load(scores + place) - largest) * scale);
        store(scores + place, own);
        sum += own;
    }
    if (place < end) {
        store(lanes, exp_of((load_part(scores + place, end - place) - largest) * scale));
        for (int64_t lane = 0; place < end; ++lane, ++place) rest += scores[place] = lanes[lane];
    }
    for (place = 0; place < begin; ++place) scores[place] = 0.0f;
    for (place = end; place < all; ++place) scores[place] = 0.0f;
    return 1.0f / (sum_of(sum) + rest);
}

void attend(const Attention& job, float* scratch) {
    const int64_t rows = job.tokens * job.heads, size = job.size;
    int64_t begin = job.begins[0];
    for (int64_t token = 1; token < job.tokens; ++token) begin = job.begins[token] < begin ? job.begins[token] : begin;
    const int64_t all = job.ends[job.tokens - 1] - begin, stride = all + PACKED_KEYS;
    const float *keys = job.keys + begin * size, *values = job.values + begin * size;
    float* packed = scratch + rows * stride;
    const auto query = [&](int64_t row) { return job.queries + row / job.heads * job.stride + row % job.heads * size; };
    const auto scores_at = [&](int64_t first, int64_t place, float** scores) {
        for (int64_t row = 0; row < 4; ++row) scores[row] = scratch + (first + row) * stride + place;
    };
    const auto queries_at = [&](int64_t first, int64_t number, const float** queries) {
        for (int64_t row = 0; row < number; ++row) queries[row] = query(first + row);
    };
    const bool pack = rows > 4;
    for (int64_t place = 0; pack && place < all; place += PACKED_KEYS) {
        const int64_t count = all - place < PACKED_KEYS ? all - place : PACKED_KEYS;
        if (count < PACKED_KEYS) std::memset(packed, 0, PACKED_KEYS * size * sizeof(float));
        for (int64_t own = 0; own < count; ++own)
            for (int64_t column = 0; column < size; ++column)
                packed[column * PACKED_KEYS + own] = keys[(place + own) * size + column];
        by_four(rows, [&](int64_t first, auto number) {
            if (job.ends[(first + number - 1) / job.heads] - begin <= place) return;
            const float* queries[4];
            float* scores[4];
            queries_at(first, number, queries);
            scores_at(first, place, scores);
            score_packed<number>(queries, packed, size, scores);
        });
    }
    by_four(rows, [&](int64_t first, auto number) {
        const int64_t count = job.ends[(first + number - 1) / job.heads] - begin;
        const float* queries[4];
        float *scores[4], *outputs[4], factors[4];
        queries_at(first, number, queries);
        scores_at(first, 0, scores);
        if (!pack) score<number>(queries, keys, count, size, scores);
        for (int row = 0; row < number; ++row) {
            const int64_t token = (first + row) / job.heads;
            if (job.cap != 0.0f) cap(scores[row], job.scale, job.cap, count);
            const float scale = job.cap != 0.0f ? 1.0f : job.scale;
            factors[row] = soften(scores[row], job.begins[token] - begin, job.ends[token] - begin, count, scale);
            outputs[row] = job.output + token * job.output_stride + (first + row) % job.heads * size;
        }
        weigh<number>(scores, factors, values, count, size, outputs);
    });
}

constexpr DecoderSteps STEPS_OF_SET{norm, add, cap, rotate, attend, activate};

}  // namespace
}  // namespace nashswarm
