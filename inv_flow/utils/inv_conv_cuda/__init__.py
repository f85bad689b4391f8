"""The inverse of a masked convolution as a torch operator: CPU and CUDA solvers, and one in library calls."""

from inv_flow.utils.inv_conv_cuda.geometry import ORDERS, kernel_mask
from inv_flow.utils.inv_conv_cuda.ops import available_backends, inverse_conv2d, masked_conv2d
from inv_flow.utils.inv_conv_cuda.reference import inverse_conv2d_ref

__all__ = ["ORDERS", "available_backends", "inverse_conv2d", "inverse_conv2d_ref", "kernel_mask", "masked_conv2d"]
