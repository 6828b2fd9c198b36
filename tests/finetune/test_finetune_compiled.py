"""Compiled training: the same curve, and annealing compiles nothing again."""

import pytest
import torch

from finetune.tiny import tuned


@pytest.mark.parametrize(
    ("how", "others"),
    [
        ("whole", {}),
        pytest.param("regional", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("whole", {"method": "bsa"}, marks=pytest.mark.slow),
        pytest.param("whole", {"lora_rank": 2, "bf16": True}, marks=pytest.mark.slow),
    ],
)
def test_annealing_compiles_once_and_gives_the_curve_of_the_uncompiled_run(tmp_path, fresh_dynamo, how, others):
    from torch._dynamo.utils import counters

    counters.clear()
    graphs = []
    compiled = tuned(
        tmp_path / "compiled",
        lambda done: graphs.append(counters["stats"]["unique_graphs"]),
        compile=how,
        wrap={"inner": "aot_eager"},
        **others,
    )
    assert graphs[0] > 0 and graphs == [graphs[0]] * 6, "validation neither"
    assert compiled.curves.sparsity == [0.0, 0.25, 0.5, 0.5, 0.5, 0.5]
    torch._dynamo.reset()
    eager = tuned(tmp_path / "eager", **{**others, "gradient_checkpointing": False})
    assert compiled.curves.loss == pytest.approx(eager.curves.loss, rel=2e-2 if "bf16" in others else 1e-4)
    assert compiled.curves.held_out[-1]["losses"] == pytest.approx(eager.curves.held_out[-1]["losses"], rel=2e-2)
