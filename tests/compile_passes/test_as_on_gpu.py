"""Compiled graphs whose ops run what they run on a GPU, in Triton's interpreter: outputs and gradients are the definition's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from as_on_gpu import run_templates

import flexsparse as fs

from .lowering_cases import CASES, C, Case, assert_same, definition, run

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the templates on the GPU"),
]
ALL = CASES | {
    "a mass": Case(fs.TopP(mass=0.5)),
    "a share": Case(fs.VSA(sparsity=0.6)),
    "within": Case(fs.VSA(top_k=2, within=fs.SlidingTile(window=(1, 1, 3)))),
    "mass of kept queries": Case(fs.BSA(threshold="mass", mass=0.6, fill="zero")),
}
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "unfused": {"fuse_selection": False},
    "by tables": {"keep_tiles": False},
    "tiled": {"keep_tiles": False, "fold_tiling": False},
}
QUICK = (("partial tiles", ""), ("packed queries", ""), ("a share", "unfused"))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(*both, id=", ".join(filter(None, both)), marks=() if both in QUICK else pytest.mark.slow)
        for both in itertools.product(ALL, WAYS)
    ],
)
def test_the_templates_compute_the_definition(name: str, way: str) -> None:
    case = ALL[name]
    x = torch.randn(2, case.tokens, C)
    with pytest.MonkeyPatch.context() as patch:
        run_templates(patch)
        mine, call = run(case, x, **WAYS[way])
    assert call.lowered, call
    assert_same(mine, definition(case, x))
