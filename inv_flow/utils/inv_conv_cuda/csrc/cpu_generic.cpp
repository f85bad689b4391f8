// The CPU solver with 16-byte vectors, which every machine has (SSE2, NEON) or the compiler replaces by scalars.
#define INV_CONV_ISA generic
#define INV_CONV_VECTOR_BYTES 16
#define INV_CONV_REGISTERS 16
#include "cpu_kernel.h"
