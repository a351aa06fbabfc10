// The kernels for CPUs with: avx512.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define NV_ISA_AVX512 1
#define NV_NAMESPACE nv_avx512
#define NV_NAME "avx512"
#include "kernels.h"
#endif
