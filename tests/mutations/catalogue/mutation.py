"""What a planted bug is."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """A bug.

    Attributes:
        name: what is wrong.
        file: path in the installed package.
        old: the right code; must occur exactly once in the file.
        new: the wrong code.
        tests: test files or tests, relative to ``tests/``, that are run.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
