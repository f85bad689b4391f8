// The CPU solver for x86 with AVX2 and FMA. Empty on other machines.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define INV_CONV_ISA avx2
#define INV_CONV_VECTOR_BYTES 32
#define INV_CONV_REGISTERS 16
#include "cpu_kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
