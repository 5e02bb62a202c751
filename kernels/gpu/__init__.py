"""What the GPU kernels share: launching, tiles, targets, epilogue, compiling ahead of time."""
