"""Which way to delta = sum(P * dP) keeps the gradients within tolerance: `python -m bench.delta`.

Simulates the backward's rounding in plain torch on a CPU and writes bench/results/delta.json and the table of NOTES.md
("Delta"). A row's `share` is the largest error of dq and dk over what tests/tolerance.py allows: up to 1 passes.
Shape letters: R query rows, T keys, D head dim.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor

from bench.header import ROOT, header
from bench.marks import replaced

RESULTS, NOTES = ROOT / "bench" / "results" / "delta.json", ROOT / "bench" / "NOTES.md"
BEGIN, END = "<!-- delta -->", "<!-- /delta -->"
CASES = ((torch.bfloat16, 64, 64), (torch.bfloat16, 128, 512), (torch.float16, 64, 64))
SCALES = (1, 4, 8, 16)
ROWS = 128
MEAN = 4.0
"""Of keys and values, over their spread, for data "mean"."""


def share(actual: Tensor, reference: Tensor, oracle: Tensor) -> float:
    """Error over the allowed one, in RMS or in the maximum: twice the reference's and a rounding band."""
    eps = torch.finfo(actual.dtype).eps
    off, other = (x.double() - oracle for x in (actual, reference))
    rms = lambda x: float(x.square().mean().sqrt())  # noqa: E731
    band = 2 * rms(other) + eps / 8 * rms(oracle), 2 * float(other.abs().max()) + eps / 2 * float(oracle.abs().max())
    return max(rms(off) / band[0], float(off.abs().max()) / band[1])


def finer(out: Tensor, dtype: torch.dtype, bits: int) -> Tensor:
    """The output rounded to a type with some bits more."""
    near = out.to(dtype).float()
    unit = 2.0 ** torch.floor(torch.log2(near.abs().clamp_min(1e-30))) * torch.finfo(dtype).eps / 2**bits
    return near + ((out - near) / unit).round() * unit


def shares(dtype: torch.dtype, D: int, T: int, scale: float, data: str, seed: int) -> dict[str, float]:
    """The share of each form on one problem."""
    random = torch.Generator().manual_seed(seed)
    q, k, v, g = (torch.randn(n, D, generator=random) * scale for n in (ROWS, T, T, ROWS))
    if data == "mean":
        k, v = (x + MEAN * scale * torch.randn(1, D, generator=random) for x in (k, v))
    q, k, v, g = (x.to(dtype) for x in (q, k, v, g))
    factor = D**-0.5
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = torch.softmax(leaves[0] @ leaves[1].T * factor, -1) @ leaves[2]
    oracle = torch.autograd.grad((out * g.double()).sum(), leaves[:2])

    def low(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    q, k, v, g = (x.float() for x in (q, k, v, g))
    logits = q @ k.T * factor
    top = logits.amax(-1, keepdim=True)
    raw = (logits - top).exp()
    total = raw.sum(-1, keepdim=True)
    out = low(raw) @ v / total
    P, dP = (logits - top - total.log()).exp(), g @ v.T
    exact = (P * dP).sum(-1, keepdim=True)
    d_logits = P * (dP - exact) * factor
    reference = (d_logits @ k).to(dtype), (d_logits.T @ q).to(dtype)

    def gradients(start: Tensor, delta: Tensor, less: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        dq = (low(P * (dP - start)) @ k - less) * factor
        return dq.to(dtype), (low(P * (dP - delta)).T @ q * factor).to(dtype)

    estimate = (g * low(out)).sum(-1, keepdim=True)
    bits = (g * finer(out, dtype, 3)).sum(-1, keepdim=True)
    missing = (P * (dP - estimate)).sum(-1, keepdim=True)
    found = {
        "definition": gradients(exact, exact),
        "rounded output": gradients(estimate, estimate),
        "output with three more bits": gradients(bits, bits),
        "corrected by the key of the largest weight": gradients(
            estimate, estimate + missing, missing * k[P.argmax(-1)]
        ),
        "corrected by the mean key": gradients(estimate, estimate + missing, missing * (low(P) @ k)),
    }
    return {name: max(map(share, made, reference, oracle)) for name, made in found.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """The worst share of each form by data and scale, in Markdown."""
    lines = [
        "| data | delta | " + " | ".join(f"scale {scale}" for scale in SCALES) + " |",
        "|---" * (2 + len(SCALES)) + "|",
    ]
    for data, form in dict.fromkeys((row["data"], row["form"]) for row in rows):
        own = [row for row in rows if (row["data"], row["form"]) == (data, form)]
        worst = [max(row["share"] for row in own if row["scale"] == scale) for scale in SCALES]
        lines.append(f"| {data} | {form} | " + " | ".join(f"{x:.2f}" for x in worst) + " |")
    return "\n".join(lines)


def main() -> int:
    """Write the file and the table."""
    argparse.ArgumentParser(prog="python -m bench.delta", description=__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    for data in ("normal", "mean"):
        for dtype, D, T in CASES:
            for scale in SCALES:
                made = [shares(dtype, D, T, scale, data, seed) for seed in range(3 if T == 64 else 1)]
                problem = {"data": data, "dtype": str(dtype)[6:], "R": ROWS, "T": T, "D": D, "scale": scale}
                rows += [{**problem, "form": form, "share": round(max(m[form] for m in made), 3)} for form in made[0]]
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = '{"header": ' + json.dumps(header(torch.get_num_threads()), indent=1) + ',\n"rows": [\n' + lines + "\n]}\n"
    RESULTS.write_text(text)
    NOTES.write_text(replaced(NOTES.read_text(), table(rows), BEGIN, END))
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
