// AVX-512 with VNNI and GFNI: a register holds four inputs of sixteen rows; one instruction multiplies and sums them.
#include <immintrin.h>

#include "multiply.h"

namespace nashswarm {
namespace {

struct Avx512 {
    static constexpr int LANES = 16;
    static constexpr bool IN_PLACE = true;  // products are summed in int32, so codes need not be shifted down first
    using Codes = __m512i;
    using Sum = __m512i;
    using Value = __m512;
    template <int WIDTH>
    using Partial = Sum;

    static Codes load(const uint8_t* bytes) {
        Codes codes = _mm512_loadu_si512(bytes);
        __asm__("" : "+v"(codes));  // loads once, instead of in every AND: loads are the bottleneck
        return codes;
    }
    template <int BITS>
    static Codes mask(Codes codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(char(BITS))); }
    template <int BY>  // shifts in bits of the neighbouring byte: mask them
    static Codes shift(Codes codes) { return BY ? _mm512_srli_epi16(codes, BY) : codes; }
    template <int BY, int BIT>  // the two highest bits of `low`, shifted, and one bit of `high`
    static Codes join(Codes low, Codes high) {
        // Byte 7 − i of the matrix selects the bits whose sum (XOR) is bit i.
        constexpr int64_t MATRIX = 0x80ll << 8 * BY | 0x40ll << 8 * (BY + 1);
        const Codes shifted = _mm512_gf2p8affine_epi64_epi8(low, _mm512_set1_epi64(MATRIX), 0);
        return _mm512_ternarylogic_epi32(shifted, high, _mm512_set1_epi8(char(BIT)), 0xf8);  // a | (b & c)
    }

    static Sum nothing() { return _mm512_setzero_si512(); }
    template <int WIDTH>
    static Partial<WIDTH> begin(Sum sum) { return sum; }
    static Sum multiply(Sum sum, Codes codes, const int8_t* digits) {
        // Written in assembly, because compilers would broadcast into a register first.
        const auto& four = *reinterpret_cast<const char(*)[4]>(digits);
        __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(four));
        return sum;
    }
    static Sum end(Sum, Sum partial) { return partial; }
    static Sum add(Sum left, Sum right) { return _mm512_add_epi32(left, right); }
    template <int BY>
    static Sum down(Sum sum) { return _mm512_srai_epi32(sum, BY); }

    static Value all(float value) { return _mm512_set1_ps(value); }
    static Value to_float(Sum sum) { return _mm512_cvtepi32_ps(sum); }
    static Value from_bytes(const uint8_t* bytes) {
        return to_float(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
    }
    static Value from_halves(const uint16_t* halves) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
    }
    static Value times(Value left, float right) { return _mm512_mul_ps(left, all(right)); }
    static Value plus_product(Value sum, Value left, Value right) { return _mm512_fmadd_ps(left, right, sum); }
    static Value plus_product(Value sum, Value left, float right) { return plus_product(sum, left, all(right)); }
    static Value minus_product(Value sum, Value left, float right) { return _mm512_fnmadd_ps(left, all(right), sum); }
    static Value load_floats(const float* floats) { return _mm512_loadu_ps(floats); }
    static void store(float* floats, Value value) { _mm512_storeu_ps(floats, value); }
};

}  // namespace

void multiply_avx512(const Product& job) { multiply<Avx512>(job); }

}  // namespace nashswarm
