// Vectors of 16 lanes, for the instruction set that the including file has chosen by NV_ISA_*.
//
// Kernels are written once over these few operations. Nothing of the C++ library is included here:
// its inline functions would be compiled for this instruction set and might then serve another CPU.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(NV_ISA_AVX512) || defined(NV_ISA_AVX2)
#include <immintrin.h>
#endif

namespace NV_NAMESPACE {

// Codes of one quad of inputs: 16 outputs times 4 inputs, unsigned bytes.

#if defined(NV_ISA_AVX512)

struct F { __m512 v; };
struct I { __m512i v; };
struct Codes { __m512i v; };

static inline F zero() { return {_mm512_setzero_ps()}; }
static inline F set1(float x) { return {_mm512_set1_ps(x)}; }
static inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
static inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline F abs(F a) { return {_mm512_abs_ps(a.v)}; }
static inline F round(F a) { return {_mm512_roundscale_ps(a.v, 0)}; }
static inline F pow2(F n) {  // n: whole numbers, -126 ... 127
    __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 23))};
}
static inline float sum(F a) { return _mm512_reduce_add_ps(a.v); }
static inline float peak(F a) { return _mm512_reduce_max_ps(a.v); }
static inline int num_greater(F a, F b) {
    return __builtin_popcount(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ));
}
static inline F where(int lanes, F a, F b) {  // a in the lanes whose bits are 1
    return {_mm512_mask_mov_ps(b.v, (__mmask16)lanes, a.v)};
}
static inline F load_bf16(const uint16_t* p) {
    __m256i raw = _mm256_loadu_si256((const __m256i*)p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
static inline void store_bf16(uint16_t* p, F x) {
#if defined(NV_ISA_BF16)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x.v));
#else
    __m512i bits = _mm512_castps_si512(x.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}
static inline F load_fp16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
static inline F load_u8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
static inline F load_s8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
static inline void store_s8(int8_t* p, F x) {  // whole numbers
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
// The even and the odd ones of 32 bfloat16 numbers.
static inline F even_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}
static inline F odd_bf16(const uint16_t* p) {
    __m512i high = _mm512_set1_epi32((int)0xffff0000);
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), high))};
}
static inline I izero() { return {_mm512_setzero_si512()}; }
static inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline Codes load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline Codes low_bits(Codes c, int mask) {
    return {_mm512_and_si512(c.v, _mm512_set1_epi8((char)mask))};
}
template <int shift> static inline Codes shifted(Codes c, int mask) {
    return {_mm512_and_si512(_mm512_srli_epi16(c.v, shift), _mm512_set1_epi8((char)mask))};
}
template <int shift> static inline Codes join(Codes low, Codes high) {  // high: few enough bits
    return {_mm512_or_si512(low.v, _mm512_slli_epi16(high.v, shift))};
}
static inline F code(Codes c, int i) {  // the i-th of each quad
    __m512i bytes = _mm512_and_si512(_mm512_srli_epi32(c.v, 8 * i), _mm512_set1_epi32(0xff));
    return {_mm512_cvtepi32_ps(bytes)};
}
// acc + the products of each output's 4 codes and 4 signed bytes at `quad`. wide: codes of over 4 bits
template <bool wide> static inline I dot(I acc, Codes c, const int8_t* quad) {
    int32_t four;
    memcpy(&four, quad, 4);
    __m512i x = _mm512_set1_epi32(four);
#if defined(NV_ISA_VNNI)
    return {_mm512_dpbusd_epi32(acc.v, c.v, x)};
#else
    __m512i ones = _mm512_set1_epi16(1);
    if (!wide)
        return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(_mm512_maddubs_epi16(c.v, x), ones))};
    // Sums of two products of bytes would saturate: nibbles by themselves do not.
    __m512i low = _mm512_and_si512(c.v, _mm512_set1_epi8(15));
    __m512i high = _mm512_and_si512(_mm512_srli_epi16(c.v, 4), _mm512_set1_epi8(15));
    low = _mm512_madd_epi16(_mm512_maddubs_epi16(low, x), ones);
    high = _mm512_madd_epi16(_mm512_maddubs_epi16(high, x), ones);
    return {_mm512_add_epi32(acc.v, _mm512_add_epi32(low, _mm512_slli_epi32(high, 4)))};
