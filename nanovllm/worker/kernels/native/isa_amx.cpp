// The kernels for CPUs with: amx.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#define NV_ISA_AVX512 1
#define NV_ISA_VNNI 1
#define NV_ISA_BF16 1
#define NV_ISA_AMX 1
#define NV_NAMESPACE nv_amx
#define NV_NAME "amx"
#include "kernels.h"
#endif
