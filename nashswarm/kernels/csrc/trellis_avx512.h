// What AVX-512 with and without VBMI have in common: a register holds a step of a tile, four rows of sixteen columns.
#pragma once

#include <immintrin.h>

#include "trellis_multiply.h"

namespace nashswarm {
namespace {

struct TrellisAvx512 {
    static constexpr int BYTES = 64, HALVES = 2, OFFSET = 128;  // vpdpbusd multiplies unsigned by signed bytes
    using Codes = __m512i;
    using Inputs = __m512i;
    using Sum = __m512i;
    using Value = __m512;

    static void finish_table(uint8_t*, int) {}
    static Codes load(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
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

    static Value to_float(Sum sum) { return _mm512_cvtepi32_ps(sum); }
    static Value plus_product(Value sum, Value left, float right) {
        return _mm512_fmadd_ps(left, _mm512_set1_ps(right), sum);
    }
    static Value load_floats(const float* floats) { return _mm512_loadu_ps(floats); }
    static void store(float* floats, Value value) { _mm512_storeu_ps(floats, value); }
};

}  // namespace
}  // namespace nashswarm
