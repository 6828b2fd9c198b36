"""Examples in the pages and in public docstrings run, but for those that say that they are not run, and why."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import flexsparse as fs

from .pages import PAGES, blocks, read

NOT_RUN = re.compile(r"# not run: \w")
SEVERAL_PROCESSES = {"distributed.md", "finetune.md"}  # tested by tests of their own, in processes of their own
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
OTHERS = ("cli", "compile_passes", "demo", "finetune", "training")  # no library: commands, and what graphs are made of


class Parser(doctest.DocTestParser):
    """Leaves out an example that says ``# not run: why``, and what comes after it in the same docstring."""

    def get_examples(self, string: str, name: str = "<string>") -> list[doctest.Example]:
        found, mark = super().get_examples(string, name), NOT_RUN.search(string)
        for example in found:
            example.options[doctest.SKIP] = mark is not None and example.lineno >= string.count("\n", 0, mark.start())
        return found


def run_doctest(test: doctest.DocTest) -> None:
    """Run examples; what fails is the assertion's text."""
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    runner.run(test, out=said.append, clear_globs=False)
    assert not runner.summarize(verbose=False).failed, "".join(said)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files that examples write go to a folder of their own; packages warn of what is not ours."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("page", [page for page in PAGES if page not in SEVERAL_PROCESSES])
def test_a_page(page: str) -> None:
    """Blocks run one after the other, in one namespace, as a reader would paste them."""
    found = [b for b in blocks(read(page), "python", "pycon") if not NOT_RUN.match(b.text)]
    if any("diffusers" in block.text for block in found):
        pytest.importorskip("diffusers")
    names: dict[str, Any] = {"__name__": "page"}
    for block in found:
        where = f"docs/{page}"
        if block.language == "pycon":
            test = doctest.DocTestParser().get_doctest(block.text, names, where, where, block.line - 1)
            assert test.examples, f"{where}:{block.line}: a pycon block without >>>"
            test.globs = names
            run_doctest(test)
        else:
            tree = ast.increment_lineno(ast.parse(block.text), block.line - 1)
            exec(compile(tree, where, "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_is_code_all_the_same(page: str) -> None:
    for block in blocks(read(page), "python"):
        ast.parse(block.text, f"docs/{page}:{block.line}")


def library() -> Iterator[ModuleType]:
    """Every module that users import; masks/ is elsewhere where the package is installed editable."""
    found = [
        *pkgutil.walk_packages(fs.__path__, "flexsparse."),
        *pkgutil.iter_modules(fs.masks.__path__, "flexsparse.masks."),
    ]
    for name in dict.fromkeys(info.name for info in found):
        if name.split(".")[1] not in OTHERS:
            yield importlib.import_module(name)


def docstrings() -> list[doctest.DocTest]:
    """Every docstring with examples."""
    finder = doctest.DocTestFinder(parser=Parser(), exclude_empty=True)
    found: dict[str, doctest.DocTest] = {}
    for module in (fs, *library()):
        names = {**vars(module), "fs": fs, "torch": torch}
        for test in finder.find(module, module.__name__, module=module, globs=names):
            if test.examples:
                found[test.name] = test
    return list(found.values())


DOCSTRINGS = docstrings()


@pytest.mark.parametrize("test", DOCSTRINGS, ids=[test.name for test in DOCSTRINGS])
def test_a_docstring(test: doctest.DocTest) -> None:
    run_doctest(test)


def test_some_docstrings_have_examples_that_run() -> None:
    """The finder sees masks/ too, whose sources stand elsewhere."""
    running = {test.name for test in DOCSTRINGS if not all(e.options.get(doctest.SKIP) for e in test.examples)}
    assert {"flexsparse.layout.TileLayout", "flexsparse.masks.combine.Union"} <= running
