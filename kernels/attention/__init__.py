"""Scaled dot-product attention: reference, native CPU and Triton kernels."""
