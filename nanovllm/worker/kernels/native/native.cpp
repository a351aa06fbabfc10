// The C ABI that library.py calls: kernels one by one, and whole steps of a decoder.
//
// Everything here runs in the calling thread and the pool's; callers take turns (a lock sees to it).
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "pool.h"
#include "types.h"

#define NV_DECLARE(isa) \
    namespace nv_##isa { extern const Kernels KERNELS; }
NV_DECLARE(generic)
#if defined(__x86_64__)
NV_DECLARE(avx2)
NV_DECLARE(avx512)
NV_DECLARE(avx512_bf16)
NV_DECLARE(amx)
#endif

namespace {

// ---- which instruction set

#if defined(__x86_64__)
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}
bool has_amx() {
    uint32_t a, b, c, d = 0;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    return (d >> 22 & 1) && (d >> 24 & 1) && may_use_tiles();  // amx-bf16, amx-tile
}
#endif

// Those this CPU can run, best last.
std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> found{&nv_generic::KERNELS};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return found;
    found.push_back(&nv_avx2::KERNELS);
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return found;
    found.push_back(&nv_avx512::KERNELS);
    if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bf16")) return found;
    found.push_back(&nv_avx512_bf16::KERNELS);
    if (has_amx()) found.push_back(&nv_amx::KERNELS);
#endif
    return found;
}

// ---- memory

struct Free {
    void operator()(void* p) const { free(p); }
};
template <typename T> class Room {  // aligned to a cache line; grows, never shrinks
  public:
    T* of(int64_t size) {
        if (size > size_) {
            at_.reset((T*)aligned_alloc(64, (size_t)(size * (int64_t)sizeof(T) + 127) / 64 * 64));
            size_ = size;
        }
        return at_.get();
    }

  private:
    std::unique_ptr<T, Free> at_;
    int64_t size_ = 0;
};

struct TokensRoom {
    Room<int8_t> bytes;
    Room<float> scales, sums, half_sums;
    Room<uint16_t> halves;

    // forms: a set of them.
    Tokens of(int forms, int64_t count, int64_t width) {
        Tokens tokens{};
        tokens.width = width;
        int64_t size = (count + 31) / 32 * 32 * width;  // tiles read whole ones
        if (forms & HALVES) tokens.halves = halves.of(size);
        if (forms & BYTES) {
            tokens.bytes = bytes.of(size);
            tokens.scales = scales.of(size / TILE);
            tokens.sums = sums.of(size / TILE);
            tokens.half_sums = half_sums.of(size / BLOCK);
        }
        return tokens;
    }
};

// ---- how many threads take part

