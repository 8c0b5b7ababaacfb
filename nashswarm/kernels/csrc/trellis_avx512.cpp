// AVX-512 without VBMI: sixteen entries of a table at a time.
#include "trellis_avx512.h"

namespace nashswarm {
namespace {

struct TrellisWords : TrellisAvx512<TrellisWords> {
    static __m512i sixteen(const uint8_t* entries) {
        return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(entries)));
    }
    template <int BITS>
    static Codes look(const uint8_t* table, Codes index) {
        const __m512i low = _mm512_and_si512(index, _mm512_set1_epi8(15));
        const __mmask64 odd = _mm512_test_epi8_mask(index, _mm512_set1_epi8(16));
        const __mmask64 upper = _mm512_test_epi8_mask(index, _mm512_set1_epi8(32));
        const auto quarter = [&](const uint8_t* entries) {
            return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(sixteen(entries), low), odd, sixteen(entries + 16), low);
        };
        const auto half = [&](const uint8_t* entries) {
            return _mm512_mask_blend_epi8(upper, quarter(entries), quarter(entries + 32));
        };
        if constexpr (BITS <= 6) return half(table);
        return _mm512_mask_blend_epi8(_mm512_test_epi8_mask(index, _mm512_set1_epi8(64)), half(table), half(table + 64));
    }
};

}  // namespace

const TrellisPath trellis_avx512{PathOf<TrellisWords>::prepare, PathOf<TrellisWords>::multiply,
                                 PathOf<TrellisWords>::sum_rows};

}  // namespace nashswarm
