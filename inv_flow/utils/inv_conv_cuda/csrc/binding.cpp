// The schema of the op, its CPU implementation, and what the library tells about itself.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "check_inputs.h"
#include "cpu_solver.h"

// What extension.py reads from the file before it runs any of it. The interface changes with the schema below.
#ifndef INV_CONV_CUDA
#define INV_CONV_CUDA ""
#define INV_CONV_SM ""
#define INV_CONV_PTX ""
#endif
extern "C" __attribute__((used, visibility("default"))) const char inv_conv_stamp[] =
    "inv_conv library|interface 2|torch " INV_CONV_TORCH "|cuda " INV_CONV_CUDA "|sm " INV_CONV_SM "|ptx " INV_CONV_PTX "|";

namespace inv_conv {
namespace {

enum class Isa { generic, avx2, avx512 };

Isa detect() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::generic;
}

Isa isa() {
  static const Isa best = [] {
    const Isa found = detect();
    // a narrower one can be asked for, to test it or to compare; a wider one than the machine has cannot
    const char* asked = std::getenv("INV_CONV_ISA");
    if (asked == nullptr) return found;
    const std::string name(asked);
    const Isa wanted = name == "generic" ? Isa::generic : name == "avx2" ? Isa::avx2 : Isa::avx512;
    return wanted < found ? wanted : found;
  }();
  return best;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "generic";
  }
}

void parallel_for(int64_t units, Body body, void* context) {
  if (units == 1)
    body(context, 0, 1);
  else
    at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

template <typename T>
void solve_with(const Problem<T>& problem) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::solve(problem);
  if (isa() == Isa::avx2) return avx2::solve(problem);
#endif
  generic::solve(problem);
}

// What the threads' scratch memory takes, in bytes.
int64_t scratch_bytes() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::scratch_bytes();
  if (isa() == Isa::avx2) return avx2::scratch_bytes();
#endif
  return generic::scratch_bytes();
}

template <typename T>
void solve_typed(const at::Tensor& y, const at::Tensor& w, at::Tensor& x, at::IntArrayRef orders, int64_t groups,
                 bool transposed) {
  const std::vector<int> codes(orders.begin(), orders.end());
  Problem<T> p;
  p.y = y.const_data_ptr<T>();
  p.w = w.const_data_ptr<T>();
  p.x = x.mutable_data_ptr<T>();
  p.batch = y.size(0);
  p.groups = static_cast<int>(groups);
  p.size = static_cast<int>(y.size(1) / groups);
  p.height = static_cast<int>(y.size(2));
  p.width = static_cast<int>(y.size(3));
  p.kh = static_cast<int>(w.size(2));
  p.kw = static_cast<int>(w.size(3));
  p.codes = codes.data();
  p.orders = static_cast<int>(codes.size());
  p.transposed = transposed;
  p.threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  p.parallel_for = parallel_for;
  solve_with(p);
}

at::Tensor solve_cpu(const at::Tensor& y, const at::Tensor& w, at::IntArrayRef orders, int64_t groups, bool transposed) {
  check_inputs(y, w, orders, groups);
  const at::Tensor in = y.contiguous(), kernel = w.contiguous();
  at::Tensor x = at::empty_like(in, at::MemoryFormat::Contiguous);
  if (x.numel() == 0) return x;
  if (y.scalar_type() == at::kFloat)
    solve_typed<float>(in, kernel, x, orders, groups, transposed);
  else
    solve_typed<double>(in, kernel, x, orders, groups, transposed);
  return x;
}

}  // namespace
}  // namespace inv_conv

TORCH_LIBRARY(inv_conv, m) {
  m.def("solve(Tensor y, Tensor w, int[] orders, int groups, bool transposed) -> Tensor");
  m.def("cpu_solver() -> str", [] { return std::string(inv_conv::isa_name()); });
  m.def("scratch_bytes() -> int", &inv_conv::scratch_bytes);
}

TORCH_LIBRARY_IMPL(inv_conv, CPU, m) { m.impl("solve", &inv_conv::solve_cpu); }
