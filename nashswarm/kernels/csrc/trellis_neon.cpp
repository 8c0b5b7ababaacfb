// NEON with products of bytes: one row of sixteen columns at a time, and 64 entries of a table.
#include <arm_neon.h>

#include "trellis_multiply.h"

namespace nashswarm {
namespace {

struct TrellisNeon : AnySet<TrellisNeon> {
    static constexpr int BYTES = 16, HALVES = 1, OFFSET = 0;
    using Codes = uint8x16_t;
    using Inputs = int8x16_t;
    using Sum = int32x4_t;
    using Value = float32x4_t;

    static Codes load(const uint8_t* bytes) { return vld1q_u8(bytes); }
    static void store_codes(uint8_t* bytes, Codes codes) { vst1q_u8(bytes, codes); }
    static Codes from_signed(Codes codes) { return codes; }
    template <int BY>
    static Codes right(Codes codes) {
        if constexpr (BY == 0) return codes;
        else return vshrq_n_u8(codes, BY);
    }
    template <int BY>
    static Codes left(Codes codes) { return vshlq_n_u8(codes, BY); }
    template <int MASK>
    static Codes merge(Codes chosen, Codes rest) { return vbslq_u8(vdupq_n_u8(MASK), chosen, rest); }
    template <int BITS>  // an index above the table finds nothing, or leaves what was found before
    static Codes look(const uint8_t* table, Codes index) {
        const Codes place = vandq_u8(index, vdupq_n_u8((1 << BITS) - 1));
        const Codes found = vqtbl4q_u8(vld1q_u8_x4(table), place);
        if constexpr (BITS <= 6) return found;
        else return vqtbx4q_u8(found, vld1q_u8_x4(table + 64), vsubq_u8(place, vdupq_n_u8(64)));
    }

    static Inputs inputs(const int8_t* digits) { return vld1q_s8(digits); }
    static Sum nothing() { return vdupq_n_s32(0); }
    static Sum add(Sum left, Sum right) { return vaddq_s32(left, right); }
    static Sum quads(const int32_t* bases) { return vld1q_s32(bases); }
    template <bool WIDE>
    static Sum multiply(Sum sum, Codes codes, Inputs inputs) { return vdotq_s32(sum, vreinterpretq_s8_u8(codes), inputs); }

    static Sum load_sums(const int32_t* sums) { return vld1q_s32(sums); }
    static void store_sums(int32_t* sums, Sum sum) { vst1q_s32(sums, sum); }
    static Value to_float(Sum sum) { return vcvtq_f32_s32(sum); }
    static Value plus_product(Value sum, Value left, float right) { return vfmaq_n_f32(sum, left, right); }
    static Value load_floats(const float* floats) { return vld1q_f32(floats); }
    static void store(float* floats, Value value) { vst1q_f32(floats, value); }
};

}  // namespace

const TrellisPath trellis_neon{PathOf<TrellisNeon>::prepare, PathOf<TrellisNeon>::multiply, PathOf<TrellisNeon>::sum_rows};

}  // namespace nashswarm
