// The sampler's one pass over a row's logits: how likely each token is, and each segment of them.
//
// Included by kernels.h, once per instruction set; sampling.cpp does what follows.

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
            F logits = set1(-INFINITY);
            if (i + BLOCK <= size) {
                logits = load(x + i);
            } else if (i < size) {
                float rest[BLOCK];
                for (int lane = 0; lane < BLOCK; lane++)
                    rest[lane] = i + lane < size ? x[i + lane] : -INFINITY;
                logits = load(rest);
            }
            F weight = max(exp((logits - offset) * sharpness) - nothing, zero());
            store(weights + i, weight);
            mass = mass + weight;
        }
        masses[begin / SEGMENT] = sum(mass);
    }
}
