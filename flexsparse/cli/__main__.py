"""`python -m flexsparse.cli`."""

from flexsparse.cli import main

main()
