// The schema of the op, its CPU implementation, and what the library tells about itself.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
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

template <typename T>
void kernel_gradient_with(const KernelProblem<T>& problem) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::kernel_gradient(problem);
  if (isa() == Isa::avx2) return avx2::kernel_gradient(problem);
#endif
  generic::kernel_gradient(problem);
}

// What the threads' scratch memory takes, in bytes.
int64_t scratch_bytes() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::scratch_bytes();
  if (isa() == Isa::avx2) return avx2::scratch_bytes();
#endif
  return generic::scratch_bytes();
}

// What both problems say of the images.
template <typename P>
void describe(P& p, const at::Tensor& image, at::IntArrayRef kernel_size, const std::vector<int>& codes, int64_t groups) {
  p.batch = image.size(0);
  p.groups = static_cast<int>(groups);
  p.size = static_cast<int>(image.size(1) / groups);
  p.height = static_cast<int>(image.size(2));
  p.width = static_cast<int>(image.size(3));
  p.kh = static_cast<int>(kernel_size[0]);
  p.kw = static_cast<int>(kernel_size[1]);
  p.codes = codes.data();
  p.orders = static_cast<int>(codes.size());
  p.threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  p.parallel_for = parallel_for;
}

template <typename T>
void solve_typed(const at::Tensor& y, const at::Tensor& w, at::Tensor& x, at::IntArrayRef orders, int64_t groups,
                 bool transposed) {
  const std::vector<int> codes(orders.begin(), orders.end());
  Problem<T> p;
  p.y = y.const_data_ptr<T>();
  p.w = w.const_data_ptr<T>();
  p.x = x.mutable_data_ptr<T>();
  describe(p, y, w.sizes().slice(2), codes, groups);
  p.transposed = transposed;
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

template <typename T>
void kernel_gradient_typed(const at::Tensor& x, const at::Tensor& g, at::Tensor& gradient, at::IntArrayRef orders, int64_t groups) {
  const std::vector<int> codes(orders.begin(), orders.end());
  KernelProblem<T> p;
  p.x = x.const_data_ptr<T>();
  p.g = g.const_data_ptr<T>();
  p.gradient = gradient.mutable_data_ptr<T>();
  describe(p, x, gradient.sizes().slice(2), codes, groups);
  kernel_gradient_with(p);
}

at::Tensor kernel_gradient_cpu(const at::Tensor& x, const at::Tensor& g, at::IntArrayRef kernel_size, at::IntArrayRef orders,
                               int64_t groups) {
  TORCH_CHECK(x.dim() == 4 && x.sizes() == g.sizes() && kernel_size.size() == 2 && groups >= 1 && x.size(1) % groups == 0,
              "inv_conv::kernel_gradient: images ", x.sizes(), " and ", g.sizes(), ", kernel size ", kernel_size, ", ", groups,
              " groups");
  at::Tensor gradient =
      at::empty({x.size(1), x.size(1) / groups, kernel_size[0], kernel_size[1]}, x.options().memory_format(at::MemoryFormat::Contiguous));
  check_inputs(x, gradient, orders, groups);
  check_inputs(g, gradient, orders, groups);
  if (x.numel() == 0) return gradient.zero_();
  const at::Tensor image = x.contiguous(), cotangent = g.contiguous();
  if (x.scalar_type() == at::kFloat)
    kernel_gradient_typed<float>(image, cotangent, gradient, orders, groups);
  else
    kernel_gradient_typed<double>(image, cotangent, gradient, orders, groups);
  return gradient;
}

}  // namespace
}  // namespace inv_conv

TORCH_LIBRARY(inv_conv, m) {
  m.def("solve(Tensor y, Tensor w, int[] orders, int groups, bool transposed) -> Tensor");
  m.def("kernel_gradient(Tensor x, Tensor g, int[] kernel_size, int[] orders, int groups) -> Tensor");
  m.def("cpu_solver() -> str", [] { return std::string(inv_conv::isa_name()); });
  m.def("scratch_bytes() -> int", &inv_conv::scratch_bytes);
}

TORCH_LIBRARY_IMPL(inv_conv, CPU, m) {
  m.impl("solve", &inv_conv::solve_cpu);
  m.impl("kernel_gradient", &inv_conv::kernel_gradient_cpu);
}
