"""Depthwise convolution: reference, native CPU and Triton kernels."""
