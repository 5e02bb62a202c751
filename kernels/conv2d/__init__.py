"""conv2d: reference, native CPU and Triton kernels."""
