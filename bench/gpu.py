"""The templates on a GPU at hand: `python -m bench.gpu --out DIR`. Exit code 1 where a check failed, 2 without CUDA.

Forward, backward and selection of the Triton templates, beside stock FlexAttention on the same lists and dense attention
through cuDNN and FlashAttention 2, all interleaved in one run. A row whose outputs or gradients fail their check has no time.
Rows are written as they come, so that a run cut short keeps what it had.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flexsparse as fs
from bench.header import header

Row = dict[str, Any]
GRIDS = {16384: (16, 32, 32), 32768: (32, 32, 32), 65536: (16, 64, 64)}
TILES = {64: (4, 4, 4), 128: (4, 8, 4)}
DENSE = {"dense_cudnn": SDPBackend.CUDNN_ATTENTION, "dense_fa2": SDPBackend.FLASH_ATTENTION}


def cases() -> list[Row]:
    """Most informative first."""
    found = [{"S": 32768, "D": 128, "slots": 64, "density": 0.1, "dtype": "bfloat16"}]
    found += [
        dict(found[0], **change)
        for change in ({"D": 64}, {"slots": 128}, {"S": 16384}, {"S": 65536}, {"dtype": "float16"})
    ]
    return [{"B": 1, "H": 12, "G": 12, **case} for case in found]


def samples(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each function by CUDA events, all in turn, after two runs that are not timed."""
    for _ in range(2):
        for function in functions.values():
            function()
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end))
    return found


def relative(actual: Tensor, expected: Tensor) -> float:
    """RMS error over RMS."""
    difference = actual.double() - expected.double()
    return float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt())


def run_case(case: Row, repeats: int) -> list[Row]:
    """Rows of forward, training and selection of one case."""
    dtype, S, D = getattr(torch, case["dtype"]), case["S"], case["D"]
    layout = fs.TileLayout(grid=GRIDS[S], tile=TILES[case["slots"]])
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, case["H"], S, D, device="cuda", dtype=dtype) for _ in range(3))
    grad = torch.randn_like(q)
    builder = fs.VSA(sparsity=1 - case["density"])
    selection = builder.select(q, k, layout)

    def training(attend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    def sparse(backend: str, what: Any = selection) -> Callable[..., Tensor]:
        return lambda q, k, v: fs.sparse_attention(q, k, v, layout, what, backend=backend)

    def dense(kind: SDPBackend) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return scaled_dot_product_attention(q, k, v)

        return attend

    wide = {"gather": [x.float() for x in training(sparse("gather"))]}
    candidates = {"flexsparse": sparse("triton"), f"flex_{case['slots']}": sparse("flex")}
    candidates |= {name: dense(kind) for name, kind in DENSE.items()}
    rows, forward, both = [], {}, {}
    for name, attend in candidates.items():
        errors, reason = {}, None
        try:
            found = training(attend)
            if not name.startswith("dense"):
                errors = {n: relative(a, b) for n, a, b in zip(("out", "dq", "dk", "dv"), found, wide["gather"])}
        except Exception as error:  # a baseline that does not run is a row that says why
            reason = " ".join(str(error).split())[:300]
        checked = reason is None and all(error < 0.02 for error in errors.values())
        if checked:
            forward[name] = lambda attend=attend: attend(q, k, v)
            both[name] = lambda attend=attend: training(attend)
        rows += [
            {**case, "op": op, "impl": name, "error": errors, "checked": checked, "reason": reason}
            for op in ("attention_forward", "attention_training")
        ]
    with torch.no_grad():
        timed = {"attention_forward": samples(forward, repeats)}
    timed["attention_training"] = samples(both, repeats)
    pairs = float(selection.density) * S * S * case["H"]
    for row in rows:
        ms = timed[row["op"]].get(row["impl"])
        amount = S * S * case["H"] if row["impl"].startswith("dense") else pairs
        flops = (4 if row["op"] == "attention_forward" else 14) * amount * D
        row |= {"ms": ms, "tflops": None if ms is None else flops / (sorted(ms)[len(ms) // 2] * 1e9)}
    with torch.no_grad():
        choose = samples({"flexsparse": lambda: builder.select(q, k, layout)}, repeats)
    rows.append({**case, "op": "select", "impl": "flexsparse", "ms": choose["flexsparse"], "checked": True})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, write; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="directory of the result file"
    )
    parser.add_argument("--minutes", type=float, default=9, help="start no further case after this (default: 9)")
    parser.add_argument("--repeats", type=int, default=20, help="samples of each row (default: 20)")
    parser.add_argument("--skip-tests", action="store_true", help="do not run tests/gpu first")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu needs a CUDA device; without one: python -m bench.kernels --offline", file=sys.stderr)
        return 2
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    passed = None
    if not options.skip_tests:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/gpu"]
        passed = subprocess.run(command, check=False, timeout=options.minutes * 30).returncode == 0
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    head = header(1, repeats=options.repeats, tests_passed=passed)
    head |= {"gpu": torch.cuda.get_device_name(), "driver": driver, "cudnn": torch.backends.cudnn.version()}
    rows: list[Row] = []
    for case in cases():
        if time.monotonic() - started > options.minutes * 60:
            break
        rows += run_case(case, options.repeats)
        text = json.dumps({"header": head, "rows": rows}).replace(', {"B"', ',\n{"B"')
        (options.out / "gpu.json").write_text(text + "\n")
        for row in rows[-9:]:
            ms = "failed" if not row["ms"] else f"{sorted(row['ms'])[len(row['ms']) // 2]:.3f} ms"
            print(
                f"S={row['S']} D={row['D']} slots={row['slots']} {row['op']} {row['impl']}: {ms} {row.get('reason') or ''}"
            )
    return 0 if passed is not False and all(row["checked"] for row in rows if row["impl"] == "flexsparse") else 1


if __name__ == "__main__":
    sys.exit(main())
