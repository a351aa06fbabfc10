// The kernels for CPUs with: avx2.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define NV_ISA_AVX2 1
#define NV_NAMESPACE nv_avx2
#define NV_NAME "avx2"
#include "kernels.h"
#endif