double seconds_of(clockid_t clock) {
    timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

// Fewer threads while other programs take processors away: all wait for the one that has none, and
// that costs more than it brings. The share of the time in which the calling thread did not run tells
// of it. After a while one more takes part again; the more attempts fail, the later.
class Turnout {
  public:
    template <typename Step> void during(Pool& pool, const Step& step) {
        double began = seconds_of(CLOCK_MONOTONIC), ran = seconds_of(CLOCK_THREAD_CPUTIME_ID);
        step();
        double seconds = seconds_of(CLOCK_MONOTONIC) - began;
        seconds_ += seconds;
        lost_ += seconds - (seconds_of(CLOCK_THREAD_CPUTIME_ID) - ran);
        int active = pool.num_active(), all = pool.num_threads();
        if (seconds_ < (active < all ? pause_ : WINDOW)) return;
        bool crowded = lost_ > MOST_LOST * seconds_;
        seconds_ = lost_ = 0;
        if (active > 1 && crowded) {
            pause_ = std::min(2 * pause_, LONGEST_PAUSE);
            pool.use(active - 1);
        } else if (active < all) {
            pool.use(active + 1);
        } else {
            pause_ = WINDOW;
        }
    }

  private:
    static constexpr double MOST_LOST = 0.3;  // one of two threads is often 0.7 as fast as both
    static constexpr double WINDOW = 0.05, LONGEST_PAUSE = 0.4;  // seconds of steps
    double seconds_ = 0, lost_ = 0, pause_ = WINDOW;
};

// ---- the engine: one for the process, as cores are

struct Engine {
    std::mutex turn;
    std::unique_ptr<Pool> pool = std::make_unique<Pool>(1);
    Turnout turnout;
    const Kernels* kernels = runnable().back();
    std::vector<Room<uint8_t>> scratch = std::vector<Room<uint8_t>>(1);

    int num_threads() const { return pool->num_threads(); }

    // Cuts `count` things, at least `least` a piece, into some pieces for each thread.
    template <typename Function> void share(int count, int least, const Function& function) {
        int threads = pool->num_active();
        int pieces = std::min((count + least - 1) / least, threads == 1 ? 1 : 16 * threads);
        if (pieces == 0) return;
        int each = (count + pieces - 1) / pieces;
        each = (each + least - 1) / least * least;
        pool->run((count + each - 1) / each, [&](int piece, int thread) {
            function(piece * each, std::min(count, (piece + 1) * each), thread);
        });
    }

    // In the forms that the product takes them in, of which parts of different types may differ.
    Tokens room_for(TokensRoom& room, const Linear& linear, int num_tokens) {
        int forms = 0;
        for (int i = 0; i < linear.num_parts; i++)
            forms |= kernels->form(linear.parts[i].type, num_tokens);
        return room.of(forms, num_tokens, linear.parts[0].columns);
    }

    // x: [num_tokens, width] float32. norm: the weight by which they are normed first, or null.
    Tokens prepare(const Linear& linear, const float* x, int num_tokens, const float* norm = nullptr,
                   float eps = 0) {
        Tokens tokens = room_for(tokens_, linear, num_tokens);
        share(num_tokens, 16, [&](int begin, int end, int) {
            for (int t = begin; t < end; t++)
                kernels->prepare(x + t * tokens.width, norm, eps, tokens, t);
        });
        return tokens;
    }

    void multiply(const Linear& linear, const Tokens& x, int num_tokens, float* out, bool add) {
        constexpr int64_t BYTES_EACH = 32 * 1024;  // of weights: some microseconds a piece
        int num_blocks = 0;
        int64_t bytes = 0, weight_bytes = 0;
        for (int i = 0; i < linear.num_parts; i++) {
            const Matrix& w = linear.parts[i];
            num_blocks += (w.rows + BLOCK - 1) / BLOCK;
            weight_bytes += nv_packed_bytes(w.type, w.rows, w.columns);
            bytes = std::max(bytes, kernels->scratch_bytes(w.type, w.columns, num_tokens));
        }
        for (auto& room : scratch) room.of(bytes);
        int least = std::max(2, (int)(BYTES_EACH * num_blocks / weight_bytes));
        share(num_blocks, least, [&](int begin, int end, int thread) {
            int row = 0, first = 0;  // of the part
            for (int i = 0; i < linear.num_parts; i++) {
                const Matrix& w = linear.parts[i];
                int blocks = (w.rows + BLOCK - 1) / BLOCK;
                int from = std::max(begin - first, 0), to = std::min(end - first, blocks);
                if (from < to)
                    kernels->linear(w, x, num_tokens, from, to, out + row, linear.rows,
                                    linear.bias ? linear.bias + row : nullptr, add,
                                    scratch[thread].of(bytes));
                first += blocks, row += w.rows;
            }
        });
    }

    void norm(const float* x, const float* weight, float eps, int width, int num_tokens, float* out,
              bool add = false) {
        share(num_tokens, 16, [&](int begin, int end, int) {
            for (int t = begin; t < end; t++)
                kernels->rms_norm(x + (int64_t)t * width, weight, eps, width,
                                  out + (int64_t)t * width, add);
        });
    }

    // What `down` multiplies: of each token its activated gates times what they let through. Pieces are
    // activated while they are in the processor's cache: all of them would be several megabytes.
    Tokens multiply_gated(const Linear& gate_up, const Linear& down, const Tokens& x, int num_tokens,
                          int activation) {
        Tokens to = room_for(gated_, down, num_tokens);
        Matrix gate = half_of(gate_up, 0), up = half_of(gate_up, 1);
        const float *gate_bias = gate_up.bias, *up_bias = gate_bias ? gate_bias + gate.rows : nullptr;
        int64_t sums = (int64_t)num_tokens * TILE;
        int64_t bytes = std::max(kernels->scratch_bytes(gate.type, gate.columns, num_tokens),
                                 kernels->scratch_bytes(up.type, up.columns, num_tokens));
        bytes += 2 * sums * sizeof(float);
        for (auto& room : scratch) room.of(bytes);
        share(gate.rows / TILE, 1, [&](int begin, int end, int thread) {
            float *gates = (float*)scratch[thread].of(bytes), *ups = gates + sums;
            auto product = [&](const Matrix& w, int tile, float* out, const float* bias) {
                int first = tile * (TILE / BLOCK), column = tile * TILE;
                kernels->linear(w, x, num_tokens, first, first + TILE / BLOCK, out - column, TILE, bias,
                                false, (uint8_t*)(ups + sums));
            };
            for (int tile = begin; tile < end; tile++) {
                product(gate, tile, gates, gate_bias);
                product(up, tile, ups, up_bias);
                kernels->gate(gates, ups, num_tokens, activation, to, tile);
            }
        });
        return to;
    }

    void rope(float* qkv, int64_t stride, const Rope& rope, const Heads& heads, const Cache& cache,
              const int64_t* positions, const int64_t* slots, int num_tokens) {
        share(num_tokens, 8, [&](int begin, int end, int) {
            for (int t = begin; t < end; t++)
                kernels->rope(qkv + t * stride, rope, heads, positions[t], slots[t], cache);
        });
    }

    // Tokens first ... first + num_tokens - 1 of the batch, which is where `queries` begins.
    void attend(const float* queries, int64_t stride, const Heads& heads, const Cache& cache,
                const Batch& batch, int first, int num_tokens, float* out) {
        int64_t out_stride = (int64_t)heads.num_heads * heads.head_dim;
        int group = heads.num_heads / heads.num_kv_heads;
        spans_.clear();
        splits_.clear();
        for (int row = 0; row < batch.num_rows; row++) {
            int begin = std::max(batch.query_start_loc[row], first);
            int end = std::min(batch.query_start_loc[row + 1], first + num_tokens);
            for (int t = begin; t < end;) {
                int count = std::min(end - t, QUERIES_EACH);
                add_spans(queries, stride, heads, batch, row, t, count, first, out, out_stride);
                t += count;
            }
        }
        float* partials = partials_.of((int64_t)num_partials_ * group * (BLOCK + heads.head_dim));
        int next = 0;
        for (Span& span : spans_)
            if (span.partial) span.partial = partials + (int64_t)next++ * group * (BLOCK + heads.head_dim);
        for (auto& room : scratch) room.of(ATTENTION_SCRATCH);
        pool->run((int)spans_.size(), [&](int piece, int thread) {
            kernels->attend(spans_[piece], heads, cache, scratch[thread].of(ATTENTION_SCRATCH));
        });
        int64_t each = BLOCK + heads.head_dim;
        const float* from = partials;
        for (const Split& split : splits_) {
            for (int h = 0; h < group; h++)
                kernels->merge(from + h * each, split.count, group * each, heads.head_dim,
                               split.out + (split.kv_head * group + h) * heads.head_dim);
            from += split.count * group * each;
        }
        num_partials_ = 0;
    }

  private:
    TokensRoom tokens_, gated_;
    static constexpr int QUERIES_EACH = 32, KEYS_EACH = 512;
    struct Split {
        float* out;
        int kv_head, count;
    };
    std::vector<Span> spans_;
    std::vector<Split> splits_;
    int num_partials_ = 0;
    Room<float> partials_;

    // Gates or what they let through, of a product that has both, in one matrix or in two.
    static Matrix half_of(const Linear& gate_up, int half) {
        Matrix found = gate_up.parts[gate_up.num_parts == 2 ? half : 0];
        if (gate_up.num_parts == 1) {
            found.rows /= 2;
            found.data += half * nv_packed_bytes(found.type, found.rows, found.columns);
        }
        return found;
    }

    void add_spans(const float* queries, int64_t stride, const Heads& heads, const Batch& batch,
                   int row, int token, int count, int first, float* out, int64_t out_stride) {
        int position = (int)batch.positions[token];
        int end_key = position + count;
        int first_key = heads.window ? std::max(0, position - heads.window + 1) : 0;
        int pieces = 1;  // a long context is cut where there are few others to share out
        if (count == 1 && num_threads() > 1 && batch.num_rows * heads.num_kv_heads < 8 * num_threads())
            pieces = std::max(1, std::min((end_key - first_key) / KEYS_EACH, 4 * num_threads()));
        int each = (end_key - first_key + pieces - 1) / pieces;
        for (int head = 0; head < heads.num_kv_heads; head++) {
            Span span{};
            span.queries = queries + (token - first) * stride;
            span.out = out + (token - first) * out_stride;
            span.query_stride = stride, span.out_stride = out_stride;
            span.block_table = batch.block_tables + row * batch.block_table_stride;
            span.num_tokens = count, span.first_position = position, span.kv_head = head;
            for (int i = 0; i < pieces; i++) {
                span.first_key = first_key + i * each;
                span.end_key = std::min(end_key, first_key + (i + 1) * each);
                span.has_sink = i == 0;
                span.partial = pieces > 1 ? out : nullptr;  // where: known once all are counted
                spans_.push_back(span);
            }
            if (pieces > 1) {
                splits_.push_back({span.out, head, pieces});
                num_partials_ += pieces;
            }
        }
    }
};

Engine& engine() {
    static Engine* one = new Engine;  // its threads outlive whatever unloads at exit
    return *one;
}

// ---- a decoder

constexpr int SLAB = 512;  // tokens that go through all layers together: bounds memory

struct Decoder {
    DecoderParts parts;
    std::vector<Layer> layers;
    Room<float> hidden, normed, qkv, attended;

    explicit Decoder(const DecoderParts& given)
        : parts(given), layers(given.layers, given.layers + given.num_layers) {}

    // batches: the step as each group of layers sees it, of which all but slots and block tables is
    // the same. cache: of the first layer in a block; the next one's is `layer_bytes` further on.
    // wanted: tokens of the batch, ascending, or null. Returns how many lines of `out` are written.
    int64_t forward(const int64_t* input_ids, const Batch* batches, Cache cache, int64_t layer_bytes,
                    const int64_t* wanted, int64_t num_wanted, float* out) {
        int64_t written = 0, next = 0;
        for (int first = 0; first < batches->num_tokens; first += SLAB) {
            int count = std::min(SLAB, batches->num_tokens - first);
            std::vector<int> kept;  // tokens of the slab
            if (wanted) {
                for (; next < num_wanted && wanted[next] < first + count; next++)
                    kept.push_back((int)wanted[next] - first);
            } else {
                for (int t = 0; t < count; t++) kept.push_back(t);
            }
            slab(input_ids, batches, cache, layer_bytes, first, count, kept);
            int width = parts.hidden_size;
            memcpy(out + written * width, hidden.of(0), kept.size() * width * sizeof(float));
            written += (int64_t)kept.size();
        }
        return written;
    }

    void slab(const int64_t* input_ids, const Batch* batches, Cache cache, int64_t layer_bytes,
              int first, int count, const std::vector<int>& kept) {
        Engine& e = engine();
        int width = parts.hidden_size;
        float* h = hidden.of((int64_t)count * width);
        e.share(count, 8, [&](int begin, int end, int) {
            for (int t = begin; t < end; t++)
                e.kernels->row(parts.embedding, input_ids[first + t], h + (int64_t)t * width);
            if (parts.embedding_multiplier != 1)
                for (int64_t i = (int64_t)begin * width; i < (int64_t)end * width; i++)
                    h[i] *= parts.embedding_multiplier;
        });
        for (size_t i = 0; i < layers.size(); i++) {
            const Layer& layer = layers[i];
            bool last = i + 1 == layers.size();
            Cache here = cache;
            here.keys = (uint8_t*)cache.keys + layer.place * layer_bytes;
            attention(layer, batches[layer.group], here, first, count);
            if (last && (int)kept.size() < count) {  // the others have left their keys and values
                int64_t heads = (int64_t)layer.heads.num_heads * layer.heads.head_dim;
                float* a = attended.of(0);
                for (size_t k = 0; k < kept.size(); k++) {
                    memmove(a + (int64_t)k * heads, a + kept[k] * heads, heads * sizeof(float));
                    memmove(h + (int64_t)k * width, h + (int64_t)kept[k] * width, width * sizeof(float));
                }
                count = (int)kept.size();
            }
            if (count == 0) return;
            add_product(layer.o, e.prepare(layer.o, attended.of(0), count), layer.attention_post_norm,
                        count);
            mlp(layer, count);
        }
    }

    // Adds to the stream what a block gives, normed if there is a norm.
    void add_product(const Linear& linear, const Tokens& tokens, const float* norm, int count) {
        Engine& e = engine();
        if (!norm) return e.multiply(linear, tokens, count, hidden.of(0), true);
        float* product = normed.of((int64_t)count * parts.hidden_size);
        e.multiply(linear, tokens, count, product, false);
        e.norm(product, norm, parts.eps, parts.hidden_size, count, hidden.of(0), true);
    }

    void attention(const Layer& layer, const Batch& batch, const Cache& cache, int first, int count) {
        Engine& e = engine();
        const Heads& heads = layer.heads;
        Tokens x = e.prepare(layer.qkv, hidden.of(0), count, layer.attention_norm, parts.eps);
        float* projected = qkv.of((int64_t)count * layer.qkv.rows);
        e.multiply(layer.qkv, x, count, projected, false);
        e.rope(projected, layer.qkv.rows, layer.rope, heads, cache, batch.positions + first,
               batch.slots + first, count);
        float* out = attended.of((int64_t)count * heads.num_heads * heads.head_dim);
        e.attend(projected, layer.qkv.rows, heads, cache, batch, first, count, out);
    }

    void mlp(const Layer& layer, int count) {
        Engine& e = engine();
        Tokens x = e.prepare(layer.gate_up, hidden.of(0), count, layer.mlp_norm, parts.eps);
        Tokens gated = e.multiply_gated(layer.gate_up, layer.down, x, count, layer.activation);
        add_product(layer.down, gated, layer.mlp_post_norm, count);
    }

    void logits(const float* states, int num_tokens, float* out) {
        Engine& e = engine();
        Tokens x = e.prepare(parts.head, states, num_tokens, parts.final_norm, parts.eps);
        e.multiply(parts.head, x, num_tokens, out, false);
        if (parts.logit_scale == 1 && parts.logit_softcap == 0) return;
        int width = parts.head.rows;
        for (int t = 0; t < num_tokens; t++)
            e.share(width, 4096, [&](int begin, int end, int) {
                e.kernels->cap(out + (int64_t)t * width + begin, end - begin, parts.logit_scale,
                               parts.logit_softcap);
            });
    }
};

}  // namespace

