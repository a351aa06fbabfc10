// From a row's logits to its token, as sampling/distribution.py means it: truncation, and two races.
//
// Only what is nearly equal may be decided otherwise: sums are rounded in another order.
#include <math.h>
#include <string.h>

#include "types.h"

namespace {

constexpr uint32_t MULTIPLIERS[] = {0xD2511F53, 0xCD9E8D57}, WEYL[] = {0x9E3779B9, 0xBB67AE85};

// Number `index` of those that belong to (seed, position), as an exponential time: philox.py's.
float time_of(uint64_t seed, uint64_t position, int64_t index) {
    uint32_t key[] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t c[] = {(uint32_t)position, (uint32_t)(position >> 32), (uint32_t)(index / 2), 0};
    for (int round = 0; round < 10; round++) {
        uint64_t first = (uint64_t)c[0] * MULTIPLIERS[0], second = (uint64_t)c[2] * MULTIPLIERS[1];
        c[0] = (uint32_t)(second >> 32) ^ c[1] ^ key[0];
        c[2] = (uint32_t)(first >> 32) ^ c[3] ^ key[1];
        c[1] = (uint32_t)second;
        c[3] = (uint32_t)first;
        for (int i = 0; i < 2; i++) key[i] += WEYL[i];
    }
    const uint32_t* words = c + 2 * (index % 2);
    uint64_t bits = (uint64_t)words[0] << 20 | words[1] >> 12;
    return (float)-log(((double)bits + 0.5) * 0x1p-52);
}

// Whoever of them comes first; the first if nobody has any mass.
int64_t winner(const float* masses, int64_t count, uint64_t seed, uint64_t position, int64_t number) {
    int64_t best = 0;
    float speed = 0;
    for (int64_t i = 0; i < count; i++) {
        if (masses[i] <= 0) continue;
        float mine = masses[i] / time_of(seed, position, number + i);
        if (mine > speed) best = i, speed = mine;
    }
    return best;
}

// The largest value such that those not below it are `needed` together: in mass, or in number.
// 0 if all of them are less. Values are not negative, so their bits are in their order; three looks
// at eleven, ten and ten of them find the value.
float floor_of(const float* values, int64_t size, double needed, bool by_mass) {
    double above = 0;
    uint32_t prefix = 0;
    for (int shift = 20; shift >= 0; shift -= 10) {
        double totals[2048] = {0};
        for (int64_t i = 0; i < size; i++) {
            uint32_t bits;
            memcpy(&bits, values + i, 4);
            if (bits == 0 || (shift < 20 && bits >> (shift + 10) != prefix)) continue;
            uint32_t bucket = shift < 20 ? bits >> shift & 1023 : bits >> shift & 2047;
            totals[bucket] += by_mass ? (double)values[i] : 1.0;
        }
        int bucket = -1;
        bool reached = false;
        for (int i = 2047; i >= 0 && !reached; i--) {
            if (totals[i] == 0) continue;
            bucket = i;
            reached = above + totals[i] >= needed;
            if (!reached) above += totals[i];
        }
        // Later looks may miss it by a rounding: they take the smallest value.
        if (bucket < 0 || (shift == 20 && !reached)) return 0;
        prefix = prefix << (shift < 20 ? 10 : 0) | (uint32_t)bucket;
    }
    float found;
    memcpy(&found, &prefix, 4);
    return found;
}

double total(const float* masses, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += masses[i];
    return sum;
}

// Drops the weights below a floor.
void keep_from(float floor, float* weights, float* masses, int64_t num_segments) {
    for (int64_t s = 0; s < num_segments; s++) {
        float* segment = weights + s * SEGMENT;
        float mass = 0;
        for (int i = 0; i < SEGMENT; i++) {
            segment[i] = segment[i] >= floor ? segment[i] : 0.0f;
            mass += segment[i];
        }
        masses[s] = mass;
    }
}

}  // namespace

int64_t draw_floats(int64_t vocab_size) {
    int64_t num_segments = (vocab_size + SEGMENT - 1) / SEGMENT;
    return num_segments * (SEGMENT + 1);
}

int64_t draw_token(const Kernels& kernels, const float* logits, int64_t vocab_size, const Draw& draw,
                   float* scratch) {
    if (draw.temperature <= 0) return kernels.argmax(logits, vocab_size);
    int64_t num_segments = (vocab_size + SEGMENT - 1) / SEGMENT, size = num_segments * SEGMENT;
    float *weights = scratch, *masses = scratch + size;
    kernels.weigh(logits, vocab_size, draw.temperature, weights, masses);
    if (draw.min_p > 0) keep_from(draw.min_p, weights, masses, num_segments);  // the largest is 1
    if (draw.top_k > 0)
        keep_from(floor_of(weights, size, draw.top_k, false), weights, masses, num_segments);
    if (draw.top_p < 1) {
        double needed = (double)draw.top_p * total(masses, num_segments);
        keep_from(floor_of(weights, size, needed, true), weights, masses, num_segments);
    }
    int64_t segment = winner(masses, num_segments, draw.seed, draw.position, SEGMENT);
    return segment * SEGMENT +
           winner(weights + segment * SEGMENT, SEGMENT, draw.seed, draw.position, 0);
}
