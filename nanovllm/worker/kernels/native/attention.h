// Paged attention with grouped queries and an online softmax (Milakov & Gimelshein 2018).
//
// Included by kernels.h. A span's queries go in tiles of up to 16 (tokens times the heads that share
// keys), the keys in pieces of 64: what a piece leaves (peak, total, sum) is carried to the next.

constexpr int PIECE = 64;

// Where the keys of one piece lie: those from `first` on, up to `end`. The last is repeated behind them.
template <typename Value> struct Keys {
    int count;
    const Value* at[PIECE];

    Keys(const Span& span, const Heads& heads, const Cache& cache, int first, int end)
        : count(end - first < PIECE ? end - first : PIECE) {
        int64_t width = (int64_t)heads.num_kv_heads * heads.head_dim;
        const Value* base = (const Value*)cache.keys + (int64_t)span.kv_head * heads.head_dim;
        int size = cache.block_size, index = first / size, slot = first % size;
        for (int i = 0; i < count; index++, slot = 0) {
            const Value* block = base + (int64_t)span.block_table[index] * size * width;
            for (; slot < size && i < count; slot++, i++) at[i] = block + slot * width;
        }
        for (int i = count; count > 0 && i < PIECE; i++) at[i] = at[count - 1];
    }

    // Has those from `begin` up to `end` brought near, `plane` further on: a processor does not see
    // by itself what comes next, since a head has but its share of each token's keys.
    void fetch(int begin, int end, int64_t plane, int head_dim) const {
        for (int i = begin; i < end && i < count; i++)
            for (int j = 0; j < head_dim; j += 64 / (int)sizeof(Value))
                __builtin_prefetch(at[i] + plane + j, 0, 2);
    }
};

// The first key that is looked at for a query at `position`, or for later ones.
static inline int first_key_for(const Span& span, const Heads& heads, int position) {
    int first = heads.window ? position - heads.window + 1 : 0;
    return first > span.first_key ? first : span.first_key;
}

// Cuts a span into tiles of at most `most` queries: function(token, num_tokens, head, num_heads).
template <typename Function>
static inline void for_tiles(const Span& span, const Heads& heads, int most, const Function& function) {
    int group = heads.num_heads / heads.num_kv_heads;
    int heads_each = group < most ? group : most, tokens_each = most / heads_each;
    for (int token = 0; token < span.num_tokens; token += tokens_each) {
        int num_tokens = span.num_tokens - token < tokens_each ? span.num_tokens - token : tokens_each;
        for (int h = 0; h < group; h += heads_each)
            function(token, num_tokens, span.kv_head * group + h,
                     group - h < heads_each ? group - h : heads_each);
    }
}

// scores: [rows, PIECE], of 16 keys from `first` on. wide: room for 16 keys as float32.
template <typename Value>
static inline void score(const float* queries, int num_rows, int head_dim, const Value* const* keys,
                         float* wide, float* scores) {
    for (int c = 0; c < head_dim / BLOCK; c++)
        for (int key = 0; key < 16; key++)
            store(wide + (c * 16 + key) * BLOCK, load_value(keys[key] + c * BLOCK));
    for (int r = 0; r < num_rows; r++) {
        F sums[16];
        for (int key = 0; key < 16; key++) sums[key] = zero();
        for (int c = 0; c < head_dim / BLOCK; c++) {
            F q = load(queries + r * head_dim + c * BLOCK);
            for (int key = 0; key < 16; key++)
                sums[key] = fma(q, load(wide + (c * 16 + key) * BLOCK), sums[key]);
        }
        store(scores + r * PIECE, sums_of_16(sums));
    }
}

