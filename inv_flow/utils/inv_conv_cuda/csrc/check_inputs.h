// What both implementations of the op ask of their inputs.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>

namespace inv_conv {

inline void check_inputs(const at::Tensor& y, const at::Tensor& w, at::IntArrayRef orders, int64_t groups) {
  TORCH_CHECK(y.dim() == 4 && w.dim() == 4, "inv_conv::solve: expected (B, C, H, W) and (C, C/G, kh, kw)");
  TORCH_CHECK(groups >= 1 && y.size(1) % groups == 0 && w.size(0) == y.size(1) && w.size(1) == y.size(1) / groups,
              "inv_conv::solve: kernel ", w.sizes(), " does not fit ", y.size(1), " channels in ", groups, " groups");
  TORCH_CHECK(w.numel() > 0 || y.size(1) == 0, "inv_conv::solve: empty kernel ", w.sizes());
  TORCH_CHECK(orders.size() > 0 && groups % static_cast<int64_t>(orders.size()) == 0, "inv_conv::solve: ", orders.size(),
              " orders for ", groups, " groups");
  for (const int64_t code : orders) TORCH_CHECK(code >= 0 && code < 4, "inv_conv::solve: order code ", code);
  TORCH_CHECK(y.scalar_type() == w.scalar_type(), "inv_conv::solve: image ", y.scalar_type(), ", kernel ", w.scalar_type());
  TORCH_CHECK(w.device() == y.device(), "inv_conv::solve: image on ", y.device(), ", kernel on ", w.device());
  TORCH_CHECK(y.scalar_type() == at::kFloat || y.scalar_type() == at::kDouble, "inv_conv::solve: float32 or float64, not ",
              y.scalar_type());
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  TORCH_CHECK(y.size(0) <= kMost && y.size(2) * y.size(3) <= kMost && w.numel() <= kMost,
              "inv_conv::solve: an axis of ", y.sizes(), " or the kernel ", w.sizes(), " is too large");
}

}  // namespace inv_conv
