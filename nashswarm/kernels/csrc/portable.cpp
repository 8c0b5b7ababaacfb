// Any processor: loops over arrays that the compiler vectorizes.
#include "halves.h"
#include "multiply.h"

namespace nashswarm {
namespace {

struct Portable {
    static constexpr int LANES = 16;
    static constexpr bool IN_PLACE = false;
    struct Codes { uint8_t bytes[4 * LANES]; };
    struct Sum { int32_t lanes[LANES]; };
    struct Value { float lanes[LANES]; };
    template <int WIDTH>
    using Partial = Sum;

    template <class Result, class Of>
    static Result each(Of of) {
        Result result;
        for (int lane = 0; lane < LANES; ++lane) result.lanes[lane] = of(lane);
        return result;
    }
    template <class Of>
    static Codes each_byte(Of of) {
        Codes result;
        for (int byte = 0; byte < 4 * LANES; ++byte) result.bytes[byte] = uint8_t(of(byte));
        return result;
    }

    static Codes load(const uint8_t* bytes) { return each_byte([&](int byte) { return bytes[byte]; }); }
    template <int BITS>
    static Codes mask(const Codes& codes) { return each_byte([&](int byte) { return codes.bytes[byte] & BITS; }); }
    template <int BY>
    static Codes shift(const Codes& codes) { return each_byte([&](int byte) { return codes.bytes[byte] >> BY; }); }
    template <int BY, int BIT>  // the two highest bits of `low`, shifted, and one bit of `high`
    static Codes join(const Codes& low, const Codes& high) {
        return each_byte([&](int byte) { return (low.bytes[byte] & 0xc0) >> BY | (high.bytes[byte] & BIT); });
    }

    static Sum nothing() { return {}; }
    template <int WIDTH>
    static Sum begin(const Sum& sum) { return sum; }
    static Sum multiply(const Sum& sum, const Codes& codes, const int8_t* digits) {
        return each<Sum>([&](int lane) {
            const uint8_t* code = codes.bytes + 4 * lane;
            return sum.lanes[lane] + code[0] * digits[0] + code[1] * digits[1] + code[2] * digits[2] + code[3] * digits[3];
        });
    }
    static Sum end(const Sum&, const Sum& partial) { return partial; }

    static Value all(float value) { return each<Value>([&](int) { return value; }); }
    static Value to_float(const Sum& sum) { return each<Value>([&](int lane) { return float(sum.lanes[lane]); }); }
    static Value from_bytes(const uint8_t* bytes) { return each<Value>([&](int lane) { return float(bytes[lane]); }); }
    static Value from_halves(const uint16_t* halves) { return each<Value>([&](int lane) { return to_single(halves[lane]); }); }
    static Value times(const Value& left, float right) {
        return each<Value>([&](int lane) { return left.lanes[lane] * right; });
    }
    static Value plus_product(const Value& sum, const Value& left, const Value& right) {
        return each<Value>([&](int lane) { return sum.lanes[lane] + left.lanes[lane] * right.lanes[lane]; });
    }
    static Value plus_product(const Value& sum, const Value& left, float right) { return plus_product(sum, left, all(right)); }
    static Value minus_product(const Value& sum, const Value& left, float right) { return plus_product(sum, left, -right); }
    static Value load_floats(const float* floats) { return each<Value>([&](int lane) { return floats[lane]; }); }
    static void store(float* floats, const Value& value) { std::memcpy(floats, value.lanes, sizeof value.lanes); }
};

}  // namespace

void multiply_portable(const Product& job) { multiply<Portable>(job); }

}  // namespace nashswarm