// sum[r] += the values, weighed: `N` rows, `C` vectors of the head from `from` on.
template <int N, int C, typename Value>
static inline void weigh(const float* weights, const Value* const* values, int count, int from,
                         int head_dim, float* sum) {
    F acc[N][C];
    for (int r = 0; r < N; r++)
        for (int c = 0; c < C; c++) acc[r][c] = load(sum + r * head_dim + from + c * BLOCK);
    for (int key = 0; key < count; key++) {
        F v[C];
        for (int c = 0; c < C; c++) v[c] = load_value(values[key] + from + c * BLOCK);
        for (int r = 0; r < N; r++) {
            F w = set1(weights[r * PIECE + key]);
            for (int c = 0; c < C; c++) acc[r][c] = fma(w, v[c], acc[r][c]);
        }
    }
    for (int r = 0; r < N; r++)
        for (int c = 0; c < C; c++) store(sum + r * head_dim + from + c * BLOCK, acc[r][c]);
}

template <int N, typename Value>
static inline void weigh_heads(const float* weights, const Value* const* values, int count,
                               int head_dim, float* sum) {
    int from = 0;
    for (; from + 4 * BLOCK <= head_dim; from += 4 * BLOCK)
        weigh<N, 4>(weights, values, count, from, head_dim, sum);
    for (; from < head_dim; from += BLOCK)
        weigh<N, 1>(weights, values, count, from, head_dim, sum);
}

struct Carried {  // of one query head
    float peak, total;
};

// One row of scores becomes weights; returns by how much what was carried must shrink.
static inline float soften(float* scores, int first_seen, int end_seen, float softcap, Carried& row) {
    if (softcap > 0)
        for (int i = 0; i < PIECE; i += BLOCK)
            store(scores + i, tanh(load(scores + i) * set1(1 / softcap)) * set1(softcap));
    for (int i = 0; i < first_seen && i < PIECE; i++) scores[i] = -INFINITY;
    for (int i = end_seen < 0 ? 0 : end_seen; i < PIECE; i++) scores[i] = -INFINITY;
    F most = load(scores);
    for (int i = BLOCK; i < PIECE; i += BLOCK) most = max(most, load(scores + i));
    float before = row.peak, now = peak(most);
    if (now < before) now = before;
    if (now == -INFINITY) {  // nothing is seen yet
        memset(scores, 0, PIECE * sizeof(float));
        return 1.0f;
    }
    F total = zero();
    for (int i = 0; i < PIECE; i += BLOCK) {
        F weight = exp(load(scores + i) - set1(now));
        store(scores + i, weight);
    }
    for (int i = 0; i < first_seen && i < PIECE; i++) scores[i] = 0;
    for (int i = end_seen < 0 ? 0 : end_seen; i < PIECE; i++) scores[i] = 0;
    for (int i = 0; i < PIECE; i += BLOCK) total = total + load(scores + i);
    float shrink = before == -INFINITY ? 0.0f : before == now ? 1.0f : expf(before - now);
    row.peak = now;
    row.total = row.total * shrink + sum(total);
    return shrink;
}

