// AVX-512 with VBMI: one instruction looks up 64 entries, or 128.
#include "trellis_avx512.h"

namespace nashswarm {
namespace {

struct TrellisVbmi : TrellisAvx512<TrellisVbmi> {
    template <int BITS>
    static Codes look(const uint8_t* table, Codes index) {
        if constexpr (BITS <= 6) return _mm512_permutexvar_epi8(index, _mm512_load_si512(table));
        else return _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
    }
};

}  // namespace

const TrellisPath trellis_avx512vbmi{PathOf<TrellisVbmi>::prepare, PathOf<TrellisVbmi>::multiply,
                                     PathOf<TrellisVbmi>::sum_rows};

}  // namespace nashswarm
