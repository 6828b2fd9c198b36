"""Does sparse attention keep quality? A study that anyone can repeat: `python -m bench.study --help`."""
