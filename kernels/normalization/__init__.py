"""Batch normalization, and the per-channel sums and affine maps that it is made of."""
