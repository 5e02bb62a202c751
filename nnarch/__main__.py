"""`python -m nnarch` is the command `nnarch`."""

from nnarch.cli import main

main()
