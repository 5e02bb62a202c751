"""Upsampling of images: nearest and bilinear, with gradients."""
