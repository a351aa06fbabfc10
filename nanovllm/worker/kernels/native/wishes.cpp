// What rows ask of their logits besides a draw, as sampling/sampler.py means it and in its order: edits,
// a grammar's mask, penalties, and log-probabilities of what the model gave.
//
// Only a mask and log-probabilities look at the whole vocabulary; the others look at the ids they name.
#include <math.h>
#include <string.h>

#include <algorithm>

#include "types.h"

namespace {

constexpr float NEVER = -INFINITY;
constexpr int HEADER = 8;  // words of counts at the beginning of a table

int64_t segments_of(int64_t vocab_size) { return (vocab_size + SEGMENT - 1) / SEGMENT; }

// A table is what edit_tables.pack_edits has made of a request's edits.
void apply(const Kernels& kernels, float* x, int64_t vocab_size, const Wishes& wishes) {
    const int32_t* at = wishes.table;
    int32_t num_allowed = at[0], num_words = at[1], num_early = at[2], min_tokens = at[3];
    int32_t num_biases = at[4], num_word_tokens = at[5];
    int64_t num_outputs = wishes.num_tokens - wishes.num_prompt_tokens;
    const int32_t* end = wishes.tokens + wishes.num_tokens;
    at += HEADER;
    if (num_allowed) kernels.forbid(x, vocab_size, (const uint8_t*)at);
    const int32_t *starts = at + num_allowed, *words = starts + num_words + 1;
    for (int32_t i = 0; i < num_words; i++) {
        const int32_t* word = words + starts[i];
        int64_t before = starts[i + 1] - starts[i] - 1;  // its tokens but the last
        if (before <= num_outputs && std::equal(word, word + before, end - before))
            x[word[before]] = NEVER;
    }
    const int32_t *early = words + num_word_tokens, *biased = early + num_early;
    if (num_outputs < min_tokens)
        for (int32_t i = 0; i < num_early; i++) x[early[i]] = NEVER;
    for (int32_t i = 0; i < num_biases; i++) {
        float bias;
        memcpy(&bias, biased + num_biases + i, 4);
        x[biased[i]] += bias;
    }
}

bool penalizes(const Wishes& wishes) {
    return wishes.repetition != 1 || wishes.presence != 0 || wishes.frequency != 0;
}

// counts: [vocab_size], of any content: only those of tokens that occur are looked at.
void penalize(float* x, int64_t vocab_size, const Wishes& wishes, int32_t* counts) {
    constexpr int32_t DONE = -1;
    auto each = [&](int64_t begin, auto&& function) {
        for (int64_t i = begin; i < wishes.num_tokens; i++)
            if ((uint32_t)wishes.tokens[i] < (uint64_t)vocab_size) function(wishes.tokens[i]);
    };
    each(0, [&](int32_t token) { counts[token] = 0; });
    each(wishes.num_prompt_tokens, [&](int32_t token) { counts[token]++; });
    each(0, [&](int32_t token) {
        int32_t count = counts[token];
        if (count == DONE) return;
        counts[token] = DONE;
        float logit = x[token];
        logit = logit > 0 ? logit / wishes.repetition : logit * wishes.repetition;
        x[token] = logit - (wishes.frequency * (float)count + (count > 0 ? wishes.presence : 0));
    });
}

// Larger values have smaller keys, and of equal ones those with the smaller place. Any bits have one:
// what is no number is sorted too.
uint64_t key_of(float value, int64_t place) {
    value += 0.0f;  // of the zeros, one
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits = bits >> 31 ? bits : ~(bits | 1u << 31);
    return (uint64_t)bits << 32 | (uint64_t)place;
}

// The `count` likeliest tokens, descending: their keys. `count` segments at least have a peak that is
// not below the count-th largest, so no token below that is among them. keys: [vocab_size].
const uint64_t* likeliest(const float* x, int64_t vocab_size, const float* peaks, int64_t count,
                          uint64_t* keys) {
    int64_t num_segments = segments_of(vocab_size), num_found = 0;
    if (count < num_segments) {
        for (int64_t s = 0; s < num_segments; s++) keys[s] = key_of(peaks[s], s);
        std::nth_element(keys, keys + count - 1, keys + num_segments);
        const uint64_t limit = keys[count - 1] >> 32;
        for (int64_t s = 0; s < num_segments; s++) {
            if (key_of(peaks[s], s) >> 32 > limit) continue;
            for (int64_t i = s * SEGMENT; i < std::min(vocab_size, (s + 1) * SEGMENT); i++) {
                keys[num_found] = key_of(x[i], i);
                num_found += keys[num_found] >> 32 <= limit;
            }
        }
    }
    if (num_found < count) {  // many are wanted, or some are no numbers
        for (int64_t i = 0; i < vocab_size; i++) keys[i] = key_of(x[i], i);
        num_found = vocab_size;
    }
    std::nth_element(keys, keys + count - 1, keys + num_found);
    std::sort(keys, keys + count);
    return keys;
}

}  // namespace

