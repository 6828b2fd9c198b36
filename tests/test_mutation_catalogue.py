"""The catalogue of planted bugs (`make test-full`) fits the code: each text is there once, each test file exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.catalogue import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]


def source_of(file: str) -> Path:
    """A file of the installed package, in the checkout."""
    top = file.split("/")[0]
    return ROOT / file if top in ("masks", "compile_passes") else ROOT / "flexsparse" / file


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_the_text_is_there_once_and_its_tests_exist(mutation: Mutation) -> None:
    assert source_of(mutation.file).read_text().count(mutation.old) == 1
    assert mutation.old != mutation.new
    for test in mutation.tests:
        assert (ROOT / "tests" / test.split("::")[0]).is_file() or ".py" not in test


def test_names_are_different() -> None:
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)
