// The CPU solver for x86 with AVX-512. Empty on other machines.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")
#endif
#define INV_CONV_ISA avx512
#define INV_CONV_VECTOR_BYTES 64
#define INV_CONV_REGISTERS 32
#include "cpu_kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
