// The kernels for CPUs with: avx512_bf16.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#define NV_ISA_AVX512 1
#define NV_ISA_VNNI 1
#define NV_ISA_BF16 1
#define NV_NAMESPACE nv_avx512_bf16
#define NV_NAME "avx512_bf16"
#include "kernels.h"
#endif
