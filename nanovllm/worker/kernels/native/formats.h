// How packed weights lie in memory: what pack.cpp writes and the kernels read.
//
// A matrix is blocks of 16 rows; a block is tiles of 32 columns, in order, perhaps with a header
// before every 8 tiles (K-quants: 256 columns). In a tile, code (row r, column c) is byte 4 r + c % 4
// of "quad" c / 4, whose 64 bytes are one vector. Codes of 4 bits share bytes: quads j and j + 4.
// Value = d * code + m, d and m per row and tile (Q6_K: per half tile).
#pragma once

#include "types.h"

namespace NV_NAMESPACE {

template <int type> struct Layout;
// header: bytes before each 8 tiles; scales: bytes at the head of a tile; extra: bytes of further
// bits of the codes, behind the nibbles; bits: of a code.
#define NV_LAYOUT(type, HEADER, SCALES, NIBBLES, EXTRA, BITS)                            \
    template <> struct Layout<type> {                                                    \
        static constexpr int header = HEADER, scales = SCALES, bits = BITS;              \
        static constexpr int tile = SCALES + NIBBLES + EXTRA;                            \
        static constexpr int nibbles = NIBBLES;                                          \
    }
NV_LAYOUT(Q4_0, 0, 32, 256, 0, 4);
NV_LAYOUT(Q4_1, 0, 64, 256, 0, 4);
NV_LAYOUT(Q5_0, 0, 32, 256, 64, 5);
NV_LAYOUT(Q5_1, 0, 64, 256, 64, 5);
NV_LAYOUT(Q8_0, 0, 32, 512, 0, 8);
NV_LAYOUT(Q4_K, 64, 32, 256, 0, 4);
NV_LAYOUT(Q5_K, 64, 32, 256, 64, 5);
NV_LAYOUT(Q6_K, 32, 32, 256, 128, 6);
NV_LAYOUT(BF16, 0, 0, 1024, 0, 16);
#undef NV_LAYOUT

template <int type> static inline int64_t tile_offset(int tile) {
    using L = Layout<type>;
    return (int64_t)tile * L::tile + (L::header ? (int64_t)(tile / 8 + 1) * L::header : 0);
}
template <int type> static inline int64_t header_offset(int tile) {
    using L = Layout<type>;
    return (int64_t)(tile / 8) * (8 * L::tile + L::header);
}
template <int type> static inline int64_t block_bytes(int columns) {
    using L = Layout<type>;
    int tiles = columns / TILE;
    return (int64_t)tiles * L::tile + (L::header ? (int64_t)(tiles + 7) / 8 * L::header : 0);
}

// Calls f with the type as a constant: with_type(type, [&](auto t) { ... t.value ... }).
template <int t> struct TypeTag { static constexpr int value = t; };
template <typename Function> static inline bool with_type(int type, Function f) {
    switch (type) {
        case Q4_0: f(TypeTag<Q4_0>()); return true;
        case Q4_1: f(TypeTag<Q4_1>()); return true;
        case Q5_0: f(TypeTag<Q5_0>()); return true;
        case Q5_1: f(TypeTag<Q5_1>()); return true;
        case Q8_0: f(TypeTag<Q8_0>()); return true;
        case Q4_K: f(TypeTag<Q4_K>()); return true;
        case Q5_K: f(TypeTag<Q5_K>()); return true;
        case Q6_K: f(TypeTag<Q6_K>()); return true;
        case BF16: f(TypeTag<BF16>()); return true;
        default: return false;
    }
}

}  // namespace NV_NAMESPACE
