"""`python -m mtserve` is the `mtserve` command."""

from mtserve.cli import main

main()
