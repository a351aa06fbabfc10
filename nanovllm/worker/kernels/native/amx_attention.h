// Paged attention of many queries by AMX. Included by attention.h; what it means is written there.
//
// A lane is a query: scores are computed as keys times queries, so that peaks and sums of a query's
// scores need no operation across lanes, and weights lie as the product with the values takes them.
// Queries, keys, weights and values are multiplied in bfloat16, and summed in float32.

constexpr int TILES_OF_QUERIES = 6;  // that share what is laid out of keys and values
constexpr int WIDEST_HEAD = 256;     // for ATTENTION_SCRATCH
constexpr float LOG2_E = 1.44269504f;

// 16 x 16 of 32 bits.
static inline void transpose(__m512i* rows) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i a = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88);
        __m512i b = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
        __m512i d = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) rows[i] = t[i];
}

// 2^x to 5e-6 of it, for x <= 0.
static inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(9.6181291e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// Some heads of some tokens of a span: query r is head r % num_heads of token r / num_heads.
struct TiledQueries {
    const Span& span;
    const Heads& heads;
    int token, num_tokens, first_head, num_heads;
    int num_queries, num_tiles, lanes;  // lanes: of all tiles
    int num_chunks;                     // of 32 numbers of a head, the last padded with 0

    uint8_t* queries;  // tiles of pairs of numbers: [num_tiles, num_chunks]
    uint16_t* keys;    // [PIECE, 32 * num_chunks]
    uint8_t* values;   // tiles of 16 numbers of the head by 32 keys: [head_dim / 16, 2]
    uint8_t* weights;  // tiles of pairs of keys: [num_tiles, 2]
    float* scores;     // [PIECE, lanes]
    float* sums;       // [head_dim, lanes]
    __m512 peaks[TILES_OF_QUERIES], totals[TILES_OF_QUERIES];  // peaks: of scores * log2(e)
    __m512i positions[TILES_OF_QUERIES];

    TiledQueries(const Span& span, const Heads& heads, int token, int num_tokens, int first_head,
                 int num_heads, uint8_t* scratch)
        : span(span), heads(heads), token(token), num_tokens(num_tokens), first_head(first_head),
          num_heads(num_heads), num_queries(num_tokens * num_heads) {
        num_tiles = (num_queries + 15) / 16, lanes = 16 * num_tiles;
        num_chunks = (heads.head_dim + 31) / 32;
        queries = scratch;
        keys = (uint16_t*)(queries + num_tiles * num_chunks * 1024);
        values = (uint8_t*)(keys + PIECE * 32 * num_chunks);
        weights = values + heads.head_dim / 16 * 2 * 1024;
        scores = (float*)(weights + num_tiles * 2 * 1024);
        sums = scores + PIECE * lanes;
        for (int i = 0; i < num_tiles; i++) begin(i);
        memset(sums, 0, (size_t)heads.head_dim * lanes * 4);
    }

    void begin(int tile) {
        int head_dim = heads.head_dim;
        F scale = set1(heads.softcap > 0 ? heads.scale : heads.scale * LOG2_E);
        float peak[16], total[16];
        int32_t position[16];
        __m512i rows[WIDEST_HEAD / 32][16];
        for (int i = 0; i < 16; i++) {
            int r = 16 * tile + i, t = r < num_queries ? r / num_heads : num_tokens - 1;
            int head = first_head + r % num_heads;
            bool has_sink = heads.sinks && r < num_queries;
            position[i] = span.first_position + token + t;
            peak[i] = has_sink ? heads.sinks[head] * LOG2_E : -INFINITY;
            total[i] = has_sink ? 1.0f : 0.0f;
            const float* q = span.queries + (token + t) * span.query_stride + (int64_t)head * head_dim;
            for (int c = 0; c < num_chunks; c++) {
                F first = zero(), second = zero();
                if (r < num_queries) {
                    first = load(q + 32 * c) * scale;
                    if (32 * c + 16 < head_dim) second = load(q + 32 * c + 16) * scale;
                }
                rows[c][i] = (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
            }
        }
        for (int c = 0; c < num_chunks; c++) {
            transpose(rows[c]);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(queries + (tile * num_chunks + c) * 1024 + i * 64, rows[c][i]);
        }
        peaks[tile] = _mm512_loadu_ps(peak);
        totals[tile] = _mm512_loadu_ps(total);
        positions[tile] = _mm512_loadu_si512(position);
    }

    // 32 numbers of a key or value, of which the head may have but 16.
    __m512i numbers(const uint16_t* from, int chunk) const {
        __mmask32 has = 32 * chunk + 16 < heads.head_dim ? 0xffffffff : 0xffff;
        return _mm512_maskz_loadu_epi16(has, from + 32 * chunk);
    }

    void lay_out_keys(const uint16_t* const* at, int count) {
        for (int key = 0; key < count; key++)
            for (int c = 0; c < num_chunks; c++)
                _mm512_store_si512(keys + (key * num_chunks + c) * 32, numbers(at[key], c));
    }

    void lay_out_values(const uint16_t* const* at, int count) {
        __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32,
                                        30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
        for (int half = 0; half < count / 32; half++)
            for (int c = 0; c < num_chunks; c++) {
                __m512i first[16], second[16];  // of 16 keys each, pairs of numbers
                for (int key = 0; key < 16; key++) {
                    first[key] = numbers(at[32 * half + key], c);
                    second[key] = numbers(at[32 * half + 16 + key], c);
                }
                transpose(first);
                transpose(second);
                for (int pair = 0; pair < 16 && 32 * c + 2 * pair < heads.head_dim; pair++) {
                    int tile = 2 * c + pair / 8, row = 2 * pair % 16;
                    uint8_t* to = values + (2 * tile + half) * 1024 + row * 64;
                    _mm512_store_si512(to, _mm512_permutex2var_epi16(first[pair], even, second[pair]));
                    _mm512_store_si512(to + 64,
                                       _mm512_permutex2var_epi16(first[pair], odd, second[pair]));
                }
            }
    }

    // count: a multiple of 32.
    void score(int count) {
        int64_t width = 64 * num_chunks, stride = lanes * 4;  // bytes
        for (int key = 0; key < count; key += 32)
            for (int tile = 0; tile < num_tiles; tile += 2) {
                bool two = tile + 1 < num_tiles;
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int c = 0; c < num_chunks; c++) {
                    const uint16_t* from = keys + (key * num_chunks + c) * 32;
                    const uint8_t* q = queries + (tile * num_chunks + c) * 1024;
                    _tile_loadd(4, from, width);
                    _tile_loadd(5, from + 16 * num_chunks * 32, width);
                    _tile_loadd(6, q, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 5, 6);
                    if (!two) continue;
                    _tile_loadd(7, q + num_chunks * 1024, 64);
                    _tile_dpbf16ps(2, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
                float *to = scores + key * lanes + tile * 16, *second = to + 16 * lanes;
                _tile_stored(0, to, stride);
                _tile_stored(1, second, stride);
                if (!two) continue;
                _tile_stored(2, to + 16, stride);
                _tile_stored(3, second + 16, stride);
            }
    }

    // Which queries of a tile see a key.
    __mmask16 seen(int tile, int key) const {
        __m512i at = _mm512_set1_epi32(key);
        __mmask16 found = _mm512_cmple_epi32_mask(at, positions[tile]);
        if (heads.window) {
            __m512i last = _mm512_add_epi32(at, _mm512_set1_epi32(heads.window - 1));
            found &= _mm512_cmple_epi32_mask(positions[tile], last);
        }
        return found;
    }

    bool all_seen(int tile, int first, int count) const {
        return seen(tile, first) == 0xffff && seen(tile, first + count - 1) == 0xffff;
    }

    // A tile's scores of keys from `first` on become weights, and what was summed shrinks to match.
    template <bool all> void soften(int tile, int first, int count) {
        float* column = scores + tile * 16;
        __m512 most = peaks[tile];
        for (int key = 0; key < count; key++) {
            __m512 x = _mm512_loadu_ps(column + key * lanes);
            if (heads.softcap > 0)
                x = (tanh(F{x} * set1(1 / heads.softcap)) * set1(heads.softcap * LOG2_E)).v;
            if (!all) x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen(tile, first + key), x);
            if (!all || heads.softcap > 0) _mm512_storeu_ps(column + key * lanes, x);
            most = _mm512_max_ps(most, x);
        }
        __m512 before = peaks[tile], nothing = _mm512_set1_ps(-INFINITY);
        peaks[tile] = most;
        // Who has seen nothing yet: nothing is weighed, since all of its scores are -infinity.
        __m512 base = _mm512_mask_mov_ps(most, _mm512_cmpeq_ps_mask(most, nothing), _mm512_setzero_ps());
        __m512 total = _mm512_setzero_ps();
        for (int key = 0; key < count; key += 2) {
            __m512 w[2];
            for (int i = 0; i < 2; i++) {
                __m512 x = _mm512_loadu_ps(column + (key + i) * lanes);
                w[i] = exp2_of(_mm512_sub_ps(x, base));
                if (!all) w[i] = _mm512_maskz_mov_ps(seen(tile, first + key + i), w[i]);
                total = _mm512_add_ps(total, w[i]);
            }
            uint8_t* to = weights + (2 * tile + key / 32) * 1024 + key % 32 * 32;
            _mm512_store_si512(to, bf16_pairs({w[0]}, {w[1]}));
        }
        __mmask16 grown = _mm512_cmplt_ps_mask(before, most);
        if (grown) {
            __m512 shrink = exp2_of(_mm512_sub_ps(before, base));
            shrink = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), grown, shrink);
            totals[tile] = _mm512_mul_ps(totals[tile], shrink);
            for (int i = 0; i < heads.head_dim; i++) {
                float* at = sums + i * lanes + tile * 16;
                _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), shrink));
            }
        }
        totals[tile] = _mm512_add_ps(totals[tile], total);
    }

    void weigh(int count) {
        int64_t stride = lanes * 4;
        int rows = heads.head_dim / 16;
        for (int row = 0; row < rows; row += 2)
            for (int tile = 0; tile < num_tiles; tile += 2) {
                bool two = tile + 1 < num_tiles, both = row + 1 < rows;
                float *to = sums + row * 16 * lanes + tile * 16, *second = to + 16 * lanes;
                _tile_loadd(0, to, stride);
                if (two) _tile_loadd(1, to + 16, stride);
                if (both) _tile_loadd(2, second, stride);
                if (two && both) _tile_loadd(3, second + 16, stride);
                for (int half = 0; half < count / 32; half++) {
                    _tile_loadd(4, values + (2 * row + half) * 1024, 64);
                    _tile_loadd(6, weights + (2 * tile + half) * 1024, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    if (two) {
                        _tile_loadd(7, weights + (2 * tile + 2 + half) * 1024, 64);
                        _tile_dpbf16ps(1, 4, 7);
                    }
                    if (!both) continue;
                    _tile_loadd(5, values + (2 * row + 2 + half) * 1024, 64);
                    _tile_dpbf16ps(2, 5, 6);
                    if (two) _tile_dpbf16ps(3, 5, 7);
                }
                _tile_stored(0, to, stride);
                if (two) _tile_stored(1, to + 16, stride);
                if (both) _tile_stored(2, second, stride);
                if (two && both) _tile_stored(3, second + 16, stride);
            }
    }

    void end(int tile) {
        __m512 scale = _mm512_maskz_div_ps(_mm512_cmplt_ps_mask(_mm512_setzero_ps(), totals[tile]),
                                           _mm512_set1_ps(1.0f), totals[tile]);
        for (int i = 0; i < heads.head_dim; i += 16) {
            __m512i rows[16];
            for (int j = 0; j < 16; j++) {
                __m512 sum = _mm512_loadu_ps(sums + (i + j) * lanes + tile * 16);
                rows[j] = _mm512_castps_si512(_mm512_mul_ps(sum, scale));
            }
            transpose(rows);
            for (int j = 0; j < 16 && 16 * tile + j < num_queries; j++) {
                int r = 16 * tile + j, head = first_head + r % num_heads;
                float* out = span.out + (token + r / num_heads) * span.out_stride;
                _mm512_storeu_si512(out + (int64_t)head * heads.head_dim + i, rows[j]);
            }
        }
    }

    void attend(const Cache& cache) {
        int first_position = span.first_position + token, end_key = first_position + num_tokens;
        for (int from = first_key_for(span, heads, first_position); from < end_key; from += PIECE) {
            Keys<uint16_t> at(span, heads, cache, from, end_key);
            int count = (at.count + 31) / 32 * 32;  // nobody sees those behind the last
            lay_out_keys(at.at, count);
            score(count);
            for (int tile = 0; tile < num_tiles; tile++)
                all_seen(tile, from, count) ? soften<true>(tile, from, count)
                                            : soften<false>(tile, from, count);
            for (int i = 0; i < count; i++) at.at[i] += cache.plane;
            lay_out_values(at.at, count);
            weigh(count);
        }
        for (int tile = 0; tile < num_tiles; tile++) end(tile);
    }
};

// Whether so many queries are worth laying out keys and values for.
static bool attends_by_tiles(const Span& span, const Heads& heads, const Cache& cache) {
    int num_queries = span.num_tokens * (heads.num_heads / heads.num_kv_heads);
    return cache.is_bf16 && !span.partial && num_queries >= 16 && heads.head_dim <= WIDEST_HEAD;
}

static void attend_by_tiles(const Span& span, const Heads& heads, const Cache& cache,
                            uint8_t* scratch) {
    TileConfig config;
    _tile_loadconfig(&config);
    for_tiles(span, heads, 16 * TILES_OF_QUERIES, [&](int token, int num_tokens, int head, int num_heads) {
        TiledQueries(span, heads, token, num_tokens, head, num_heads, scratch).attend(cache);
    });
    _tile_release();
}
