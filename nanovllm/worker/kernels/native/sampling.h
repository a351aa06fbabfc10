// The sampler's passes over a row's logits: how likely each token is, and each segment of them.
//
// Included by kernels.h, once per instruction set; sampling.cpp and wishes.cpp do what follows.

// Lanes i ... i + 15 of `size` numbers; what lies beyond is -infinity.
static inline F load_within(const float* x, int64_t size, int64_t i) {
    if (i + BLOCK <= size) return load(x + i);
    float rest[BLOCK];
    for (int lane = 0; lane < BLOCK; lane++) rest[lane] = i + lane < size ? x[i + lane] : -INFINITY;
    return load(rest);
}

// weights: e^((x - largest) / temperature), 0 for what is far below, padded with 0 to whole segments.
// masses: their sum in each segment.
static void weigh(const float* x, int64_t size, float temperature, float* weights, float* masses) {
    F most = set1(-INFINITY);
    int64_t i = 0;
    for (; i + BLOCK <= size; i += BLOCK) most = max(most, load(x + i));
    float largest = peak(most);
    for (; i < size; i++) largest = x[i] > largest ? x[i] : largest;
    const F sharpness = set1(1.0f / temperature), offset = set1(largest);
    const F nothing = exp(set1(-87.0f));  // what `exp` makes of -infinity
    for (int64_t begin = 0; begin < size; begin += SEGMENT) {
        F mass = zero();
        for (i = begin; i < begin + SEGMENT; i += BLOCK) {
            F weight = exp((load_within(x, size, i) - offset) * sharpness);
            weight = max(weight - nothing, zero());
            store(weights + i, weight);
            mass = mass + weight;
        }
        masses[begin / SEGMENT] = sum(mass);
    }
}

// The largest logit of each segment.
static void find_peaks(const float* x, int64_t size, float* peaks) {
    for (int64_t begin = 0; begin < size; begin += SEGMENT) {
        F most = set1(-INFINITY);
        for (int64_t i = begin; i < begin + SEGMENT && i < size; i += BLOCK)
            most = max(most, load_within(x, size, i));
        peaks[begin / SEGMENT] = peak(most);
    }
}

// The sum of e^(x - largest), and how many are above the chosen one.
static double compare(const float* x, int64_t size, float largest, float chosen, int64_t* num_above) {
    const F offset = set1(largest), limit = set1(chosen);
    double total = 0;
    int64_t above = 0;
    for (int64_t begin = 0; begin < size; begin += SEGMENT) {
        F mass = zero();
        for (int64_t i = begin; i < begin + SEGMENT && i < size; i += BLOCK) {
            F logits = load_within(x, size, i);
            mass = mass + exp(logits - offset);
            above += num_greater(logits, limit);
        }
        total += sum(mass);
    }
    *num_above = above;
    return total;
}

// Forbids the tokens whose bits are 0. bits: of whole blocks.
static void forbid(float* x, int64_t size, const uint8_t* bits) {
    for (int64_t i = 0; i < size; i += BLOCK) {
        int allowed = bits[i / 8] | bits[i / 8 + 1] << 8;
        if (allowed == 0xffff) continue;
        if (i + BLOCK <= size) {
            store(x + i, where(allowed, load(x + i), set1(-INFINITY)));
        } else {
            for (int lane = 0; i + lane < size; lane++)
                if (!(allowed >> lane & 1)) x[i + lane] = -INFINITY;
        }
    }
}
