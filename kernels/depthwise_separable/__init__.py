"""depthwise-separable convolution: reference, native CPU and Triton kernels."""
