// AVX2: two rows of sixteen columns at a time, and sixteen entries of a table.
#include <immintrin.h>

#include "trellis_multiply.h"

namespace nashswarm {
namespace {

// Constants as operands in memory, written in assembly where compilers would make them in registers again and again.
struct alignas(32) Bytes { uint8_t each[32]; };
constexpr Bytes repeated(int even, int odd) {
    Bytes bytes{};
    for (int place = 0; place < 32; place += 2) {
        bytes.each[place] = uint8_t(even);
        bytes.each[place + 1] = uint8_t(odd);
    }
    return bytes;
}
template <int BYTE>
constexpr Bytes EACH_BYTE = repeated(BYTE, BYTE);
constexpr Bytes EACH_WORD = repeated(1, 0);

struct TrellisAvx2 : AnySet<TrellisAvx2> {
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
    static Codes only(Codes codes) {
        __asm__("vpand %1, %0, %0" : "+x"(codes) : "m"(EACH_BYTE<MASK>));
        return codes;
    }
    static __m256i sixteen(const uint8_t* entries) {
        return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(entries)));
    }
    template <int MASK>
    static Codes merge(Codes chosen, Codes rest) {
        return _mm256_or_si256(only<MASK>(chosen), only<0xff & ~MASK>(rest));
    }
    template <int BITS, int MASK>
    static Codes index(Codes chosen, Codes rest) {
        constexpr int ALL = (1 << BITS) - 1;
        if constexpr ((MASK & ALL) == ALL) return only<ALL>(chosen);
        else return _mm256_or_si256(only<MASK & ALL>(chosen), only<ALL & ~MASK>(rest));
    }
    // An index minus 16 k is negative, and finds nothing, unless it belongs to the k-th sixteen entries or later ones.
    template <int BITS>
    static Codes look(const uint8_t* table, Codes index) {
        __asm__ volatile("" : "+r"(table));  // there are not enough registers to keep tables
        __m256i values = _mm256_shuffle_epi8(sixteen(table), index);
        for (int first = 16; first < 1 << BITS; first += 16) {
            __asm__("vpsubb %1, %0, %0" : "+x"(index) : "m"(EACH_BYTE<16>));
            values = _mm256_xor_si256(values, _mm256_shuffle_epi8(sixteen(table + first), index));
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
        __m256i pairs = _mm256_maddubs_epi16(inputs.magnitudes, _mm256_sign_epi8(codes, inputs.digits));
        __asm__("vpmaddwd %1, %0, %0" : "+x"(pairs) : "m"(EACH_WORD));
        return add(sum, pairs);
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
