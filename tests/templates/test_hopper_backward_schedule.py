"""The Hopper kernels of dq, dk and dv as ptxas schedules them: no spills, and weights are made while products run."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from .test_hopper_schedule import ROOT, places

pytestmark = pytest.mark.slow  # nothing chooses these kernels yet, and ptxas takes its time

SCRIPT = """
import json
from bench.offline import compiled_kernel, programs, ptxas_facts
from flexsparse.compile_passes.templates.hopper_backward import compilations

found = []
for task in compilations(False):
    compiled, log = compiled_kernel(task, "sm_90a")
    facts = ptxas_facts(log)
    held = programs(facts["registers"], compiled.metadata.shared, task.num_warps, "sm_90a")
    found.append([task.name, task.config, facts | {"programs": held}, compiled.asm["sass"]])
print(json.dumps(found))
"""
Compiled = tuple[str, dict[str, Any], dict[str, Any], list[str]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Kernel, configuration, what ptxas says and instructions; compiled in a process that does not interpret."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=env | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [
        (name, config, facts, sass.splitlines())
        for name, config, facts, sass in json.loads(done.stdout.splitlines()[-1])
    ]


def test_as_many_programs_share_an_sm_as_planned(compiled: list[Compiled]) -> None:
    assert all(facts["spill_bytes"] == 0 and not facts["serialized"] for _, _, facts, _ in compiled)
    held = {
        (name, config["D"], config["full"], config["slots"]): facts["programs"] for name, config, facts, _ in compiled
    }
    both = {(128, True, 64): (2, 2), (128, False, 64): (2, 2), (64, False, 64): (3, 3), (128, False, 128): (2, 2)}
    expected = {("hopper_dq", *key): dq for key, (dq, _) in both.items()}
    assert held == expected | {("hopper_dkdv", *key): dkdv for key, (_, dkdv) in both.items()}


def test_weights_are_made_while_the_tensor_cores_work(compiled: list[Compiled]) -> None:
    for name, config, _, code in compiled:
        one_left, all_done = places(code, r"DEPBAR\.LE gsb0, 0x1"), places(code, r"DEPBAR\.LE gsb0, 0x0")
        assert len(one_left) == 1 and len(all_done) == 2, (
            "a step waits for its logits, for the other product, at its end"
        )
        (half,) = one_left
        end = min(i for i in all_done if i > half)
        products = [i for i in places(code, "HGMMA") if i < half]
        assert len(products) == 2 * (config["D"] // 16), "both products of a step are under way at the first wait"
        steps = config["keys"] if name == "hopper_dq" else config["rows"]
        exponentials = places(code, r"MUFU\.EX2")
        assert len(exponentials) == steps // 2 and min(exponentials) > half
        early = [i for i in exponentials if i < end]
        assert len(early) >= steps // 2 * 3 // 4, f"{name} {config}: {len(early)} weights are made before the wait"


def test_all_warps_are_done_with_a_buffer_before_it_is_copied_into(compiled: list[Compiled]) -> None:
    """A warp waits for its own products; the barrier that tells of the others' is the compiler's to place."""
    for _, _, _, code in compiled:
        waits, barriers = places(code, r"DEPBAR\.LE gsb0"), places(code, r"BAR\.SYNC")
        for copy in (i for i in places(code, "UTMALDG") if i > min(waits)):
            before = max(i for i in waits if i < copy)
            assert any(before < i < copy for i in barriers)


def test_rows_go_through_shared_memory_between_barriers(compiled: list[Compiled]) -> None:
    """dk's loop stores log-sum-exp and delta of a step where the step before has read them, and reads them back."""
    for name, config, _, code in compiled:
        if name != "hopper_dkdv":
            continue
        (half,) = places(code, r"DEPBAR\.LE gsb0, 0x1")
        loads, barriers = places(code, r"\bLDS"), places(code, r"BAR\.SYNC")
        stores = [i for i in places(code, r"\bST(S|SM)\b|STS\.|STSM") if i < half]
        assert len(stores) == 2 and len(loads) == config["rows"] // 4, "two rows a load, of both"
        assert any(max(stores) < i < min(loads) for i in barriers)
        assert any(i < min(stores) and i > max(x for x in places(code, "BRA") if x < min(stores)) for i in barriers)
