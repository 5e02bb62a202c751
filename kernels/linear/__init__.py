"""linear: reference, native CPU and Triton kernels."""
