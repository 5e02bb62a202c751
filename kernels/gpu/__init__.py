"""What the GPU kernels share: launching, tile tables, targets, epilogue, ahead-of-time compiling."""