extern "C" {

int nv_interface() { return NV_INTERFACE; }

// Names of what this CPU can run, best last; null behind the last.
const char* nv_isa(int index) {
    auto found = runnable();
    return index < (int)found.size() ? found[index]->name : nullptr;
}

const char* nv_isa_in_use() { return engine().kernels->name; }
int nv_num_threads() { return engine().num_threads(); }

// Returns 0 if this CPU cannot run it.
int nv_use(const char* isa, int num_threads) {
    std::lock_guard<std::mutex> hold(engine().turn);
    for (const Kernels* kernels : runnable())
        if (strcmp(kernels->name, isa) == 0) {
            engine().kernels = kernels;
            if (num_threads != engine().num_threads()) {
                engine().pool = std::make_unique<Pool>(num_threads);
                engine().scratch = std::vector<Room<uint8_t>>(num_threads);
            }
            return 1;
        }
    return 0;
}

void nv_rms_norm(const float* x, const float* weight, float eps, int width, int num_tokens, float* out,
                 int add) {
    std::lock_guard<std::mutex> hold(engine().turn);
    engine().norm(x, weight, eps, width, num_tokens, out, add);
}

// x: [num_tokens, columns of gate_up]; out: [num_tokens, rows of down].
void nv_mlp(const Linear* gate_up, const Linear* down, const float* x, int num_tokens, int activation,
            float* out) {
    std::lock_guard<std::mutex> hold(engine().turn);
    Engine& e = engine();
    Tokens tokens = e.prepare(*gate_up, x, num_tokens);
    tokens = e.multiply_gated(*gate_up, *down, tokens, num_tokens, activation);
    e.multiply(*down, tokens, num_tokens, out, false);
}

void nv_cap(float* x, int64_t size, float scale, float softcap) {
    engine().kernels->cap(x, size, scale, softcap);
}

// x: [num_tokens, columns]; out: [num_tokens, rows].
void nv_linear(const Linear* linear, const float* x, int num_tokens, float* out) {
    std::lock_guard<std::mutex> hold(engine().turn);
    Engine& e = engine();
    e.multiply(*linear, e.prepare(*linear, x, num_tokens), num_tokens, out, false);
}

void nv_rows(const Matrix* w, const int64_t* rows, int num_rows, float* out) {
    std::lock_guard<std::mutex> hold(engine().turn);
    for (int64_t i = 0; i < num_rows; i++) engine().kernels->row(*w, rows[i], out + i * w->columns);
}

// qkv: [num_tokens, stride], overwritten.
void nv_rope_and_cache(float* qkv, int64_t stride, const Rope* rope, const Heads* heads,
                       const Cache* cache, const Batch* batch) {
    std::lock_guard<std::mutex> hold(engine().turn);
    engine().rope(qkv, stride, *rope, *heads, *cache, batch->positions, batch->slots,
                  batch->num_tokens);
}

void nv_attend(const float* queries, int64_t stride, const Heads* heads, const Cache* cache,
               const Batch* batch, float* out) {
    std::lock_guard<std::mutex> hold(engine().turn);
    engine().attend(queries, stride, *heads, *cache, *batch, 0, batch->num_tokens, out);
}

// logits: [num_lines, vocab_size], of which those of lines that ask for something may be edited;
// rows: each line's; positions: of the tokens to be chosen; asks: null if no line asks for what the
// columns do not say; out: [num_lines].
void nv_sample(float* logits, int num_lines, int64_t vocab_size, const int64_t* rows,
               const int64_t* positions, const Rows* records, const Asks* asks, int64_t* out) {
    std::lock_guard<std::mutex> hold(engine().turn);
    Engine& e = engine();
    const Rows& all = *records;
    e.share(num_lines, 1, [&](int begin, int end, int thread) {
        float* scratch = (float*)e.scratch[thread].of(wish_floats(vocab_size) * 4);
        for (int64_t i = begin; i < end; i++) {
            int64_t at = rows[i] * all.stride;
            Draw draw{all.temperature[at], all.top_p[at],
                      all.min_p[at],       all.top_k[at],
                      (uint64_t)all.seeds[rows[i] * all.seed_stride],
                      (uint64_t)positions[i]};
            Wishes wishes{};
            wishes.repetition = all.repetition[at];
            wishes.presence = all.presence[at];
            wishes.frequency = all.frequency[at];
            wishes.tokens = all.tokens + rows[i] * all.token_stride;
            wishes.num_tokens = positions[i];
            wishes.num_prompt_tokens = all.num_prompt_tokens[at];
            if (asks) {
                const Line& line = asks->lines[i];
                wishes.num_top = all.logprobs[at];
                wishes.report_top = asks->num_top;
                if (line.table >= 0) wishes.table = asks->tables + line.table;
                if (line.mask >= 0) wishes.mask = asks->masks + line.mask * asks->mask_bytes;
                if (line.report >= 0)
                    wishes.report = asks->reports + line.report * (3 + 2 * asks->num_top);
            }
            out[i] = choose_token(*e.kernels, logits + i * vocab_size, vocab_size, draw, wishes,
                                  scratch);
        }
    });
}

// Log-probabilities of given tokens: reports as those of `Asks`.
void nv_report(const float* logits, int num_lines, int64_t vocab_size, const int64_t* token_ids,
               int64_t num_top, int32_t* reports) {
    std::lock_guard<std::mutex> hold(engine().turn);
    Engine& e = engine();
    e.share(num_lines, 1, [&](int begin, int end, int thread) {
        float* scratch = (float*)e.scratch[thread].of(wish_floats(vocab_size) * 4);
        Wishes wishes{};
        wishes.num_top = wishes.report_top = num_top;
        for (int64_t i = begin; i < end; i++) {
            wishes.report = reports + i * (3 + 2 * num_top);
            report(*e.kernels, logits + i * vocab_size, vocab_size, token_ids[i], wishes, scratch);
        }
    });
}

void nv_widen(const uint16_t* bf16, int64_t size, float* out) {
    engine().kernels->widen(bf16, size, out);
}

void nv_narrow(const float* x, int64_t size, uint16_t* bf16) {
    engine().kernels->narrow(x, size, bf16);
}

void* nv_decoder(const DecoderParts* parts) { return new Decoder(*parts); }

void nv_decoder_free(void* decoder) { delete (Decoder*)decoder; }

int64_t nv_decoder_forward(void* decoder, const int64_t* input_ids, const Batch* batches,
                           const Cache* cache, int64_t layer_bytes, const int64_t* wanted,
                           int64_t num_wanted, float* out) {
    std::lock_guard<std::mutex> hold(engine().turn);
    int64_t written = 0;
    engine().turnout.during(*engine().pool, [&] {
        written = ((Decoder*)decoder)
                      ->forward(input_ids, batches, *cache, layer_bytes, wanted, num_wanted, out);
    });
    return written;
}

void nv_decoder_logits(void* decoder, const float* states, int num_tokens, float* out) {
    std::lock_guard<std::mutex> hold(engine().turn);
    ((Decoder*)decoder)->logits(states, num_tokens, out);
}

}  // extern "C"
