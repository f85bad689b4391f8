// The CUDA implementation of the op: the caller's device and stream, no wait for the device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "check_inputs.h"
#include "cuda_solver.h"

namespace inv_conv {
namespace {

template <typename T>
void solve_typed(const wave::Shape& shape, const wave::Orders& orders, const at::Tensor& y, const at::Tensor& w, at::Tensor& x) {
  const int64_t count = workspace_count<T>(shape);
  at::Tensor workspace;
  if (count > 0) workspace = at::empty({count}, y.options());
  C10_CUDA_CHECK(solve_cuda<T>(shape, orders, y.const_data_ptr<T>(), w.const_data_ptr<T>(), x.mutable_data_ptr<T>(),
                               count > 0 ? workspace.mutable_data_ptr<T>() : nullptr, c10::cuda::getCurrentCUDAStream()));
}

at::Tensor solve(const at::Tensor& y, const at::Tensor& w, at::IntArrayRef codes, int64_t groups, bool transposed) {
  check_inputs(y, w, codes, groups);
  TORCH_CHECK(codes.size() <= wave::kMostOrders, "inv_conv::solve: at most ", wave::kMostOrders,
              " groups can have orders of their own on CUDA, not ", codes.size());
  const c10::cuda::CUDAGuard guard(y.device());
  const at::Tensor in = y.contiguous(), kernel = w.contiguous();
  at::Tensor x = at::empty_like(in, at::MemoryFormat::Contiguous);
  if (x.numel() == 0) return x;
  wave::Shape shape;
  shape.batch = static_cast<int>(y.size(0));
  shape.groups = static_cast<int>(groups);
  shape.size = static_cast<int>(y.size(1) / groups);
  shape.height = static_cast<int>(y.size(2));
  shape.width = static_cast<int>(y.size(3));
  shape.kh = static_cast<int>(w.size(2));
  shape.kw = static_cast<int>(w.size(3));
  shape.rows = std::min(shape.kh, shape.height);
  shape.columns = std::min(shape.kw, shape.width);
  shape.transposed = transposed;
  wave::Orders orders{};
  orders.count = static_cast<int>(codes.size());
  for (size_t g = 0; g < codes.size(); ++g) orders.codes[g / 16] |= static_cast<uint32_t>(codes[g]) << (2 * (g % 16));
  if (y.scalar_type() == at::kFloat)
    solve_typed<float>(shape, orders, in, kernel, x);
  else
    solve_typed<double>(shape, orders, in, kernel, x);
  return x;
}

}  // namespace
}  // namespace inv_conv

TORCH_LIBRARY_IMPL(inv_conv, CUDA, m) { m.impl("solve", &inv_conv::solve); }
