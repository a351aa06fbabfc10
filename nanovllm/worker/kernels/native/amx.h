// Products by AMX: tiles of 16 rows of 64 bytes, multiplied as bfloat16 pairs. Included by kernels.h.
//
// For many tokens a weight is dequantized to bfloat16 once per chunk and multiplied at the full rate;
// for few of them unpacking would cost more than it saves, and products of bytes are taken instead.

constexpr int TOKENS_FOR_TILES = 32;

static Form form(int type, int num_tokens) {
    return type == BF16 || num_tokens >= TOKENS_FOR_TILES ? HALVES : BYTES;
}

static int64_t scratch_bytes(int type, int columns, int num_tokens) {
    int64_t sums = 2 * 16 * 2 * 16 * 4;
    bool unpacks = type != BF16 && num_tokens >= TOKENS_FOR_TILES;
    return sums + (unpacks ? 2 * (int64_t)columns / TILE * 1024 : 0);
}

struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {0};
    uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static inline __m512i bf16_pairs(F first, F second) {
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, both);
}

template <int type> static void unpack(const uint8_t* block, int tiles, uint8_t* to) {
    for (int tile = 0; tile < tiles; tile++) {
        Tile<type> w(block, tile);
        for (int j = 0; j < 8; j++) {
            int part = Tile<type>::parts == 2 ? j / 4 : 0;
            F value[4];
            for (int i = 0; i < 4; i++) value[i] = fma(code(w.codes[j], i), w.d[part], w.m[part]);
            _mm512_store_si512(to + tile * 1024 + j * 128, bf16_pairs(value[0], value[1]));
            _mm512_store_si512(to + tile * 1024 + j * 128 + 64, bf16_pairs(value[2], value[3]));
        }
    }
}

// Two blocks of outputs (or one twice) with 32 tokens. out: [32, 32], `stride` bytes a token.
static inline void multiply_tiles(const uint8_t* left, const uint8_t* right, const uint16_t* tokens,
                                  int64_t width, bool second_half, float* out, int64_t stride,
                                  bool add) {
    float* second = (float*)((uint8_t*)out + 16 * stride);
    if (add) {
        _tile_loadd(0, out, stride);
        _tile_loadd(1, out + 16, stride);
        _tile_loadd(2, second, stride);
        _tile_loadd(3, second + 16, stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t tile = 0; tile < width / TILE; tile++) {
        _tile_loadd(4, tokens + tile * TILE, width * 2);
        _tile_loadd(6, left + tile * 1024, 64);
        _tile_loadd(7, right + tile * 1024, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (second_half) {
            _tile_loadd(5, tokens + 16 * width + tile * TILE, width * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, stride);
    _tile_stored(1, out + 16, stride);
    _tile_stored(2, second, stride);
    _tile_stored(3, second + 16, stride);
}

static void linear(const Matrix& w, const Tokens& x, int num_tokens, int first_block, int end_block,
                   float* out, int64_t stride, const float* bias, bool add, uint8_t* scratch) {
    if (num_tokens < (w.type == BF16 ? 8 : TOKENS_FOR_TILES)) {
        linear_by_vectors(w, x, num_tokens, first_block, end_block, out, stride, bias, add);
        return;
    }
    TileConfig config;
    _tile_loadconfig(&config);
    int tiles = w.columns / TILE;
    float* sums = (float*)scratch;
    uint8_t* unpacked = scratch + 32 * 32 * 4;
    for (int block = first_block; block < end_block; block += 2) {
        const uint8_t* data[2] = {nullptr, nullptr};
        with_type(w.type, [&](auto t) {
            for (int i = 0; i < 2; i++) {
                if (block + i >= end_block) {
                    data[1] = data[0];
                    continue;
                }
                data[i] = w.data + (block + i) * block_bytes<t.value>(w.columns);
                if constexpr (t.value != BF16) {
                    unpack<t.value>(data[i], tiles, unpacked + i * tiles * 1024);
                    data[i] = unpacked + i * tiles * 1024;
                }
            }
        });
        for (int token = 0; token < num_tokens; token += 32) {
            int count = num_tokens - token < 32 ? num_tokens - token : 32;
            const uint16_t* tokens = x.halves + token * x.width;
            if (count == 32 && !bias && block + 1 < end_block && (block + 2) * BLOCK <= w.rows) {
                multiply_tiles(data[0], data[1], tokens, x.width, true,
                               out + token * stride + block * BLOCK, stride * 4, add);
                continue;
            }
            multiply_tiles(data[0], data[1], tokens, x.width, count > 16, sums, 128, false);
            for (int t = 0; t < count; t++)
                for (int i = 0; i < 2 && block + i < end_block; i++) {
                    int column = (block + i) * BLOCK;
                    put(load(sums + t * 32 + i * 16), out + (token + t) * stride + column,
                        bias ? bias + column : nullptr, w.rows - column, add);
                }
        }
    }
    _tile_release();
}
