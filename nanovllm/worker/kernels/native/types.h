// What crosses the C ABI, and the tables of kernels that each instruction set fills in.
//
// Plain data only: Python's ctypes declares the same structures (library.py). Sizes are in elements.
#pragma once

#include <stdint.h>

// Raised with every change of what crosses: library.py, which has the same number, refuses a library
// of another, since Python's files may be newer than what the set-up has built.
#define NV_INTERFACE 3

// Weight types by their ids in GGUF files.
enum Type { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30 };

// A weight, laid out by pack.cpp: blocks of 16 rows, in each tiles of 32 columns. Rows are outputs.
struct Matrix {
    int32_t type, rows, columns, padding;
    const uint8_t* data;
};

// Matrices whose outputs lie side by side, each perhaps of its own type. bias: of all, or null.
struct Linear {
    Matrix parts[3];
    int32_t num_parts, rows;
    const float* bias;
};

// The cache of one layer: keys, then values `plane` elements further on. Slots are consecutive.
struct Cache {
    void* keys;
    int64_t plane;
    int32_t is_bf16, block_size;  // else float32
};

struct Heads {
    int32_t num_heads, num_kv_heads, head_dim, window;  // window 0: all
    float scale, softcap;                               // softcap 0: none
    const float* sinks;                                 // [num_heads], or null
};

// norms: of each head, [head_dim], or of all heads of a token at once, [heads * head_dim]; or null.
// growth: what queries are multiplied by, [positions], or null.
struct Rope {
    const float *cos_sin, *q_norm, *k_norm, *growth;  // cos_sin: [positions, head_dim]
    float eps;
    int32_t norms_all;
};

// Rows of a step, as in ForwardBatch. All on the host.
struct Batch {
    const int64_t *positions, *slots;
    const int32_t *query_start_loc, *block_tables;
    int32_t num_tokens, num_rows;
    int64_t block_table_stride;
};

enum Activation { SILU = 0, GELU_TANH = 1 };

// Norms of what a block takes and of what it gives, [hidden_size] each, or null. group, place: which
// of a step's batches has the blocks of its keys, and which of the layers in a block it is.
struct Layer {
    Linear qkv, o, gate_up, down;
    const float *attention_norm, *attention_post_norm, *mlp_norm, *mlp_post_norm;
    Rope rope;
    Heads heads;
    int32_t activation, group, place, padding;
};

// softcap 0: none.
struct DecoderParts {
    const Layer* layers;
    int32_t num_layers, hidden_size;
    float eps, embedding_multiplier, logit_scale, logit_softcap;
    const float* final_norm;
    Matrix embedding;
    Linear head;
};

// The records of rows (request_rows.py): columns of sampling parameters and counts, `stride` words
// apart, and tokens, `token_stride` apart. repetition 1, presence 0 and frequency 0 are off.
struct Rows {
    const float *temperature, *top_p, *min_p, *repetition, *presence, *frequency;
    const int32_t *top_k, *logprobs, *num_prompt_tokens;
    const int64_t* seeds;
    const int32_t* tokens;
    int64_t stride, seed_stride, token_stride;
};

// What some of the lines of a step ask for besides what their rows' columns say; -1 where one does not.
struct Line {
    int64_t table;   // where its edits begin in `tables` (edit_tables.py)
    int64_t mask;    // which of `masks` is its grammar's
    int64_t report;  // which of `reports` gets its log-probabilities
};
struct Asks {
    const struct Line* lines;  // [num_lines]
    const int32_t* tables;
    const uint8_t* masks;  // [..., mask_bytes]: a bit per token, of whole words of 32
    int64_t mask_bytes;
    int32_t* reports;  // [..., 3 + 2 * num_top], as `logprobs.pack_logprobs` has them
    int64_t num_top;
};

#ifdef __cplusplus

// The inputs of a product, in the forms that its weights are multiplied with: one, or both.
enum Form { BYTES = 1, HALVES = 2 };
struct Tokens {
    int64_t width;
    int8_t* bytes;      // [n, width], of BYTES, or null: value = byte * scale
    float* scales;      // [n, width / 32]
    float* sums;        // [n, width / 32]: of the values that the bytes stand for
    float* half_sums;   // [n, width / 16]
    uint16_t* halves;   // [n, width] bfloat16, of HALVES, or null
};