#endif
}
// acc + the products of each output's 2 weights and 2 tokens' values, all bfloat16.
static inline F dot_bf16(F acc, const uint16_t* weights, const uint16_t* pair) {
#if defined(NV_ISA_BF16)
    int32_t two;
    memcpy(&two, pair, 4);
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)_mm512_loadu_si512(weights),
                             (__m512bh)_mm512_set1_epi32(two))};
#else
    uint32_t first = (uint32_t)pair[0] << 16, second = (uint32_t)pair[1] << 16;
    float x, y;
    memcpy(&x, &first, 4);
    memcpy(&y, &second, 4);
    return fma(odd_bf16(weights), set1(y), fma(even_bf16(weights), set1(x), acc));
#endif
}
// Lane i of the result is the sum of the lanes of a[i].
static inline F sums_of_16(const F* a) {
    __m512 b[8], c[4];
    for (int i = 0; i < 8; i++)
        b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v),
                             _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v));
    for (int i = 0; i < 4; i++) {
        __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
        c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                             _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
    __m512 e = _mm512_add_ps(_mm512_shuffle_f32x4(c[2], c[3], 0x88),
                             _mm512_shuffle_f32x4(c[2], c[3], 0xdd));
    return {_mm512_add_ps(_mm512_shuffle_f32x4(d, e, 0x88), _mm512_shuffle_f32x4(d, e, 0xdd))};
}

#elif defined(NV_ISA_AVX2)

struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct Codes { __m256i a, b; };

static inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
#define NV_TWICE(op, x, y) {op((x).a, (y).a), op((x).b, (y).b)}
static inline F operator+(F x, F y) { return NV_TWICE(_mm256_add_ps, x, y); }
static inline F operator-(F x, F y) { return NV_TWICE(_mm256_sub_ps, x, y); }
static inline F operator*(F x, F y) { return NV_TWICE(_mm256_mul_ps, x, y); }
static inline F operator/(F x, F y) { return NV_TWICE(_mm256_div_ps, x, y); }
static inline F max(F x, F y) { return NV_TWICE(_mm256_max_ps, x, y); }
static inline F min(F x, F y) { return NV_TWICE(_mm256_min_ps, x, y); }
static inline F fma(F x, F y, F z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline F abs(F x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline F round(F x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
static inline __m256 pow2(__m256 n) {
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
static inline F pow2(F n) { return {pow2(n.a), pow2(n.b)}; }
static inline float sum(F x) {
    float lanes[8], total = 0;
    _mm256_storeu_ps(lanes, _mm256_add_ps(x.a, x.b));
    for (int i = 0; i < 8; i++) total += lanes[i];
    return total;
}
static inline float peak(F x) {
    float lanes[8];
    _mm256_storeu_ps(lanes, _mm256_max_ps(x.a, x.b));
    float most = lanes[0];
    for (int i = 1; i < 8; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
}
static inline int num_greater(F x, F y) {
    int low = _mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ));
    int high = _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ));
    return __builtin_popcount((unsigned)(low | high << 8));
}
static inline __m256 where(int lanes, __m256 x, __m256 y) {
    __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i ours = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(lanes), each), each);
    return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(ours));
}
static inline F where(int lanes, F x, F y) {  // x in the lanes whose bits are 1
    return {where(lanes, x.a, y.a), where(lanes >> 8, x.b, y.b)};
}
static inline __m256 wide_bf16(__m128i raw) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
static inline F load_bf16(const uint16_t* p) {
    return {wide_bf16(_mm_loadu_si128((const __m128i*)p)),
            wide_bf16(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
static inline __m256i narrow_bf16(__m256 x) {  // 32 bits each
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    return _mm256_srli_epi32(bits, 16);
}
static inline void store_bf16(uint16_t* p, F x) {
    __m256i packed = _mm256_packus_epi32(narrow_bf16(x.a), narrow_bf16(x.b));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
static inline F load_fp16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
static inline F load_u8(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
static inline F load_s8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
static inline void store_s8(int8_t* p, F x) {
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    words = _mm256_permute4x64_epi64(words, 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words),
                                    _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i*)p, bytes);
}
static inline __m256i load_256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline F even_bf16(const uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(load_256(p), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(load_256(p + 16), 16))};
}
static inline F odd_bf16(const uint16_t* p) {
    __m256i high = _mm256_set1_epi32((int)0xffff0000);
    return {_mm256_castsi256_ps(_mm256_and_si256(load_256(p), high)),
            _mm256_castsi256_ps(_mm256_and_si256(load_256(p + 16), high))};
}
static inline I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline Codes load_codes(const uint8_t* p) { return {load_256(p), load_256(p + 32)}; }
static inline Codes low_bits(Codes c, int mask) {
    __m256i bits = _mm256_set1_epi8((char)mask);
    return {_mm256_and_si256(c.a, bits), _mm256_and_si256(c.b, bits)};
}
template <int shift> static inline Codes shifted(Codes c, int mask) {
    return low_bits({_mm256_srli_epi16(c.a, shift), _mm256_srli_epi16(c.b, shift)}, mask);
}
template <int shift> static inline Codes join(Codes low, Codes high) {
    return {_mm256_or_si256(low.a, _mm256_slli_epi16(high.a, shift)),
            _mm256_or_si256(low.b, _mm256_slli_epi16(high.b, shift))};
}
static inline F code(Codes c, int i) {
    __m256i bits = _mm256_set1_epi32(0xff);
    return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(c.a, 8 * i), bits)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(c.b, 8 * i), bits))};
}
static inline __m256i dot_narrow(__m256i c, __m256i x) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(c, x), _mm256_set1_epi16(1));
}
template <bool wide> static inline __m256i dot(__m256i acc, __m256i c, __m256i x) {
    if (!wide) return _mm256_add_epi32(acc, dot_narrow(c, x));
    // Sums of two products of bytes would saturate: nibbles by themselves do not.
    __m256i nibble = _mm256_set1_epi8(15);
    __m256i low = dot_narrow(_mm256_and_si256(c, nibble), x);
    __m256i high = dot_narrow(_mm256_and_si256(_mm256_srli_epi16(c, 4), nibble), x);
    return _mm256_add_epi32(acc, _mm256_add_epi32(low, _mm256_slli_epi32(high, 4)));
}
template <bool wide> static inline I dot(I acc, Codes c, const int8_t* quad) {
    int32_t four;
    memcpy(&four, quad, 4);
    __m256i x = _mm256_set1_epi32(four);
    return {dot<wide>(acc.a, c.a, x), dot<wide>(acc.b, c.b, x)};
}
static inline F dot_bf16(F acc, const uint16_t* weights, const uint16_t* pair) {
    uint32_t first = (uint32_t)pair[0] << 16, second = (uint32_t)pair[1] << 16;
    float x, y;
    memcpy(&x, &first, 4);
    memcpy(&y, &second, 4);
    return fma(odd_bf16(weights), set1(y), fma(even_bf16(weights), set1(x), acc));
}
static inline F sums_of_16(const F* a) {
    float sums[16];
    for (int i = 0; i < 16; i++) sums[i] = sum(a[i]);
    return load(sums);
}

