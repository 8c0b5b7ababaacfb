// Any processor: loops over arrays that the compiler vectorizes.
#include "trellis_multiply.h"

namespace nashswarm {
namespace {

struct Portable : AnySet<Portable> {
    static constexpr int BYTES = 64, HALVES = 1, OFFSET = 0, LANES = BYTES / 4;
    struct Codes { uint8_t bytes[BYTES]; };
    struct Inputs { int8_t digits[TILE_COLUMNS]; };
    struct Sum { int32_t lanes[LANES]; };
    struct Value { float lanes[LANES]; };

    template <class Result, class Of>
    static Result each(Of of) {
        Result result;
        for (int lane = 0; lane < LANES; ++lane) result.lanes[lane] = of(lane);
        return result;
    }
    template <class Of>
    static Codes each_byte(Of of) {
        Codes result;
        for (int byte = 0; byte < BYTES; ++byte) result.bytes[byte] = uint8_t(of(byte));
        return result;
    }

    static Codes load(const uint8_t* bytes) { return each_byte([&](int byte) { return bytes[byte]; }); }
    static void store_codes(uint8_t* bytes, const Codes& codes) { std::memcpy(bytes, codes.bytes, BYTES); }
    static Codes from_signed(const Codes& codes) { return codes; }
    template <int BY>
    static Codes right(const Codes& codes) { return each_byte([&](int byte) { return codes.bytes[byte] >> BY; }); }
    template <int BY>
    static Codes left(const Codes& codes) { return each_byte([&](int byte) { return codes.bytes[byte] << BY; }); }
    template <int MASK>
    static Codes merge(const Codes& chosen, const Codes& rest) {
        return each_byte([&](int byte) { return (chosen.bytes[byte] & MASK) | (rest.bytes[byte] & ~MASK); });
    }
    template <int BITS>
    static Codes look(const uint8_t* table, const Codes& index) {
        return each_byte([&](int byte) { return table[index.bytes[byte] & ((1 << BITS) - 1)]; });
    }

    static Inputs inputs(const int8_t* digits) {
        Inputs result;
        std::memcpy(result.digits, digits, sizeof result.digits);
        return result;
    }
    static Sum nothing() { return {}; }
    static Sum add(const Sum& left, const Sum& right) {
        return each<Sum>([&](int lane) { return left.lanes[lane] + right.lanes[lane]; });
    }
    static Sum quads(const int32_t* bases) { return each<Sum>([&](int lane) { return bases[lane % 4]; }); }
    template <bool WIDE>
    static Sum multiply(const Sum& sum, const Codes& codes, const Inputs& inputs) {
        return each<Sum>([&](int lane) {
            int32_t total = sum.lanes[lane];
            for (int byte = 0; byte < 4; ++byte)
                total += int8_t(codes.bytes[4 * lane + byte]) * inputs.digits[lane % 4 * 4 + byte];
            return total;
        });
    }

    static Sum load_sums(const int32_t* sums) { return each<Sum>([&](int lane) { return sums[lane]; }); }
    static void store_sums(int32_t* sums, const Sum& sum) { std::memcpy(sums, sum.lanes, sizeof sum.lanes); }
    static Value to_float(const Sum& sum) { return each<Value>([&](int lane) { return float(sum.lanes[lane]); }); }
    static Value plus_product(const Value& sum, const Value& left, float right) {
        return each<Value>([&](int lane) { return sum.lanes[lane] + left.lanes[lane] * right; });
    }
    static Value load_floats(const float* floats) { return each<Value>([&](int lane) { return floats[lane]; }); }
    static void store(float* floats, const Value& value) { std::memcpy(floats, value.lanes, sizeof value.lanes); }
};

}  // namespace

const TrellisPath trellis_portable{PathOf<Portable>::prepare, PathOf<Portable>::multiply, PathOf<Portable>::sum_rows};

}  // namespace nashswarm
