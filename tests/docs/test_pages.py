"""What the pages say of models, messages and names is what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import diffusers
import pytest
from models.zoo import NOT_CALLED, ZOO  # tests/ is on the path

import flexsparse as fs
from flexsparse.finetune.families import FAMILIES
from flexsparse.models import KNOWN, Known
from flexsparse.planning.models import KINDS
from flexsparse.wrap import OWN_OPTIONS

from .pages import DOCS, blocks, read, rows

SOURCES = [DOCS.parent / name for name in ("flexsparse", "masks", "compile_passes")]
YES = {True: "yes", False: "no"}
HOLE = "\0"
MESSAGES = [block.text.strip() for block in blocks(read("troubleshooting.md"), "text")]


def spread(kind: str) -> bool:
    """Whether `fs.distributed.ulysses` takes a class without a plan of the user's."""
    about = KNOWN.get(kind, Known())
    return not about.watched_by and bool(about.plan or getattr(getattr(diffusers, kind, None), "_cp_plan", None))


def test_the_table_of_models_is_that_of_the_tests() -> None:
    said = {row["tested as"].strip("`"): row for row in rows(read("models.md"), "model")}
    assert list(said) == list(ZOO)
    for name, entry in ZOO.items():
        first, last = entry.text
        assert said[name] == {
            "model": said[name]["model"],
            "tested as": f"`{name}`",
            "class": f"`{entry.make[0]}`",
            "text": "before the video" if first else "after the video" if last else "none",
            "`compile=True`": YES[entry.whole],
            '`"regional"`': YES[entry.regional],
            "`False`": "yes",  # test_zoo runs each of them uncompiled
            "`ulysses`": YES[spread(entry.make[0])],
            "`finetune`": YES[entry.make[0] in FAMILIES],
            "`plan`": YES[entry.make[0] in KINDS],
            "`inspect`": YES[name not in NOT_CALLED],
        }


def test_the_table_of_models_agrees_with_what_wrap_knows() -> None:
    for row in rows(read("models.md"), "model"):
        about = KNOWN.get(row["class"].strip("`"), Known())
        where = {"first": "before the video", "last": "after the video"}[about.text_at] if about.text else "none"
        assert row["text"] == where
        if about.ragged:
            assert row["`compile=True`"] == row['`"regional"`'] == "no"
    assert all(name.removesuffix("Transformer3DModel") in read("models.md") for name in KNOWN)


def test_knobs_of_the_models_page_are_arguments_of_wrap() -> None:
    import inspect

    text = read("models.md")
    table = text[text.index("## Which layers, which steps") :]
    named = re.findall(r"^\| `(\w+)=", table, re.MULTILINE)
    assert {"dense_layers", "min_tokens", "query_tile", "gates", "fine_gates"} == set(named)
    assert set(named) <= {*inspect.signature(fs.wrap).parameters, *OWN_OPTIONS}


def said_by(path: Path) -> list[str]:
    """The strings of a file, what is filled in marked, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    comments = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(p.value) if isinstance(p, ast.Constant) else HOLE for p in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in comments | inner:
            found.append(node.value)
    return found


SAID = [text for folder in SOURCES for path in sorted(folder.rglob("*.py")) for text in said_by(path)]


@pytest.mark.parametrize("message", MESSAGES, ids=[message[:40] for message in MESSAGES])
def test_a_quoted_message_is_one_of_the_sources(message: str) -> None:
    assert "\n" not in message
    assert len(message.replace("...", "")) > 20, "too short to say anything"
    filled = rf"(?:{HOLE}|\.\.\.)"  # a message may have dots of its own
    exact = re.compile(filled.join(re.escape(part) for part in message.split("...")))
    assert any(exact.search(text) for text in SAID)


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 30 and len(set(MESSAGES)) == len(MESSAGES)


def test_every_public_name_is_on_the_reference() -> None:
    text = read("api.md")
    given = re.findall(r"^\.\. auto(?:class|function|module):: (?:flexsparse\.)?(\S+)$", text, re.MULTILINE)
    assert set(fs.__all__) <= set(given)
    assert {f"distributed.{name}" for name in fs.distributed.__all__} <= set(given)
    assert len(given) == len(set(given))
