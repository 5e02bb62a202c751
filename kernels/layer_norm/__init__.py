"""Layer and RMS normalization of rows, with a residual and dropout before it."""
