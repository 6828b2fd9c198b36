"""The Hopper forwards as ptxas schedules them: what a kernel asks for may still be moved, and then nothing overlaps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # nothing chooses these kernels yet, and ptxas takes its time
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json
from bench.offline import compiled_kernel
from flexsparse.compile_passes.templates.MODULE import compilations

tasks = compilations(False)
print(json.dumps([[task.config, compiled_kernel(task, "sm_90a")[0].asm["sass"]] for task in tasks]))
"""


Code = list[tuple[dict[str, Any], list[str]]]


@pytest.fixture(scope="module")
def forwards(tmp_path_factory: pytest.TempPathFactory) -> Code:
    """Of the forward."""
    return machine_code(tmp_path_factory.mktemp("forward"), "hopper_forward")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Code:
    """Of the forward by pairs."""
    return machine_code(tmp_path_factory.mktemp("pairs"), "hopper_pairs")


def machine_code(folder: Path, module: str) -> Code:
    """Configurations and instructions; compiled in a process that does not interpret."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("MODULE", module)],
        cwd=ROOT,
        env=env | {"TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [(config, sass.splitlines()) for config, sass in json.loads(done.stdout.splitlines()[-1])]


def places(code: list[str], pattern: str) -> list[int]:
    """Numbers of the instructions that match."""
    return [i for i, line in enumerate(code) if re.search(pattern, line)]


def assert_all_warps_are_done(code: list[str], pattern: str) -> None:
    """A warp waits for its own products; before what gives a buffer away lies a barrier that tells of the others' too."""
    waits, barriers = places(code, r"DEPBAR\.LE gsb0"), places(code, r"BAR\.SYNC")
    given_away = [i for i in places(code, pattern) if i > min(waits)]
    assert given_away
    for place in given_away:
        before = max(i for i in waits if i < place)
        assert any(before < i < place for i in barriers)


def test_all_warps_are_done_with_a_buffer_before_it_is_copied_into(forwards: Code) -> None:
    """The compiler places that barrier, and no simulator can know."""
    for _, code in forwards:
        assert_all_warps_are_done(code, "UTMALDG")


def test_all_warps_of_a_consumer_are_done_with_a_buffer_before_it_is_given_back(pairs: Code) -> None:
    for _, code in pairs:
        assert_all_warps_are_done(code, r"SYNCS\.ARRIVE\.TRANS64\.A1T0")
        assert_all_warps_are_done(code, r"UTMASTG")


def test_weights_are_made_while_the_tensor_cores_work(forwards: Code) -> None:
    for config, code in forwards:
        all_done, one_left = places(code, r"DEPBAR\.LE gsb0, 0x0"), places(code, r"DEPBAR\.LE gsb0, 0x1")
        assert len(one_left) == 1 and len(all_done) == 3, "a product is waited for alone, in the loop, and at the end"
        (half,) = one_left
        start, end = max(i for i in all_done if i < half), min(i for i in all_done if i > half)
        products = [i for i in places(code, "HGMMA") if start < i < end]
        assert len(products) == config["D"] // 16 + config["keys"] // 16 and max(products) < half, (
            "both products of a step are under way at the first wait"
        )
        exponentials = [i for i in places(code, r"MUFU\.EX2") if half < i < end]
        assert len(exponentials) == config["keys"] // 2 + 2, "all of a step's, while its values are multiplied"
        copies = [i for i in places(code, "UTMALDG") if half < i < end]
        assert len(copies) == (config["stages"] == 1), "keys are copied as soon as their buffer is free"
        assert all(i < min(exponentials) for i in copies)
        rescaling = [i for i in places(code, r"\bFMUL") if products[config["D"] // 16 - 1] < i < half]
        assert len(rescaling) > config["D"] // 2 - 8, "the output is rescaled while keys are multiplied"


def test_both_consumers_of_a_pair_overlap_products_and_weights(pairs: Code) -> None:
    for config, code in pairs:
        all_done, one_left = places(code, r"DEPBAR\.LE gsb0, 0x0"), places(code, r"DEPBAR\.LE gsb0, 0x1")
        assert len(one_left) == 2, "in the loop of each consumer"
        for half in one_left:
            start, end = max(i for i in all_done if i < half), min(i for i in all_done if i > half)
            products = [i for i in places(code, "HGMMA") if start < i < half]
            of_keys, of_values = products[: config["D"] // 16], products[config["D"] // 16 :]
            assert len(of_values) == 4, "both products of a step are under way at the first wait"
            polls = [i for i in places(code, "SYNCS.PHASECHK") if start < i < end]
            assert any(of_keys[-1] < i < of_values[0] for i in polls), "values are waited for while keys are multiplied"
            exponentials = [i for i in places(code, r"MUFU\.EX2") if half < i < end]
            assert len(exponentials) == 64 // 2 + 2, "all of a step's, while its values are multiplied"
            assert any(max(exponentials) < i < end for i in polls), "the next keys are waited for meanwhile"
            if config["full"]:  # with partial tiles and extra tokens ptxas has one consumer rescale before it starts
                rescaling = [i for i in places(code, r"\bFMUL") if of_keys[-1] < i < of_values[0]]
                assert len(rescaling) > config["D"] // 2 - 8, "the output is rescaled while keys are multiplied"
            released = [i for i in places(code, r"SYNCS\.ARRIVE") if i > end]
            assert released and not any(end < i < released[0] for i in places(code, "HGMMA")), (
                "a buffer is given back at once"
            )
