// Lays out weights as the kernels take them: from GGUF's blocks, or from rows of bfloat16.
//
// Bits are moved, never changed: a packed weight stands for the same numbers as its file.
#include <math.h>
#include <string.h>

#define NV_NAMESPACE nv_layout
#include "formats.h"

namespace {
using namespace nv_layout;

struct Decoded {  // one row's 32 columns
    uint8_t codes[32];
    uint16_t d, m;               // fp16, of 32 columns or of a header
    uint8_t scale, min;          // of K-quants
    uint8_t half_scales[2];      // of Q6_K, signed
};

bool is_finite(uint16_t fp16) { return (fp16 & 0x7c00) != 0x7c00; }
uint16_t u16(const uint8_t* p) {
    uint16_t x;
    memcpy(&x, p, 2);
    return x;
}
void nibbles(const uint8_t* p, uint8_t* codes) {
    for (int i = 0; i < 16; i++) codes[i] = p[i] & 15, codes[i + 16] = p[i] >> 4;
}
void fifth_bits(const uint8_t* p, uint8_t* codes) {
    uint32_t bits;
    memcpy(&bits, p, 4);
    for (int i = 0; i < 32; i++) codes[i] |= (bits >> i & 1) << 4;
}
void k_scales(const uint8_t* q, int j, Decoded& out) {  // 6 bits each, of group j of 8
    out.scale = j < 4 ? q[j] & 63 : (q[j + 4] & 15) | (q[j - 4] >> 6) << 4;
    out.min = j < 4 ? q[j + 4] & 63 : q[j + 4] >> 4 | (q[j] >> 6) << 4;
}

// Formats as in ggml's ggml-common.h. tile: of the row.
template <int type> Decoded decode(const uint8_t* row, int tile) {
    Decoded out{};
    if constexpr (type == Q4_0 || type == Q4_1 || type == Q5_0 || type == Q5_1) {
        constexpr bool has_min = type == Q4_1 || type == Q5_1, has_fifth = Layout<type>::bits == 5;
        const uint8_t* p = row + (int64_t)tile * (18 + 2 * has_min + 4 * has_fifth);
        out.d = u16(p);
        if (has_min) out.m = u16(p + 2);
        p += 2 + 2 * has_min;
        nibbles(p + 4 * has_fifth, out.codes);
        if (has_fifth) fifth_bits(p, out.codes);
    } else if constexpr (type == Q8_0) {
        const uint8_t* p = row + (int64_t)tile * 34;
        out.d = u16(p);
        for (int i = 0; i < 32; i++) out.codes[i] = p[2 + i] ^ 0x80;
    } else if constexpr (type == Q4_K || type == Q5_K) {
        constexpr bool has_fifth = type == Q5_K;
        const uint8_t* p = row + (int64_t)(tile / 8) * (144 + 32 * has_fifth);
        int group = tile % 8;
        out.d = u16(p), out.m = u16(p + 2);
        k_scales(p + 4, group, out);
        const uint8_t *high = p + 16, *low = p + 16 + 32 * has_fifth + group / 2 * 32;
        for (int i = 0; i < 32; i++) {
            out.codes[i] = group % 2 ? low[i] >> 4 : low[i] & 15;
            if (has_fifth) out.codes[i] |= (high[i] >> group & 1) << 4;
        }
    } else if constexpr (type == Q6_K) {
        const uint8_t* p = row + (int64_t)(tile / 8) * 210;
        int group = tile % 8, half = group / 4, part = group % 4;
        const uint8_t *low = p + half * 64 + part % 2 * 32, *high = p + 128 + half * 32;
        for (int i = 0; i < 32; i++) {
            int nibble = part / 2 ? low[i] >> 4 : low[i] & 15;
            out.codes[i] = (uint8_t)(nibble | (high[i] >> 2 * part & 3) << 4);
        }
        memcpy(out.half_scales, p + 192 + 2 * group, 2);
        out.d = u16(p + 208);
    }
    return out;
}

template <int type> bool place(const Decoded& x, int lane, int tile, uint8_t* block) {
    using L = Layout<type>;
    uint8_t *header = block + header_offset<type>(tile), *p = block + tile_offset<type>(tile);
    uint8_t* scales = L::header ? header : p;
    memcpy(scales + 2 * lane, &x.d, 2);
    if (type != Q6_K && (L::header ? L::header : L::scales) == 64)
        memcpy(scales + 32 + 2 * lane, &x.m, 2);
    if (type == Q4_K || type == Q5_K) p[lane] = x.scale, p[16 + lane] = x.min;
    if (type == Q6_K) p[lane] = x.half_scales[0], p[16 + lane] = x.half_scales[1];
    uint8_t *codes = p + L::scales, *extra = codes + L::nibbles;
    for (int c = 0; c < 32; c++) {
        int quad = c / 4, at = 4 * lane + c % 4;
        if (L::bits == 8) {
            codes[64 * quad + at] = x.codes[c];
            continue;
        }
        codes[64 * (quad % 4) + at] |= (x.codes[c] & 15) << 4 * (quad / 4);
        if (L::bits == 5) extra[at] |= (x.codes[c] >> 4) << quad;
        if (L::bits == 6) extra[64 * (quad / 4) + at] |= (x.codes[c] >> 4) << 2 * (quad % 4);
    }
    return is_finite(x.d) && is_finite(x.m);
}
}  // namespace

extern "C" int64_t nv_packed_bytes(int type, int rows, int columns) {
    int64_t bytes = -1;
    with_type(type, [&](auto t) { bytes = (rows + BLOCK - 1) / BLOCK * block_bytes<t.value>(columns); });
    return bytes;
}

// raw: rows as a GGUF file has them, `row_bytes` apart. packed: zeros, to be written.
// Returns the first row with a scale that is no number, or -1.
extern "C" int64_t nv_pack(int type, int rows, int columns, const uint8_t* raw, int64_t row_bytes,
                           uint8_t* packed) {
    int64_t bad = -1;
    with_type(type, [&](auto t) {
        constexpr int kind = t.value;
        for (int64_t row = 0; row < rows; row++) {
            uint8_t* block = packed + row / BLOCK * block_bytes<kind>(columns);
            const uint8_t* from = raw + row * row_bytes;
            int lane = (int)(row % BLOCK);
            for (int tile = 0; tile < columns / TILE; tile++) {
                if constexpr (kind == BF16) {
                    for (int pair = 0; pair < 16; pair++)
                        memcpy(block + tile * 1024 + pair * 64 + lane * 4,
                               from + tile * 64 + pair * 4, 4);
                } else if (!place<kind>(decode<kind>(from, tile), lane, tile, block) && bad < 0) {
                    bad = row;
                }
            }
        }
    });
    return bad;
}
