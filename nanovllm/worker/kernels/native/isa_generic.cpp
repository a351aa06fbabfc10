// The kernels for CPUs with: generic.
#define NV_NAMESPACE nv_generic
#define NV_NAME "generic"
#include "kernels.h"
