// What AVX-512 with and without VBMI have in common: a register holds a step of a tile, four rows of sixteen columns.
#pragma once

#include <immintrin.h>

#include "trellis_multiply.h"

namespace nashswarm {
namespace {

template <class Set>
struct TrellisAvx512 : AnySet<Set> {
    static constexpr int BYTES = 64, HALVES = 1, OFFSET = 128, TOGETHER = 2;  // vpdpbusd multiplies unsigned by signed bytes
    using Codes = __m512i;
    using Inputs = __m512i;
    using Sum = __m512i;
    using Value = __m512;

    static Codes load(const uint8_t* bytes) {
        Codes codes = _mm512_loadu_si512(bytes);
        __asm__("" : "+v"(codes));  // loads once, instead of for every use: loads across cache lines are slow
        return codes;
    }
    static void store_codes(uint8_t* bytes, Codes codes) { _mm512_storeu_si512(bytes, codes); }
    static Codes from_signed(Codes codes) { return _mm512_xor_si512(codes, _mm512_set1_epi8(char(0x80))); }
    template <int BY>  // shifts in bits of the neighbouring byte
    static Codes right(Codes codes) { return BY ? _mm512_srli_epi16(codes, BY) : codes; }
    template <int BY>
    static Codes left(Codes codes) { return BY ? _mm512_slli_epi16(codes, BY) : codes; }
    template <int MASK>
    static Codes merge(Codes chosen, Codes rest) {
        return _mm512_ternarylogic_epi32(chosen, rest, _mm512_set1_epi8(char(MASK)), 0xe4);  // mask ? chosen : rest
    }

