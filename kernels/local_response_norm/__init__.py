"""Local response normalization: every channel divided by a power of its neighbours' energy."""
