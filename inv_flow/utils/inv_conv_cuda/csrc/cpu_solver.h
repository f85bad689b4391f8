// What the CPU solver is given, and the three builds of it (one an instruction set) that binding.cpp chooses from.
#pragma once

#include <cstdint>

namespace inv_conv {

// Runs body(context, begin, end) over [0, units), on as many threads as the caller has.
using Body = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t units, Body body, void* context);

// Solve A x = y, or A^T x = y, for a batch. A is the masked convolution by w; group g has the order codes[g % orders].
template <typename T>
struct Problem {
  const T* y;  // (batch, groups * size, height, width), contiguous
  const T* w;  // (groups * size, size, kh, kw), contiguous
  T* x;        // as y
  int64_t batch;
  int groups, size, height, width, kh, kw;
  const int* codes;  // bit 0: mirrored in the width; bit 1: mirrored in the height
  int orders;
  bool transposed;
  int threads;
  ParallelFor parallel_for;
};

// The gradient of <g, A x> with respect to the kernel: 0 at the pinned entries.
template <typename T>
struct KernelProblem {
  const T *x, *g;  // (batch, groups * size, height, width), contiguous
  T* gradient;     // (groups * size, size, kh, kw), contiguous
  int64_t batch;
  int groups, size, height, width, kh, kw;
  const int* codes;
  int orders;
  int threads;
  ParallelFor parallel_for;
};

// scratch_bytes: memory that the threads hold from one solve to the next.
#define INV_CONV_DECLARE(isa)                          \
  namespace isa {                                      \
  void solve(const Problem<float>& p);                 \
  void solve(const Problem<double>& p);                \
  void kernel_gradient(const KernelProblem<float>& p); \
  void kernel_gradient(const KernelProblem<double>& p);\
  int64_t scratch_bytes();                             \
  }

INV_CONV_DECLARE(avx512)
INV_CONV_DECLARE(avx2)
INV_CONV_DECLARE(generic)

}  // namespace inv_conv
