// AVX2: eight rows at a time.  Products of bytes are summed in int16 over a chunk, which is wide enough for 4-bit codes;
// 8-bit codes are split into two halves.
#include <immintrin.h>

#include "multiply.h"

namespace nashswarm {
namespace {

struct Avx2 {
    static constexpr int LANES = 8;
    static constexpr bool IN_PLACE = false;  // the sum of two products of whole bytes would saturate
    using Codes = __m256i;
    using Sum = __m256i;
    using Value = __m256;
    // A chunk adds eight positions of two products, each at most 15 · 128: 30720, which is below 2^15.
    struct Nibbles { __m256i low = _mm256_setzero_si256(); };
    struct Bytes { __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256(); };
    template <int WIDTH>
    using Partial = std::conditional_t<WIDTH == 8, Bytes, Nibbles>;

    static Codes load(const uint8_t* bytes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)); }
    template <int BITS>
    static Codes mask(Codes codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(char(BITS))); }
    template <int BY>  // shifts in bits of the neighbouring byte: mask them
    static Codes shift(Codes codes) { return BY ? _mm256_srli_epi16(codes, BY) : codes; }
    template <int BY, int BIT>  // the two highest bits of `low`, shifted, and one bit of `high`
    static Codes join(Codes low, Codes high) {
        return _mm256_or_si256(mask<(0xc0 >> BY)>(shift<BY>(low)), mask<BIT>(high));
    }

    static Sum nothing() { return _mm256_setzero_si256(); }
    template <int WIDTH>
    static Partial<WIDTH> begin(Sum) { return Partial<WIDTH>(); }
    static __m256i pairs(__m256i sum, Codes codes, const int8_t* digits) {
        int32_t four;
        std::memcpy(&four, digits, 4);
        return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, _mm256_set1_epi32(four)));
    }
    static Nibbles multiply(Nibbles sum, Codes codes, const int8_t* digits) { return {pairs(sum.low, codes, digits)}; }
    static Bytes multiply(Bytes sum, Codes codes, const int8_t* digits) {
        return {pairs(sum.low, mask<15>(codes), digits), pairs(sum.high, mask<15>(shift<4>(codes)), digits)};
    }
    static Sum end(Sum sum, Nibbles partial) { return add(sum, _mm256_madd_epi16(partial.low, _mm256_set1_epi16(1))); }
    static Sum end(Sum sum, Bytes partial) {
        return end(add(sum, _mm256_madd_epi16(partial.high, _mm256_set1_epi16(16))), Nibbles{partial.low});
    }
    static Sum add(Sum left, Sum right) { return _mm256_add_epi32(left, right); }

    static Value all(float value) { return _mm256_set1_ps(value); }
    static Value to_float(Sum sum) { return _mm256_cvtepi32_ps(sum); }
    static Value from_bytes(const uint8_t* bytes) {
        return to_float(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
    }
    static Value from_halves(const uint16_t* halves) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
    }
    static Value times(Value left, float right) { return _mm256_mul_ps(left, all(right)); }
    static Value plus_product(Value sum, Value left, Value right) { return _mm256_fmadd_ps(left, right, sum); }
    static Value plus_product(Value sum, Value left, float right) { return plus_product(sum, left, all(right)); }
    static Value minus_product(Value sum, Value left, float right) { return _mm256_fnmadd_ps(left, all(right), sum); }
    static Value load_floats(const float* floats) { return _mm256_loadu_ps(floats); }
    static void store(float* floats, Value value) { _mm256_storeu_ps(floats, value); }
};

}  // namespace

void multiply_avx2(const Product& job) { multiply<Avx2>(job); }

}  // namespace nashswarm