    static Inputs inputs(const int8_t* digits) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(digits)));
    }
    static Sum nothing() { return _mm512_setzero_si512(); }
    static Sum add(Sum left, Sum right) { return _mm512_add_epi32(left, right); }
    static Sum quads(const int32_t* bases) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bases)));
    }
    template <bool WIDE>
    static Sum multiply(Sum sum, Codes codes, Inputs inputs) { return _mm512_dpbusd_epi32(sum, codes, inputs); }

    static Sum load_sums(const int32_t* sums) { return _mm512_loadu_si512(sums); }
    static void store_sums(int32_t* sums, Sum sum) { _mm512_storeu_si512(sums, sum); }
    static Value to_float(Sum sum) { return _mm512_cvtepi32_ps(sum); }
    static Value plus_product(Value sum, Value left, float right) {
        return _mm512_fmadd_ps(left, _mm512_set1_ps(right), sum);
    }
    // Scales by their codes, sixteen of which are one octave or two; `table` has sixteen from 1 on.
    static __m512 scales(__m128i codes, __m512 table, int octaves) {
        const __m512i code = _mm512_cvtepu8_epi32(codes);  // the index takes four bits
        const __m512i doubled = _mm512_sub_epi32(_mm512_srli_epi32(code, 4), _mm512_set1_epi32(8));
        const __m512i bits = _mm512_castps_si512(_mm512_permutexvar_ps(code, table));
        return _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_slli_epi32(doubled, 22 + octaves)));
    }
    static void read_inputs(const Trellis& matrix, const float* x, int64_t begin, int left, const Tables& tables,
                            float* values) {
        const __m512 table = _mm512_loadu_ps(tables.column_scale + 128);
        for (int first = 0; first < ROUNDED; first += 16) {
            const int64_t place = begin + first;
            const __mmask16 mask = mask_of(left - first);
            __m512 own;
            if (!matrix.column_order) {
                own = _mm512_maskz_loadu_ps(mask, x + place);
            } else {
                const __m512i index = Trellis::wide(matrix.columns)
                                          ? _mm512_maskz_loadu_epi32(mask, matrix.column_order + 4 * place)
                                          : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, matrix.column_order + 2 * place));
                own = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, index, x, 4);
            }
            const __m512 scale = scales(_mm_maskz_loadu_epi8(mask, matrix.column_scale + place), table, 1);
            _mm512_store_ps(values + first, _mm512_maskz_mul_ps(mask, own, scale));
        }
    }
    static void find_bases(const int8_t* digits, int32_t* bases) {
        const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_loadu_si512(digits));
        _mm512_storeu_si512(bases, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sums, 7)));
    }
    static __mmask16 mask_of(int64_t left) { return left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0; }
    static void read_factors(const uint8_t* sizes, const uint8_t* scale_codes, int64_t left, float common, const Tables& tables,
                             RowFactors& factors) {
        const __m512 size_by_code = _mm512_loadu_ps(tables.row_size), scale_by_code = _mm512_loadu_ps(tables.row_scale + 128);
        for (int first = 0; first < GROUP_ROWS; first += 16) {
            const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(sizes + first / 2));
            const __m128i codes = _mm_unpacklo_epi8(pairs, _mm_srli_epi16(pairs, 4));  // the index takes four bits
            _mm512_store_ps(factors.sizes + first, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), size_by_code));
            const __mmask16 mask = mask_of(left - first);
            const __m512 scale = scales(_mm_maskz_loadu_epi8(mask, scale_codes + first), scale_by_code, 2);
            _mm512_store_ps(factors.scales + first, _mm512_maskz_mul_ps(mask, scale, _mm512_set1_ps(common)));
        }
    }
    static void sum_quads(const float* totals, float* sums) {
        const __m512i by_row = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        for (int first = 0; first < GROUP_ROWS; first += 16, totals += 64) {
            const auto halves = [&](int step) {  // each lane: the sums of quads 0 and 2, and of 1 and 3, of two steps
                const __m512 a = _mm512_load_ps(totals + 16 * step), b = _mm512_load_ps(totals + 16 * step + 16);
                return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            };
            const __m512 early = halves(0), late = halves(2);
            const __m512 whole = _mm512_add_ps(_mm512_shuffle_ps(early, late, 0x44), _mm512_shuffle_ps(early, late, 0xee));
            _mm512_store_ps(sums + first, _mm512_permutexvar_ps(by_row, whole));
        }
    }
    template <int APART>
    static __m512 turn_pairs(__m512 rows) {
        __m512 others;
        if constexpr (APART == 1) others = _mm512_permute_ps(rows, 0xb1);
        if constexpr (APART == 2) others = _mm512_permute_ps(rows, 0x4e);
        if constexpr (APART == 4) others = _mm512_shuffle_f32x4(rows, rows, 0xb1);
        if constexpr (APART == 8) others = _mm512_shuffle_f32x4(rows, rows, 0x4e);
        constexpr __mmask16 UPPER = APART == 1 ? 0xaaaa : APART == 2 ? 0xcccc : APART == 4 ? 0xf0f0 : 0xff00;
        return _mm512_mask_sub_ps(_mm512_add_ps(rows, others), UPPER, others, rows);
    }
    static void turn(float* rows) {
        __m512 parts[4];
        for (int part = 0; part < 4; ++part)
            parts[part] = turn_pairs<8>(turn_pairs<4>(turn_pairs<2>(turn_pairs<1>(_mm512_load_ps(rows + 16 * part)))));
        const __m512 a = _mm512_add_ps(parts[0], parts[1]), b = _mm512_sub_ps(parts[0], parts[1]);
        const __m512 c = _mm512_add_ps(parts[2], parts[3]), d = _mm512_sub_ps(parts[2], parts[3]);
        _mm512_store_ps(rows, _mm512_add_ps(a, c));
        _mm512_store_ps(rows + 16, _mm512_add_ps(b, d));
        _mm512_store_ps(rows + 32, _mm512_sub_ps(a, c));
        _mm512_store_ps(rows + 48, _mm512_sub_ps(b, d));
    }
    static Value load_floats(const float* floats) { return _mm512_loadu_ps(floats); }
    static void store(float* floats, Value value) { _mm512_storeu_ps(floats, value); }
};

}  // namespace
}  // namespace nashswarm
