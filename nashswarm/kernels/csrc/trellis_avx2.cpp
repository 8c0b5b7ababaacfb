// AVX2: two rows of sixteen columns at a time, and sixteen entries of a table.
#include <immintrin.h>

#include "trellis_multiply.h"

namespace nashswarm {
namespace {

struct TrellisAvx2 : AnyRows {
    static constexpr int BYTES = 32, HALVES = 1, OFFSET = 0;
    using Codes = __m256i;
    struct Inputs { __m256i digits, magnitudes; };
    using Sum = __m256i;
    using Value = __m256;

    // Each sixteen entries after the first are stored as differences (XOR) from those before them.
    static void finish_table(uint8_t* table, int size) {
        for (int entry = size - 1; entry >= 16; --entry) table[entry] ^= table[entry - 16];
    }
    static Codes load(const uint8_t* bytes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)); }
    static void store_codes(uint8_t* bytes, Codes codes) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), codes); }
    static Codes from_signed(Codes codes) { return codes; }
    template <int BY>  // shifts in bits of the neighbouring byte
    static Codes right(Codes codes) { return BY ? _mm256_srli_epi16(codes, BY) : codes; }
    template <int BY>
    static Codes left(Codes codes) { return BY ? _mm256_slli_epi16(codes, BY) : codes; }
    template <int MASK>
    static Codes merge(Codes chosen, Codes rest) {
        const __m256i mask = _mm256_set1_epi8(char(MASK));
        return _mm256_or_si256(_mm256_and_si256(chosen, mask), _mm256_andnot_si256(mask, rest));
    }
    // An index minus 16 k is negative, and finds nothing, unless it belongs to the k-th sixteen entries or later ones.
    template <int BITS>
    static Codes look(const uint8_t* table, Codes index) {
        const __m256i place = _mm256_and_si256(index, _mm256_set1_epi8((1 << BITS) - 1));
        __m256i values = _mm256_setzero_si256();
        for (int first = 0; first < 1 << BITS; first += 16) {
            const __m256i entries = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table + first)));
            const __m256i found = _mm256_shuffle_epi8(entries, _mm256_sub_epi8(place, _mm256_set1_epi8(char(first))));
            values = first ? _mm256_xor_si256(values, found) : found;
        }
        return values;
    }

    static Inputs inputs(const int8_t* digits) {
        const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(digits)));
        return {all, _mm256_abs_epi8(all)};
    }
    static Sum nothing() { return _mm256_setzero_si256(); }
    static Sum add(Sum left, Sum right) { return _mm256_add_epi32(left, right); }
    static Sum quads(const int32_t* bases) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bases)));
    }
    template <bool WIDE>
    static Sum multiply(Sum sum, Codes codes, const Inputs& inputs) {
        if constexpr (WIDE) {  // a value of -128 has no opposite
            const auto low = [](__m256i bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); };
            const auto high = [](__m256i bytes) { return _mm256_srai_epi16(bytes, 8); };
            return add(sum, add(_mm256_madd_epi16(low(codes), low(inputs.digits)),
                                _mm256_madd_epi16(high(codes), high(inputs.digits))));
        }
        // Values are at least -127, so that the sum of two products, at most 2 · 127 · 128, does not saturate.
        const __m256i pairs = _mm256_maddubs_epi16(inputs.magnitudes, _mm256_sign_epi8(codes, inputs.digits));
        return add(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }

    static Sum load_sums(const int32_t* sums) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums)); }
    static void store_sums(int32_t* sums, Sum sum) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), sum); }
    static Value to_float(Sum sum) { return _mm256_cvtepi32_ps(sum); }
    static Value plus_product(Value sum, Value left, float right) {
        return _mm256_fmadd_ps(left, _mm256_set1_ps(right), sum);
    }
    static Value load_floats(const float* floats) { return _mm256_loadu_ps(floats); }
    static void store(float* floats, Value value) { _mm256_storeu_ps(floats, value); }
};

}  // namespace

const TrellisPath trellis_avx2{PathOf<TrellisAvx2>::prepare, PathOf<TrellisAvx2>::multiply, PathOf<TrellisAvx2>::sum_rows};

}  // namespace nashswarm