// Queries of one row and one head of keys that are attended to together.
struct Span {
    const float* queries;  // of the first token: [num_tokens, query_stride]
    float* out;
    int64_t query_stride, out_stride;
    const int32_t* block_table;
    int32_t num_tokens, first_position, kv_head;
    int32_t first_key, end_key;  // of all that the row has: those looked at here
    bool has_sink;
    float* partial;  // per query head: peak, total, then the sum; null: write `out`
};

// How one row draws. temperature 0: the largest logit; top_k 0, top_p 1 and min_p 0 are off.
struct Draw {
    float temperature, top_p, min_p;
    int32_t top_k;
    uint64_t seed, position;
};

// What one row asks for besides: tables, masks and reports are null where it does not.
struct Wishes {
    const int32_t* table;
    const uint8_t* mask;
    float repetition, presence, frequency;
    const int32_t* tokens;
    int64_t num_tokens, num_prompt_tokens;
    int32_t* report;
    int64_t num_top, report_top;  // of its own, -1: all; for how many the report has room
};

struct Kernels {
    const char* name;
    Form (*form)(int type, int num_tokens);
    void (*prepare)(const float* x, const float* norm, float eps, const Tokens& tokens, int64_t token);
    void (*linear)(const Matrix& w, const Tokens& x, int num_tokens, int first_block, int end_block,
                   float* out, int64_t stride, const float* bias, bool add, uint8_t* scratch);
    int64_t (*scratch_bytes)(int type, int columns, int num_tokens);
    void (*row)(const Matrix& w, int64_t row, float* out);
    void (*rms_norm)(const float* x, const float* weight, float eps, int width, float* out, bool add);
    void (*gate)(const float* gate, const float* up, int num_tokens, int activation, const Tokens& to,
                 int64_t tile);
    void (*rope)(float* qkv, const Rope& rope, const Heads& heads, int64_t position, int64_t slot,
                 const Cache& cache);
    void (*attend)(const Span& span, const Heads& heads, const Cache& cache, uint8_t* scratch);
    void (*merge)(const float* partials, int num_partials, int64_t stride, int head_dim, float* out);
    void (*cap)(float* x, int64_t size, float scale, float softcap);
    int64_t (*argmax)(const float* x, int64_t size);
    void (*weigh)(const float* x, int64_t size, float temperature, float* weights, float* masses);
    void (*forbid)(float* x, int64_t size, const uint8_t* bits);
    void (*find_peaks)(const float* x, int64_t size, float* peaks);
    double (*compare)(const float* x, int64_t size, float largest, float chosen, int64_t* num_above);
    void (*widen)(const uint16_t* bf16, int64_t size, float* out);
    void (*narrow)(const float* x, int64_t size, uint16_t* bf16);
};

constexpr int BLOCK = 16, TILE = 32, MAX_GROUP = 16, SEGMENT = 128;
constexpr int64_t ATTENTION_SCRATCH = 256 * 1024;

// Of pack.cpp: a packed matrix's size; -1 if there is no such type.
extern "C" int64_t nv_packed_bytes(int type, int rows, int columns);

// Of sampling.cpp: one row's token. scratch: `draw_floats` of them.
int64_t draw_floats(int64_t vocab_size);
int64_t draw_token(const Kernels& kernels, const float* logits, int64_t vocab_size, const Draw& draw,
                   float* scratch);

// Of wishes.cpp: the same of a row that asks for more. Its logits are edited in place, unless others
// need them as they were. scratch: `wish_floats` of them.
int64_t wish_floats(int64_t vocab_size);
int64_t choose_token(const Kernels& kernels, float* logits, int64_t vocab_size, const Draw& draw,
                     const Wishes& wishes, float* scratch);
// Writes the log-probabilities of one row.
void report(const Kernels& kernels, const float* logits, int64_t vocab_size, int64_t token,
            const Wishes& wishes, float* scratch);

#endif
