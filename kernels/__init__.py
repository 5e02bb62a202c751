"""Every hand-written kernel, one folder an operation family. README.md shows the anatomy."""