template <typename Value>
static void attend_tile(const Span& span, const Heads& heads, const Cache& cache, int token,
                        int num_tokens, int first_head, int num_heads, uint8_t* scratch) {
    int head_dim = heads.head_dim, num_rows = num_tokens * num_heads;
    float* queries = (float*)scratch;
    float* sums = queries + MAX_GROUP * head_dim;
    float* wide = sums + MAX_GROUP * head_dim;
    float* scores = wide + 16 * head_dim;
    Carried carried[MAX_GROUP];
    bool has_sink = heads.sinks && span.has_sink;
    for (int r = 0; r < num_rows; r++) {
        int head = first_head + r % num_heads;
        const float* q = span.queries + (token + r / num_heads) * span.query_stride + head * head_dim;
        for (int i = 0; i < head_dim; i += BLOCK) {
            store(queries + r * head_dim + i, load(q + i) * set1(heads.scale));
            store(sums + r * head_dim + i, zero());
        }
        carried[r] = {-INFINITY, 0.0f};
        if (has_sink) carried[r] = {heads.sinks[head], 1.0f};
    }
    int first_position = span.first_position + token;
    int first = first_key_for(span, heads, first_position), end = first_position + num_tokens;
    if (span.end_key < end) end = span.end_key;
    Keys<Value> keys(span, heads, cache, first, end);
    keys.fetch(0, PIECE, 0, head_dim);
    for (int from = first; from < end; from += PIECE) {
        int count = keys.count;
        for (int i = 0; i < count; i += 16) {
            keys.fetch(i, i + 16, cache.plane, head_dim);  // the values
            score(queries, num_rows, head_dim, keys.at + i, wide, scores + i);
        }
        for (int r = 0; r < num_rows; r++) {
            int position = first_position + r / num_heads;
            int first_seen = heads.window ? position - heads.window + 1 - from : 0;
            int end_seen = position + 1 - from < count ? position + 1 - from : count;
            float shrink = soften(scores + r * PIECE, first_seen, end_seen, heads.softcap, carried[r]);
            if (shrink != 1.0f)
                for (int i = 0; i < head_dim; i += BLOCK) {
                    float* at = sums + r * head_dim + i;
                    store(at, load(at) * set1(shrink));
                }
        }
        Keys<Value> next(span, heads, cache, from + PIECE, end);
        next.fetch(0, PIECE, 0, head_dim);
        for (int i = 0; i < count; i++) keys.at[i] += cache.plane;  // now the values
        int r = 0;
        for (; r + 4 <= num_rows; r += 4)
            weigh_heads<4>(scores + r * PIECE, keys.at, count, head_dim, sums + r * head_dim);
        float *rest = scores + r * PIECE, *to = sums + r * head_dim;
        if (num_rows - r == 3) weigh_heads<3>(rest, keys.at, count, head_dim, to);
        if (num_rows - r == 2) weigh_heads<2>(rest, keys.at, count, head_dim, to);
        if (num_rows - r == 1) weigh_heads<1>(rest, keys.at, count, head_dim, to);
        keys = next;
    }
    for (int r = 0; r < num_rows; r++) {
        int head = first_head + r % num_heads;
        if (span.partial) {
            int group = heads.num_heads / heads.num_kv_heads;
            float* to = span.partial + (head - span.kv_head * group) * (BLOCK + head_dim);
            to[0] = carried[r].peak, to[1] = carried[r].total;
            memcpy(to + BLOCK, sums + r * head_dim, (size_t)head_dim * 4);
            continue;
        }
        float* to = span.out + (token + r / num_heads) * span.out_stride + head * head_dim;
        F scale = set1(carried[r].total > 0 ? 1 / carried[r].total : 0.0f);
        for (int i = 0; i < head_dim; i += BLOCK)
            store(to + i, load(sums + r * head_dim + i) * scale);
    }
}

#if defined(NV_ISA_AMX)
#include "amx_attention.h"
#endif

static void attend(const Span& span, const Heads& heads, const Cache& cache, uint8_t* scratch) {
#if defined(NV_ISA_AMX)
    if (attends_by_tiles(span, heads, cache)) return attend_by_tiles(span, heads, cache, scratch);
#endif
    for_tiles(span, heads, MAX_GROUP, [&](int token, int num_tokens, int head, int num_heads) {
        if (cache.is_bf16)
            attend_tile<uint16_t>(span, heads, cache, token, num_tokens, head, num_heads, scratch);
        else
            attend_tile<float>(span, heads, cache, token, num_tokens, head, num_heads, scratch);
    });
}

// One query head from what spans with different keys left of it, `stride` apart.
static void merge(const float* partials, int num_partials, int64_t stride, int head_dim, float* out) {
    float most = -INFINITY, total = 0;
    for (int i = 0; i < num_partials; i++)
        if (partials[i * stride] > most) most = partials[i * stride];
    for (int i = 0; i < head_dim; i++) out[i] = 0;
    if (most == -INFINITY) return;
    for (int i = 0; i < num_partials; i++) {
        const float* partial = partials + i * stride;
        float share = partial[0] == -INFINITY ? 0.0f : expf(partial[0] - most);
        total += share * partial[1];
        for (int j = 0; j < head_dim; j += BLOCK)
            store(out + j, fma(load(partial + BLOCK + j), set1(share), load(out + j)));
    }
    for (int j = 0; j < head_dim; j += BLOCK) store(out + j, load(out + j) * set1(1 / total));
}
