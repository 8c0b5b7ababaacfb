// Where the bits of a table index come from, and the tables in the order of these bits.
//
// The eight steps of a half find their bits in the same few registers.  An index is put together from them with few shifts
// and merges, so that its bits stand in another order at each step: each step has a table of its own, in that order.
// Bits that do not belong to an index may have any value.
#pragma once

#include <cmath>
#include <utility>

#include "trellis.h"

namespace nashswarm {
namespace {

constexpr int index_bits(int rate) { return MEMORY[rate] + rate; }

// The registers of a half and of the coded bits before it.
template <class Set, int RATE>
struct Half {
    typename Set::Codes coded;   // bit s belongs to step s
    typename Set::Codes next;    // coded >> 2
    typename Set::Codes before;  // the same of the other half
    typename Set::Codes other;   // the coded bits of the other half
    typename Set::Codes joined;  // the first three coded bits, and from bit 3 the last three of the other half
    typename Set::Codes plain[RATE > 1 ? RATE - 1 : 1];
};

template <class Set, int RATE>
ALWAYS_INLINE Half<Set, RATE> read_half(const uint8_t* tile, int half) {
    Half<Set, RATE> read;
    const uint8_t* own = tile + half * RATE * STEP_BYTES;
    read.coded = Set::load(own);
    read.other = Set::load(tile + (1 - half) * RATE * STEP_BYTES);
    read.next = Set::template right<2>(read.coded);
    read.before = Set::template right<2>(read.other);
    read.joined = Set::template merge<0x07>(read.coded, read.before);
    for (int bit = 0; bit + 1 < RATE; ++bit) read.plain[bit] = Set::load(own + (bit + 1) * STEP_BYTES);
    return read;
}

// Puts bit FROM of each byte at bit TO, if it is among the bits MASK of the result; the others are those of `rest`.
template <class Set, int FROM, int TO>
ALWAYS_INLINE constexpr typename Set::Codes move_bit(typename Set::Codes codes, typename Set::Codes rest) {
    if constexpr (FROM > TO) return Set::template merge<1 << TO>(Set::template right<FROM - TO>(codes), rest);
    else return Set::template merge<1 << TO>(Set::template left<TO - FROM>(codes), rest);
}

template <class Set, int RATE, int STEP, int... BIT>
ALWAYS_INLINE constexpr typename Set::Codes append_plain(const Half<Set, RATE>& half, typename Set::Codes index,
                                               std::integer_sequence<int, BIT...>) {
    ((index = move_bit<Set, STEP, MEMORY[RATE] + 1 + BIT>(half.plain[BIT], index)), ...);
    return Set::template index<index_bits(RATE), 0xff>(index, index);
}

// The index of a step, in its lowest bits.  The last merge is an operation of its own: a set may clear the other bits.
template <class Set, int RATE, int STEP>
ALWAYS_INLINE constexpr typename Set::Codes index_of(const Half<Set, RATE>& half) {
    [[maybe_unused]] const auto &coded = half.coded, &next = half.next, &before = half.before;
    [[maybe_unused]] const auto &other = half.other, &joined = half.joined;
    [[maybe_unused]] const auto& plain = half.plain;
    [[maybe_unused]] const auto one = Set::template right<1>(coded);
    constexpr int BITS = index_bits(RATE);
    if constexpr (RATE == 1) {
        if constexpr (STEP < 5) return Set::template index<BITS, (2 << STEP) - 1>(coded, before);
        if constexpr (STEP == 5) return Set::template index<BITS, 0xff>(coded, coded);
        if constexpr (STEP == 6) return Set::template index<BITS, 0xff>(one, one);
        if constexpr (STEP == 7) return Set::template index<BITS, 0xff>(next, next);
    }
    if constexpr (RATE == 2) {
        if constexpr (STEP == 0) return Set::template index<BITS, 0x02>(plain[0], Set::template merge<0x01>(coded, before));
        if constexpr (STEP == 1) return Set::template index<BITS, 0x04>(plain[0], joined);
        if constexpr (STEP == 2) return Set::template index<BITS, 0x08>(plain[0], joined);
        if constexpr (STEP == 3) return Set::template index<BITS, 0x10>(plain[0], Set::template merge<0x0f>(coded, before));
        if constexpr (STEP == 4) return Set::template index<BITS, 0x20>(plain[0], coded);
        if constexpr (STEP == 5) return Set::template index<BITS, 0x01>(plain[0], coded);
        if constexpr (STEP == 6) return Set::template index<BITS, 0x20>(Set::template right<2>(plain[0]), next);
        if constexpr (STEP == 7) return Set::template index<BITS, 0x01>(Set::template right<6>(plain[0]), next);
    }
    if constexpr (RATE == 3) {
        if constexpr (STEP == 0) return Set::template index<BITS, 0x06>(plain[0], joined);
        if constexpr (STEP == 1) return Set::template index<BITS, 0x0c>(plain[1], joined);
        if constexpr (STEP == 2) return Set::template index<BITS, 0x18>(plain[0], joined);
        if constexpr (STEP == 3) return Set::template index<BITS, 0x30>(plain[1], coded);
        if constexpr (STEP == 4) return Set::template index<BITS, 0x30>(Set::template right<2>(plain[0]), one);
        if constexpr (STEP == 5) return Set::template index<BITS, 0x03>(plain[1], coded);
        if constexpr (STEP == 6) return Set::template index<BITS, 0x21>(plain[0], next);
        if constexpr (STEP == 7) return Set::template index<BITS, 0x03>(Set::template right<6>(plain[1]), next);
    }
    if constexpr (RATE == 4) {
        [[maybe_unused]] const auto half_0 = Set::template right<1>(plain[0]), half_1 = Set::template right<1>(plain[1]);
        if constexpr (STEP == 0)
            return Set::template index<BITS, 0x42>(half_0, Set::template merge<0x04>(half_1, joined));
        if constexpr (STEP == 1)
            return Set::template index<BITS, 0x44>(Set::template right<1>(plain[2]), Set::template merge<0x08>(half_1, joined));
        if constexpr (STEP == 2) return Set::template index<BITS, 0x58>(Set::template left<3>(plain[0]), joined);
        if constexpr (STEP == 3) return Set::template index<BITS, 0x70>(plain[0], coded);
        if constexpr (STEP == 4) return Set::template index<BITS, 0x61>(plain[1], coded);
        if constexpr (STEP == 5) return Set::template index<BITS, 0x70>(plain[2], next);
        if constexpr (STEP == 6) return Set::template index<BITS, 0x07>(plain[2], coded);
        if constexpr (STEP == 7) return Set::template index<BITS, 0x43>(half_1, next);
    }
    if constexpr (RATE > 4) {
        constexpr int LAGS = MEMORY[RATE];
        constexpr auto ALL = std::make_integer_sequence<int, RATE - 1>();
        if constexpr (STEP >= LAGS) {
            return append_plain<Set, RATE, STEP>(half, Set::template right<STEP - LAGS>(coded), ALL);
        } else {  // the newest STEP + 1 coded bits are those of this half
            constexpr int OLDER = LAGS - STEP;
            const auto window = Set::template merge<(1 << OLDER) - 1>(Set::template right<HALF - OLDER>(other),
                                                                      Set::template left<OLDER>(coded));
            return append_plain<Set, RATE, STEP>(half, window, ALL);
        }
    }
}

// A register whose bits are the names of bits of the form: 0 … 7 of the coded bits, 8 … 15 of those of the other half, and
// 16 + 8 i + b for bit b of register i of the plain bits.
struct Names {
    static constexpr int UNKNOWN = -1;
    struct Codes { int bits[8] = {}; };
    template <class Of>
    static constexpr Codes each(Of of) {
        Codes codes;
        for (int bit = 0; bit < 8; ++bit) codes.bits[bit] = of(bit);
        return codes;
    }
    template <int BY>
    static constexpr Codes right(const Codes& codes) {
        return each([&](int bit) { return bit + BY < 8 ? codes.bits[bit + BY] : UNKNOWN; });
    }
    template <int BY>
    static constexpr Codes left(const Codes& codes) {
        return each([&](int bit) { return bit - BY >= 0 ? codes.bits[bit - BY] : UNKNOWN; });
    }
    template <int MASK>
    static constexpr Codes merge(const Codes& chosen, const Codes& rest) {
        return each([&](int bit) { return MASK >> bit & 1 ? chosen.bits[bit] : rest.bits[bit]; });
    }
    template <int BITS, int MASK>
    static constexpr Codes index(const Codes& chosen, const Codes& rest) { return merge<MASK>(chosen, rest); }
};

constexpr int PLACES[3][HALF][3] = {  // of rates 2, 3, 4: 8 · register + bit of each plain bit of a step, as PLACES in Python
    {{1}, {2}, {3}, {4}, {5}, {0}, {7}, {6}},
    {{1, 2}, {10, 11}, {3, 4}, {12, 13}, {6, 7}, {8, 9}, {0, 5}, {14, 15}},
    {{2, 11, 7}, {19, 12, 23}, {0, 1, 3}, {4, 5, 6}, {8, 13, 14}, {20, 21, 22}, {16, 17, 18}, {9, 10, 15}},
};

constexpr int place_of_plain(int rate, int step, int bit) { return rate > 4 ? 8 * bit + step : PLACES[rate - 2][step][bit]; }

// The bit of an index of the form (plain bits lowest) that a named bit is, or -1.
constexpr int meaning(int name, int rate, int step) {
    if (name < 0) return -1;
    if (name < 16) {
        const int lag = name < 8 ? step - name : step + 16 - name;
        return lag >= 0 && lag <= MEMORY[rate] ? rate - 1 + lag : -1;
    }
    for (int bit = 0; bit < rate - 1; ++bit)
        if (place_of_plain(rate, step, bit) == name - 16) return bit;
    return -1;
}

struct Meanings {
    int of[8] = {};  // by bit of the index
};

template <int RATE, int STEP>
constexpr Meanings meanings() {
    Half<Names, RATE> half{};
    half.coded = Names::each([](int bit) { return bit; });
    half.other = Names::each([](int bit) { return 8 + bit; });
    half.next = Names::right<2>(half.coded);
    half.before = Names::right<2>(half.other);
    half.joined = Names::merge<0x07>(half.coded, half.before);
    for (int number = 0; number + 1 < RATE; ++number)
        half.plain[number] = Names::each([&](int bit) { return 16 + 8 * number + bit; });
    const Names::Codes index = index_of<Names, RATE, STEP>(half);
    Meanings found;
    for (int bit = 0; bit < index_bits(RATE); ++bit) found.of[bit] = meaning(index.bits[bit], RATE, STEP);
    return found;
}

constexpr bool complete(const Meanings& found, int bits) {
    int seen = 0;
    for (int bit = 0; bit < bits; ++bit)
        if (found.of[bit] >= 0) seen |= 1 << found.of[bit];
    return seen == (1 << bits) - 1;
}

struct Tables {
    alignas(64) uint8_t of[RATES][HALF][LARGEST_TABLE];
    float column_scale[256], row_scale[256], row_size[16];  // by code
};

template <class Set>
void arrange_step(const int8_t* table, const Meanings& meanings, int bits, uint8_t* arranged) {
    for (int entry = 0; entry < 1 << bits; ++entry) {
        int place = 0;
        for (int bit = 0; bit < bits; ++bit) place |= (entry >> bit & 1) << meanings.of[bit];
        arranged[entry] = uint8_t(table[place] + Set::OFFSET);
    }
    Set::finish_table(arranged, 1 << bits);
}

template <class Set, int RATE, int... STEP>
void arrange_rate(const int8_t* table, uint8_t (*arranged)[LARGEST_TABLE], std::integer_sequence<int, STEP...>) {
    static_assert((complete(meanings<RATE, STEP>(), index_bits(RATE)) && ...), "an index lacks one of its bits");
    constexpr Meanings ALL[] = {meanings<RATE, STEP>()...};
    for (int step = 0; step < HALF; ++step) arrange_step<Set>(table, ALL[step], index_bits(RATE), arranged[step]);
}

template <class Set, int... RATE>
void arrange(const int8_t (*given)[LARGEST_TABLE], Tables& tables, std::integer_sequence<int, RATE...>) {
    for (int code = 0; code < 256; ++code) {
        tables.column_scale[code] = float(std::exp2((code - 128) / 16.0));
        tables.row_scale[code] = float(std::exp2((code - 128) / 8.0));
    }
    for (int code = 0; code < 16; ++code) tables.row_size[code] = float(std::exp2(-code / 4.0));
    constexpr auto ALL = std::make_integer_sequence<int, HALF>();
    (arrange_rate<Set, RATE + 1>(given[RATE + 1], tables.of[RATE + 1], ALL), ...);
}

}  // namespace
}  // namespace nashswarm