#else  // plain C++, which compilers turn into whatever vectors the CPU has (SSE2, NEON)

struct F { float v[16]; };
struct I { int32_t v[16]; };
struct Codes { uint8_t v[64]; };
#define NV_LANES(expression) F r; for (int i = 0; i < 16; i++) r.v[i] = (expression); return r

static inline float f32_of_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline float f32_of_fp16(uint16_t h) {
    uint32_t exponent = h >> 10 & 31, mantissa = h & 1023;
    float value = exponent == 0 ? ldexpf((float)mantissa, -24)
                  : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                   : ldexpf((float)(mantissa + 1024), (int)exponent - 25);
    return h >> 15 ? -value : value;
}
static inline F zero() { NV_LANES(0.0f); }
static inline F set1(float x) { NV_LANES(x); }
static inline F load(const float* p) { NV_LANES(p[i]); }
static inline void store(float* p, F x) { memcpy(p, x.v, sizeof x.v); }
static inline F operator+(F a, F b) { NV_LANES(a.v[i] + b.v[i]); }
static inline F operator-(F a, F b) { NV_LANES(a.v[i] - b.v[i]); }
static inline F operator*(F a, F b) { NV_LANES(a.v[i] * b.v[i]); }
static inline F operator/(F a, F b) { NV_LANES(a.v[i] / b.v[i]); }
static inline F fma(F a, F b, F c) { NV_LANES(a.v[i] * b.v[i] + c.v[i]); }
static inline F max(F a, F b) { NV_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline F min(F a, F b) { NV_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline F abs(F a) { NV_LANES(a.v[i] < 0 ? -a.v[i] : a.v[i]); }
static inline F round(F a) { NV_LANES(nearbyintf(a.v[i])); }
static inline F pow2(F n) {
    F r;
    for (int i = 0; i < 16; i++) {
        uint32_t bits = (uint32_t)((int)n.v[i] + 127) << 23;
        memcpy(&r.v[i], &bits, 4);
    }
    return r;
}
static inline float sum(F a) {
    float total = 0;
    for (int i = 0; i < 16; i++) total += a.v[i];
    return total;
}
static inline float peak(F a) {
    float most = a.v[0];
    for (int i = 1; i < 16; i++) most = a.v[i] > most ? a.v[i] : most;
    return most;
}
static inline int num_greater(F a, F b) {
    int count = 0;
    for (int i = 0; i < 16; i++) count += a.v[i] > b.v[i];
    return count;
}
static inline F where(int lanes, F a, F b) {  // a in the lanes whose bits are 1
    NV_LANES(lanes >> i & 1 ? a.v[i] : b.v[i]);
}
static inline F load_bf16(const uint16_t* p) { NV_LANES(f32_of_bf16(p[i])); }
static inline F even_bf16(const uint16_t* p) { NV_LANES(f32_of_bf16(p[2 * i])); }
static inline F odd_bf16(const uint16_t* p) { NV_LANES(f32_of_bf16(p[2 * i + 1])); }
static inline F load_fp16(const uint16_t* p) { NV_LANES(f32_of_fp16(p[i])); }
static inline F load_u8(const uint8_t* p) { NV_LANES((float)p[i]); }
static inline F load_s8(const int8_t* p) { NV_LANES((float)p[i]); }
static inline void store_bf16(uint16_t* p, F x) {
    for (int i = 0; i < 16; i++) {
        uint32_t bits;
        memcpy(&bits, &x.v[i], 4);
        p[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}
static inline void store_s8(int8_t* p, F x) {
    for (int i = 0; i < 16; i++) p[i] = (int8_t)x.v[i];
}
static inline I izero() { return I{}; }
static inline F to_float(I a) { NV_LANES((float)a.v[i]); }
static inline Codes load_codes(const uint8_t* p) {
    Codes c;
    memcpy(c.v, p, 64);
    return c;
}
static inline Codes low_bits(Codes c, int mask) {
    for (int i = 0; i < 64; i++) c.v[i] &= (uint8_t)mask;
    return c;
}
template <int shift> static inline Codes shifted(Codes c, int mask) {
    for (int i = 0; i < 64; i++) c.v[i] = (uint8_t)(c.v[i] >> shift & mask);
    return c;
}
template <int shift> static inline Codes join(Codes low, Codes high) {
    for (int i = 0; i < 64; i++) low.v[i] |= (uint8_t)(high.v[i] << shift);
    return low;
}
static inline F code(Codes c, int k) { NV_LANES((float)c.v[4 * i + k]); }
template <bool wide> static inline I dot(I acc, Codes c, const int8_t* quad) {
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 4; k++) acc.v[i] += (int32_t)c.v[4 * i + k] * quad[k];
    return acc;
}
static inline F dot_bf16(F acc, const uint16_t* weights, const uint16_t* pair) {
    F x = set1(f32_of_bf16(pair[0])), y = set1(f32_of_bf16(pair[1]));
    return fma(odd_bf16(weights), y, fma(even_bf16(weights), x, acc));
}
static inline F sums_of_16(const F* a) { NV_LANES(sum(a[i])); }

#endif

// e^x to about 2 units in the last place; 0 far below, finite far above.
static inline F exp(F x) {
    x = min(max(x, set1(-87.0f)), set1(88.0f));
    F n = round(x * set1(1.44269504f));
    F r = fma(n, set1(-0.693145752f), x);
    r = fma(n, set1(-1.42860677e-6f), r);
    F p = set1(1.98756915e-4f);
    p = fma(p, r, set1(1.39819995e-3f));
    p = fma(p, r, set1(8.33345190e-3f));
    p = fma(p, r, set1(4.16657962e-2f));
    p = fma(p, r, set1(1.66666655e-1f));
    p = fma(p, r, set1(0.5f));
    return fma(p * r, r, r + set1(1.0f)) * pow2(n);
}

// tanh by e^2x, which is exact enough far from 0; near 0 scores are small and so is the error.
static inline F tanh(F x) {
    F e = exp(x + x);
    return set1(1.0f) - set1(2.0f) / (e + set1(1.0f));
}

static inline F load_value(const float* p) { return load(p); }
static inline F load_value(const uint16_t* p) { return load_bf16(p); }
static inline void store_value(float* p, F x) { store(p, x); }
static inline void store_value(uint16_t* p, F x) { store_bf16(p, x); }

}  // namespace NV_NAMESPACE
