"""`python -m megakor`: the `megakor` command."""

from megakor.cli import main

main()
