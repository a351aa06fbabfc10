// The kernels, written once: an isa_*.cpp includes this for its instruction set.
#pragma once

#include "formats.h"
#include "simd.h"
#include "types.h"

namespace NV_NAMESPACE {

// ---- weights

template <int type> struct Tile {  // what a quantized tile holds: quads of codes, scales
    static constexpr int parts = type == Q6_K ? 2 : 1;
    Codes codes[8];
    F d[parts], m[parts];

    Tile(const uint8_t* block, int index) {
        using L = Layout<type>;
        const uint8_t* p = block + tile_offset<type>(index);
        const uint8_t* header = block + header_offset<type>(index);
        const uint16_t* scales = (const uint16_t*)(L::header ? header : p);
        F unit = load_fp16(scales);
        if constexpr (type == Q4_1 || type == Q5_1) {
            d[0] = unit, m[0] = load_fp16(scales + 16);
        } else if constexpr (type == Q4_K || type == Q5_K) {
            d[0] = unit * load_u8(p);
            m[0] = zero() - load_fp16(scales + 16) * load_u8(p + 16);
        } else if constexpr (type == Q6_K) {
            for (int h = 0; h < 2; h++) {
                d[h] = unit * load_s8((const int8_t*)p + 16 * h);
                m[h] = d[h] * set1(-32.0f);
            }
        } else {
            d[0] = unit, m[0] = unit * set1(type == Q8_0 ? -128.0f : type == Q5_0 ? -16.0f : -8.0f);
        }
        const uint8_t *low = p + L::scales, *extra = low + L::nibbles;
        if constexpr (L::bits == 8) {
            for (int j = 0; j < 8; j++) codes[j] = load_codes(low + 64 * j);
            return;
        }
        for (int j = 0; j < 4; j++) {
            Codes both = load_codes(low + 64 * j);
            codes[j] = low_bits(both, 15);
            codes[j + 4] = shifted<4>(both, 15);
        }
        if constexpr (L::bits == 5) {
            Codes high = load_codes(extra);
            codes[0] = join<4>(codes[0], low_bits(high, 1));
            codes[1] = join<4>(codes[1], shifted<1>(high, 1));
            codes[2] = join<4>(codes[2], shifted<2>(high, 1));
            codes[3] = join<4>(codes[3], shifted<3>(high, 1));
            codes[4] = join<4>(codes[4], shifted<4>(high, 1));
            codes[5] = join<4>(codes[5], shifted<5>(high, 1));
            codes[6] = join<4>(codes[6], shifted<6>(high, 1));
            codes[7] = join<4>(codes[7], shifted<7>(high, 1));
        }
        if constexpr (L::bits == 6)
            for (int half = 0; half < 2; half++) {
                Codes high = load_codes(extra + 64 * half), *four = codes + 4 * half;
                four[0] = join<4>(four[0], low_bits(high, 3));
                four[1] = join<4>(four[1], shifted<2>(high, 3));
                four[2] = join<4>(four[2], shifted<4>(high, 3));
                four[3] = join<4>(four[3], shifted<6>(high, 3));
            }
    }
};

// One row of a packed matrix, dequantized: an embedding.
static void row(const Matrix& w, int64_t index, float* out) {
    int lane = (int)(index % BLOCK);
    with_type(w.type, [&](auto t) {
        constexpr int type = t.value;
        const uint8_t* block = w.data + index / BLOCK * block_bytes<type>(w.columns);
        for (int tile = 0; tile < w.columns / TILE; tile++) {
            float values[BLOCK];
            if constexpr (type == BF16) {
                for (int pair = 0; pair < 16; pair++) {
                    const uint16_t* p = (const uint16_t*)(block + tile * 1024 + pair * 64);
                    store(values, even_bf16(p));
                    out[tile * TILE + 2 * pair] = values[lane];
                    store(values, odd_bf16(p));
                    out[tile * TILE + 2 * pair + 1] = values[lane];
                }
            } else {
                Tile<type> x(block, tile);
                for (int c = 0; c < TILE; c++) {
                    int part = Tile<type>::parts == 2 ? c / 16 : 0;
                    store(values, fma(code(x.codes[c / 4], c % 4), x.d[part], x.m[part]));
                    out[tile * TILE + c] = values[lane];
                }
            }
        }
    });
}

// ---- tokens

// 32 of a token's values.
static inline void keep(F first, F second, const Tokens& to, int64_t token, int64_t tile) {
    int64_t at = token * (to.width / TILE) + tile;
    if (to.halves) {
        store_bf16(to.halves + TILE * at, first);
        store_bf16(to.halves + TILE * at + BLOCK, second);
    }
    if (!to.bytes) return;
    float most = peak(max(abs(first), abs(second)));
    float scale = most / 127.0f;
    F inverse = set1(most > 0 ? 127.0f / most : 0.0f);
    first = round(first * inverse), second = round(second * inverse);
    store_s8(to.bytes + TILE * at, first);
    store_s8(to.bytes + TILE * at + BLOCK, second);
    float sums[2] = {sum(first) * scale, sum(second) * scale};
    to.scales[at] = scale;
    to.sums[at] = sums[0] + sums[1];
    memcpy(to.half_sums + 2 * at, sums, sizeof sums);
}

static inline float rms_scale(const float* x, float eps, int64_t width) {
    F squares = zero();
    for (int64_t i = 0; i < width; i += BLOCK) squares = fma(load(x + i), load(x + i), squares);
    return 1.0f / sqrtf(sum(squares) / (float)width + eps);
}

// x: [width]; norm: the weight by which it is normed first, or null.
static void prepare(const float* x, const float* norm, float eps, const Tokens& to, int64_t token) {
    F scale = set1(norm ? rms_scale(x, eps, to.width) : 1.0f);
    for (int64_t i = 0; i < to.width; i += TILE) {
        F first = load(x + i), second = load(x + i + BLOCK);
        if (norm) {
            first = first * scale * load(norm + i);
            second = second * scale * load(norm + i + BLOCK);
        }
        keep(first, second, to, token, i / TILE);
    }
}

// Both activations are x * sigmoid(y). GELU with a tanh: 1 + tanh(u) is 2 * sigmoid(2u).
static inline F activated(F x, int activation) {
    F y = x;
    if (activation == GELU_TANH)
        y = set1(1.5957691216f) * fma(set1(0.044715f) * x * x, x, x);  // 2 * sqrt(2 / pi)
    return x / (set1(1.0f) + exp(zero() - y));
}

// Activated gates times what they let through become 32 of each token's values. gate, up: [n, 32].
static void gate(const float* gate, const float* up, int num_tokens, int activation, const Tokens& to,
                 int64_t tile) {
    for (int64_t t = 0; t < num_tokens; t++, gate += TILE, up += TILE)
        keep(activated(load(gate), activation) * load(up),
             activated(load(gate + BLOCK), activation) * load(up + BLOCK), to, t, tile);
}

// ---- products

static inline void put(F sums, float* out, const float* bias, int count, bool add) {
    if (count >= BLOCK) {
        if (bias) sums = sums + load(bias);
        store(out, add ? sums + load(out) : sums);
        return;
    }
    float lanes[BLOCK];
    store(lanes, sums);
    for (int i = 0; i < count; i++) out[i] = lanes[i] + (bias ? bias[i] : 0) + (add ? out[i] : 0);
}

// The products of one block with `N` tokens from `token` on.
template <int type, int N>
static inline void products(const uint8_t* block, int tiles, const Tokens& x, int64_t token, F* acc) {
    if constexpr (type == BF16) {
        constexpr int chains = N == 1 ? 4 : N == 2 ? 2 : 1;  // a sum waits for the one before
        F part[N][chains];
        for (int t = 0; t < N; t++)
            for (int c = 0; c < chains; c++) part[t][c] = zero();
        const uint16_t *weights = (const uint16_t*)block, *values = x.halves + token * x.width;
        for (int pair = 0; pair < tiles * 16; pair += chains)
            for (int c = 0; c < chains; c++)
                for (int t = 0; t < N; t++)
                    part[t][c] = dot_bf16(part[t][c], weights + 32 * (pair + c),
                                          values + t * x.width + 2 * (pair + c));
        for (int t = 0; t < N; t++) {
            acc[t] = part[t][0];
            for (int c = 1; c < chains; c++) acc[t] = acc[t] + part[t][c];
        }
    } else {
        constexpr int parts = Tile<type>::parts, quads = 8 / parts;
        constexpr bool wide = Layout<type>::bits > 4;
        for (int t = 0; t < N; t++) acc[t] = zero();
        int64_t first = token * tiles;
        for (int tile = 0; tile < tiles; tile++) {
            Tile<type> w(block, tile);
            for (int t = 0; t < N; t++) {
                const int8_t* bytes = x.bytes + (token + t) * x.width + TILE * tile;
                int64_t at = first + (int64_t)t * tiles + tile;
                const float* sums = parts == 2 ? x.half_sums + 2 * at : x.sums + at;
                F scale = set1(x.scales[at]);
                for (int h = 0; h < parts; h++) {
                    I whole = izero();
                    for (int j = h * quads; j < (h + 1) * quads; j++)
                        whole = dot<wide>(whole, w.codes[j], bytes + 4 * j);
                    acc[t] = fma(to_float(whole) * w.d[h], scale, acc[t]);
                    acc[t] = fma(w.m[h], set1(sums[h]), acc[t]);
                }
            }
        }
    }
}

template <int type, int N>
static inline int by_tokens(const Matrix& w, const Tokens& x, int token, int num_tokens, int block,
                            float* out, int64_t stride, const float* bias, bool add) {
    const uint8_t* data = w.data + block * block_bytes<type>(w.columns);
    int column = block * BLOCK, count = w.rows - column;
    for (; token + N <= num_tokens; token += N) {
        F acc[N];
        products<type, N>(data, w.columns / TILE, x, token, acc);
        for (int t = 0; t < N; t++)
            put(acc[t], out + (token + t) * stride + column, bias ? bias + column : 0, count, add);
    }
    return token;
}

static void linear_by_vectors(const Matrix& w, const Tokens& x, int num_tokens, int first_block,
                              int end_block, float* out, int64_t stride, const float* bias,
                              bool add) {
    with_type(w.type, [&](auto tag) {
        constexpr int type = tag.value;
        for (int block = first_block; block < end_block; block++) {
            int t = by_tokens<type, 8>(w, x, 0, num_tokens, block, out, stride, bias, add);
            t = by_tokens<type, 4>(w, x, t, num_tokens, block, out, stride, bias, add);
            t = by_tokens<type, 2>(w, x, t, num_tokens, block, out, stride, bias, add);
            by_tokens<type, 1>(w, x, t, num_tokens, block, out, stride, bias, add);
        }
    });
}

#if defined(NV_ISA_AMX)
#include "amx.h"
#else
static Form form(int type, int) { return type == BF16 ? HALVES : BYTES; }
static int64_t scratch_bytes(int, int, int) { return 0; }
static void linear(const Matrix& w, const Tokens& x, int num_tokens, int first_block, int end_block,
                   float* out, int64_t stride, const float* bias, bool add, uint8_t*) {
    linear_by_vectors(w, x, num_tokens, first_block, end_block, out, stride, bias, add);
}
#endif

// ---- between products

static void rms_norm(const float* x, const float* weight, float eps, int width, float* out,
                     bool add) {
    F scale = set1(rms_scale(x, eps, width));
    for (int i = 0; i < width; i += BLOCK) {
        F normed = load(x + i) * scale * load(weight + i);
        store(out + i, add ? load(out + i) + normed : normed);
    }
}

static void rotate(float* head, const float* cos_sin, int head_dim) {
    int half = head_dim / 2, i = 0;
    for (; i + BLOCK <= half; i += BLOCK) {
        F a = load(head + i), b = load(head + half + i);
        F cos = load(cos_sin + i), sin = load(cos_sin + half + i);
        store(head + i, a * cos - b * sin);
        store(head + half + i, b * cos + a * sin);
    }
    for (; i < half; i++) {
        float a = head[i], b = head[half + i], cos = cos_sin[i], sin = cos_sin[half + i];
        head[i] = a * cos - b * sin;
        head[half + i] = b * cos + a * sin;
    }
}

template <typename Value>
static void cache_heads(const float* heads, const Heads& shape, int64_t slot, Value* cache) {
    int width = shape.num_kv_heads * shape.head_dim;
    for (int i = 0; i < width; i += BLOCK) store_value(cache + slot * width + i, load(heads + i));
}

// One token's queries, keys and values: norms, rotation, and keys and values to their slot.
static void rope(float* qkv, const Rope& rope, const Heads& heads, int64_t position, int64_t slot,
                 const Cache& cache) {
    int head_dim = heads.head_dim, rotating = heads.num_heads + heads.num_kv_heads;
    float* keys = qkv + heads.num_heads * head_dim;
    if (rope.norms_all) {
        int query_width = heads.num_heads * head_dim, key_width = heads.num_kv_heads * head_dim;
        rms_norm(qkv, rope.q_norm, rope.eps, query_width, qkv, false);
        rms_norm(keys, rope.k_norm, rope.eps, key_width, keys, false);
    }
    for (int h = 0; h < rotating; h++) {
        float* head = qkv + h * head_dim;
        const float* norm = h < heads.num_heads ? rope.q_norm : rope.k_norm;
        if (norm && !rope.norms_all) rms_norm(head, norm, rope.eps, head_dim, head, false);
        if (rope.growth && h < heads.num_heads)
            for (int i = 0; i < head_dim; i += BLOCK)
                store(head + i, load(head + i) * set1(rope.growth[position]));
        if (rope.cos_sin) rotate(head, rope.cos_sin + position * head_dim, head_dim);
    }
    if (slot < 0) return;
    const float* values = keys + heads.num_kv_heads * head_dim;
    if (cache.is_bf16) {
        cache_heads(keys, heads, slot, (uint16_t*)cache.keys);
        cache_heads(values, heads, slot, (uint16_t*)cache.keys + cache.plane);
    } else {
        cache_heads(keys, heads, slot, (float*)cache.keys);
        cache_heads(values, heads, slot, (float*)cache.keys + cache.plane);
    }
}

// Of logits: x * scale, brought within +-softcap if there is one.
static void cap(float* x, int64_t size, float scale, float softcap) {
    auto capped = [&](F values) {
        values = values * set1(scale);
        return softcap > 0 ? tanh(values * set1(1 / softcap)) * set1(softcap) : values;
    };
    int64_t i = 0;
    for (; i + BLOCK <= size; i += BLOCK) store(x + i, capped(load(x + i)));
    float rest[BLOCK] = {0};
    memcpy(rest, x + i, (size_t)(size - i) * 4);
    store(rest, capped(load(rest)));
    memcpy(x + i, rest, (size_t)(size - i) * 4);
}

static int64_t argmax(const float* x, int64_t size) {
    int64_t i = 0;
    F most = set1(-INFINITY);
    for (; i + BLOCK <= size; i += BLOCK) most = max(most, load(x + i));
    float largest = peak(most);
    for (; i < size; i++) largest = x[i] > largest ? x[i] : largest;
    for (i = 0; i < size; i++)
        if (x[i] == largest) return i;
    return 0;
}

static void widen(const uint16_t* bf16, int64_t size, float* out) {
    int64_t i = 0;
    for (; i + BLOCK <= size; i += BLOCK) store(out + i, load_bf16(bf16 + i));
    for (; i < size; i++) {
        uint32_t bits = (uint32_t)bf16[i] << 16;
        memcpy(out + i, &bits, 4);
    }
}

static void narrow(const float* x, int64_t size, uint16_t* bf16) {
    int64_t i = 0;
    for (; i + BLOCK <= size; i += BLOCK) store_bf16(bf16 + i, load(x + i));
    if (i < size) {
        float rest[BLOCK] = {0};
        uint16_t narrowed[BLOCK];
        memcpy(rest, x + i, (size_t)(size - i) * 4);
        store_bf16(narrowed, load(rest));
        memcpy(bf16 + i, narrowed, (size_t)(size - i) * 2);
    }
}

#include "attention.h"
#include "sampling.h"

extern const Kernels KERNELS;
const Kernels KERNELS = {
    NV_NAME, form, prepare, linear, scratch_bytes, row,        rms_norm, gate,   rope,  attend,
    merge,   cap,  argmax,  weigh,  forbid,        find_peaks, compare,  widen,  narrow,
};

}  // namespace NV_NAMESPACE
