"""The Hopper kernels of the backward with a warp that only copies, as ptxas schedules them for 64 slots of D=128."""

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
from flexsparse.compile_passes.templates.hopper_specialized import compilations

found = []
for task in compilations(False):
    if task.config["slots"] != 64 or not task.config.get("split", True):
        continue
    compiled, log = compiled_kernel(task, "sm_90a")
    facts = ptxas_facts(log)
    held = programs(facts["registers"], compiled.metadata.shared, compiled.metadata.num_warps, "sm_90a")
    found.append([task.name, task.config, facts | {"programs": held}, compiled.asm["sass"]])
print(json.dumps(found))
"""
Compiled = tuple[str, dict[str, Any], dict[str, Any], list[str]]
ARRIVES = r"SYNCS\.ARRIVE\.TRANS64\.A1T0"


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
    found = [
        (name, config, facts, sass.splitlines())
        for name, config, facts, sass in json.loads(done.stdout.splitlines()[-1])
    ]
    assert {name for name, *_ in found} == {"hopper_specialized_dq", "hopper_specialized_dkdv"}
    return found


def loop(code: list[str]) -> range:
    """The consumer's loop, from its first product to where it gives a buffer back."""
    (end,) = places(code, ARRIVES)
    return range(min(places(code, "HGMMA")), end + 1)


def within(code: list[str], pattern: str) -> list[int]:
    """Places of the loop's instructions."""
    return [i for i in places(code, pattern) if i in loop(code)]


def test_two_programs_share_an_sm(compiled: list[Compiled]) -> None:
    """128 registers at launch for each of 512 threads; then 24 for those that copy and 232 for those that multiply."""
    for name, config, facts, code in compiled:
        assert facts == {"registers": 128, "spill_bytes": 0, "serialized": False, "programs": 2}, (name, config)
        assert places(code, r"USETMAXREG\.DEALLOC\.CTAPOOL 0x18\b") and places(code, r"USETMAXREG.* 0xe8\b")


def test_weights_are_made_while_the_tensor_cores_work(compiled: list[Compiled]) -> None:
    for name, config, _, code in compiled:
        (half,) = within(code, r"DEPBAR\.LE gsb0, 0x1")
        both, end = within(code, r"DEPBAR\.LE gsb0, 0x0")
        assert len([i for i in within(code, "HGMMA") if i < half]) == 2 * (config["D"] // 16)
        exponentials = within(code, r"MUFU\.EX2")
        assert len(exponentials) == 32 and half < min(exponentials) and both < end
        early = [i for i in exponentials if i < both]
        assert len(early) >= 24, f"{name} {config}: {len(early)} weights are made before the wait"


def test_who_multiplies_neither_copies_nor_stores_and_waits_once_for_the_others(compiled: list[Compiled]) -> None:
    """Of the two barriers of a step one lies before the loop's first product, the other before a buffer is given back."""
    for name, config, _, code in compiled:
        assert not within(code, "UTMALDG") and not within(code, r"\bST(S|SM|G|L)\b|STS\.|STSM")
        assert not within(code, r"LDG") and len(within(code, "LDS")) == (
            16 if name == "hopper_specialized_dkdv" else int(not config["full"])
        )
        (barrier,) = within(code, r"BAR\.SYNC")
        assert max(within(code, r"DEPBAR\.LE gsb0")) < barrier < loop(code)[-1]