// Peaks; then weights and masses of a draw, or keys; then a copy of the logits; then counts.
int64_t wish_floats(int64_t vocab_size) {
    int64_t num_segments = segments_of(vocab_size);
    return num_segments * (3 * SEGMENT + 4);
}

void report(const Kernels& kernels, const float* logits, int64_t vocab_size, int64_t token,
            const Wishes& wishes, float* scratch) {
    int64_t num_segments = segments_of(vocab_size);
    float* peaks = scratch;
    uint64_t* keys = (uint64_t*)(scratch + 2 * num_segments);
    kernels.find_peaks(logits, vocab_size, peaks);
    float largest = *std::max_element(peaks, peaks + num_segments);
    int64_t num_above;
    double total = kernels.compare(logits, vocab_size, largest, logits[token], &num_above);
    double normalizer = (double)largest + log(total);
    auto put = [&](int64_t id, int32_t* to) {
        float logprob = (float)((double)logits[id] - normalizer);
        memcpy(to, &logprob, 4);
    };
    int32_t* to = wishes.report;
    to[0] = (int32_t)token;
    put(token, to + 1);
    to[2] = (int32_t)num_above + 1;
    int64_t count = wishes.num_top < 0 ? vocab_size : std::min(wishes.num_top, vocab_size);
    if (count == 0) return;
    const uint64_t* found = likeliest(logits, vocab_size, peaks, count, keys);
    for (int64_t i = 0; i < count; i++) {
        to[3 + i] = (int32_t)found[i];
        put((uint32_t)found[i], to + 3 + wishes.report_top + i);
    }
}

int64_t choose_token(const Kernels& kernels, float* logits, int64_t vocab_size, const Draw& draw,
                     const Wishes& wishes, float* scratch) {
    int64_t num_segments = segments_of(vocab_size), size = num_segments * SEGMENT;
    float *drawing = scratch + 2 * num_segments, *copy = drawing + size + 2 * num_segments;
    int32_t* counts = (int32_t*)(copy + size);
    bool is_edited = wishes.table || wishes.mask || penalizes(wishes);
    bool needs_raw = wishes.report || (wishes.table && wishes.mask);
    float* x = logits;
    if (is_edited && needs_raw) {
        x = copy;
        memcpy(x, logits, (size_t)vocab_size * 4);
    }
    if (wishes.table) apply(kernels, x, vocab_size, wishes);
    if (wishes.mask) {
        kernels.forbid(x, vocab_size, wishes.mask);
        auto is_left = [](float logit) { return logit != NEVER; };
        if (wishes.table && std::none_of(x, x + vocab_size, is_left)) {  // the grammar wins
            memcpy(x, logits, (size_t)vocab_size * 4);
            kernels.forbid(x, vocab_size, wishes.mask);
        }
    }
    if (penalizes(wishes)) penalize(x, vocab_size, wishes, counts);
    int64_t token = draw_token(kernels, x, vocab_size, draw, drawing);
    if (wishes.report) report(kernels, logits, vocab_size, token, wishes, scratch);
    return token;
}
