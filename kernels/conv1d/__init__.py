"""Convolutions along one dimension, by the two-dimensional kernels."""
