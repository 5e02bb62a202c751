"""Elementwise activation functions with first and second derivatives."""
