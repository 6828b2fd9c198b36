"""What the choice of delta rests on: the table is the file's, and the forms stand as the notes say."""

from __future__ import annotations

import json

import pytest
import torch

from bench import delta

BUILT, ROUNDED = "corrected by the mean key", "rounded output"


def test_the_table_in_the_notes_is_the_file_s() -> None:
    rows = json.loads(delta.RESULTS.read_text())["rows"]
    assert f"{delta.BEGIN}\n{delta.table(rows)}\n{delta.END}" in delta.NOTES.read_text()


@pytest.mark.parametrize("scale", delta.SCALES)
def test_what_is_built_passes_and_the_rounded_output_does_not(scale: float) -> None:
    found = delta.shares(torch.bfloat16, 64, 64, scale, "normal", 0)
    assert found[BUILT] < 1 and found["definition"] < 1
    assert (found[ROUNDED] > 1) == (scale > 1)


def test_only_the_mean_key_stays_with_the_definition_where_keys_have_a_mean() -> None:
    found = delta.shares(torch.bfloat16, 64, 64, 1, "mean", 0)
    assert found[BUILT] < 2 * found["definition"] < found[ROUNDED]
