"""`python -m sage_fed.cli`: the same as the `sage-fed` script."""

from sage_fed.cli import main

main()
