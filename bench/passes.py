"""What the compiler passes are worth on CPU: `python -m bench.passes`. Exit code 1 where a correctness check failed.

Two questions, each answered side by side in one run: a training step of a wrapped tiny Wan, with all passes, with tokens
in raster order between attentions, with none of the three, and dense, all compiled; and the share of an attention's time
that the selection takes, fused against unfused.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flexsparse as fs
from bench.header import header
from bench.marks import replaced
from bench.table import x_by
from bench.timing import interleaved

RESULTS = Path(__file__).parent / "results" / "passes.json"
PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- bench:passes -->", "<!-- /bench:passes -->"
WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}
SPARSITY = 0.875
TOKENS = {"4k": (16, 16, 16), "16k": (16, 32, 32), "64k": (16, 64, 64)}
Row = dict[str, Any]


def wan() -> nn.Module:
    """A tiny Wan with random weights, always the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import WanTransformer3DModel

        torch.manual_seed(0)
        return WanTransformer3DModel(**WAN)


def training_steps(grid: tuple[int, int, int]) -> tuple[dict[str, Callable[[], Any]], dict[str, nn.Module]]:
    """A compiled training step (forward, backward) of each kind, on the same latents."""
    T, H, W = grid
    inputs = (torch.randn(1, 4, T, 2 * H, 2 * W), torch.tensor([500]), torch.randn(1, 16, 32))
    plain = {"fuse_selection": False, "lower_flex": False, "keep_tiles": False}
    models = {
        "fused": fs.wrap(wan(), fs.VSA(sparsity=SPARSITY), gates=True, fullgraph=True),
        "raster": fs.wrap(wan(), fs.VSA(sparsity=SPARSITY), gates=True, fullgraph=True, keep_tiles=False),
        "unfused": fs.wrap(wan(), fs.VSA(sparsity=SPARSITY), gates=True, fullgraph=True, **plain),
        "dense": torch.compile(wan(), fullgraph=True),
    }

    def step(model: Any) -> Tensor:
        model.zero_grad()
        loss = model(*inputs, return_dict=False)[0].square().mean()
        loss.backward()
        return loss.detach()

    return {name: lambda model=model: step(model) for name, model in models.items()}, models  # type: ignore[misc]


def step_rows(grid: tuple[int, int, int], repeats: int) -> list[Row]:
    """Rows of the training step; the sparse ones must agree in loss and gradients."""
    steps, models = training_steps(grid)
    sparse = ("fused", "raster", "unfused")
    with torch.no_grad():
        for name in sparse:
            for parameter in fs.gate_parameters(models[name]):
                parameter.fill_(0.05)
    losses = {name: float(step()) for name, step in steps.items()}
    *grads, plain = (torch.cat([p.grad.flatten() for p in models[name].parameters()]) for name in sparse)  # type: ignore[union-attr]
    error = max(float((grad - plain).norm() / plain.norm()) for grad in grads)
    checked = error < 1e-4 and all(abs(losses[name] - losses["unfused"]) < 1e-5 for name in sparse)
    calls = [call for call in fs.report(models["fused"]).calls if call.sparse]
    checked &= bool(calls) and all(call.fused and call.lowered for call in calls)
    samples = interleaved(steps, repeats) if checked else {}
    size = {"B": 1, "H": 4, "G": 4, "S": T_H_W(grid), "D": 64, "grid": grid, "tile": (4, 4, 4)}
    return [
        {
            "op": "model_step",
            "impl": name,
            **size,
            "density": 1.0 if name == "dense" else round(1 - SPARSITY, 4),
            "dtype": "float32",
            "ms": samples.get(name),
            "error": {"gradients": error},
            "checked": checked,
        }
        for name in steps
    ]


def T_H_W(grid: tuple[int, int, int]) -> int:
    """Tokens of a grid."""
    T, H, W = grid
    return T * H * W


def selection_rows(grid: tuple[int, int, int], repeats: int) -> list[Row]:
    """Rows of the coarse stage alone and of the whole attention, coarse output included."""
    layout = fs.TileLayout(grid=grid)
    q, k, v = torch.randn(3, 1, 2, layout.seq_len, 64).unbind()
    tiles = [layout.video(layout.to_tiles(x)) for x in (q, k, v)]
    gate = torch.full_like(q, 0.1)
    builder = fs.VSA(sparsity=SPARSITY)

    def coarse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = fs.masks.CoarseInputs(q, k, layout, layout, 64**-0.5)
        selection, out = builder.plan(inputs, v)
        assert out is not None
        return selection.bits, selection.counts, out

    unfused = torch.compile(coarse, fullgraph=True, dynamic=False)
    functions: dict[str, Callable[[], Any]] = {
        "fused": lambda: coarse(*tiles),  # uncompiled, the fused op runs
        "unfused": lambda: unfused(*tiles),
        "attention": lambda: fs.sparse_attention(q, k, v, layout, builder, gate=gate),
    }
    with torch.no_grad():
        a, b = functions["fused"](), functions["unfused"]()
        kept = float((fs.TileSelection.from_mask(_keep(a, layout), layout).counts == a[1]).double().mean())
        same = float((_keep(a, layout) == _keep(b, layout)).double().mean())  # scores may round apart at the threshold
        error = float((a[2] - b[2]).abs().max())
        checked = kept == 1 and same > 0.9999 and error < 1e-4
        samples = interleaved(functions, repeats) if checked else {}
    size = {"B": 1, "H": 2, "G": 2, "S": layout.seq_len, "D": 64, "grid": grid, "tile": (4, 4, 4)}
    return [
        {
            "op": "attention_forward" if name == "attention" else "select",
            "impl": name,
            **size,
            "density": round(1 - SPARSITY, 4),
            "dtype": "float32",
            "ms": samples.get(name),
            "error": {"coarse": error, "same_choice": same},
            "checked": checked,
        }
        for name in functions
    ]


def _keep(found: tuple[Tensor, Tensor, Tensor], layout: fs.TileLayout) -> Tensor:
    selection = fs.TileSelection(bits=found[0], counts=found[1], layout=layout, kv_layout=layout, capacity=1)
    return selection.keep()


def ratio(rows: dict[str, Row], above: str, below: str) -> str:
    """Median ratio of neighbouring samples, as text; a dash where a check failed."""
    if not (rows[above]["checked"] and rows[below]["checked"]):
        return "-"
    return f"{statistics.median(a / b for a, b in zip(rows[above]['ms'], rows[below]['ms'])):.3g}"


def table(result: dict[str, Any]) -> str:
    """The Markdown between the marks of `bench/README.md`."""
    head = result["header"]
    lines = [
        f"{head['cpu']} ({head['cpu_capability']}), {head['threads']} thread, torch {head['torch']}, float32, VSA at density "
        f"{1 - SPARSITY}, medians of {head['repeats']} interleaved runs, {head['date'][:10]}.",
        "",
        "| training step of a tiny Wan, compiled | dense / all passes | dense / none | none / all | raster order / all |",
        "|---|---|---|---|---|",
    ]
    for grid in dict.fromkeys(tuple(row["grid"]) for row in result["rows"] if row["op"] == "model_step"):
        rows = {row["impl"]: row for row in result["rows"] if row["op"] == "model_step" and tuple(row["grid"]) == grid}
        pairs = (("dense", "fused"), ("dense", "unfused"), ("unfused", "fused"), ("raster", "fused"))
        cells = tuple(ratio(rows, *pair) for pair in pairs)
        lines.append(f"| {x_by(grid)} = {rows['fused']['S']:,} tokens | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| selection (pooling, scores, coarse output, choice) | share of attention, fused | unfused | unfused / fused |",
        "|---|---|---|---|",
    ]
    for grid in dict.fromkeys(tuple(row["grid"]) for row in result["rows"] if row["op"] == "select"):
        rows = {row["impl"]: row for row in result["rows"] if row["op"] != "model_step" and tuple(row["grid"]) == grid}
        cells = (
            ratio(rows, "fused", "attention"),
            ratio(rows, "unfused", "attention"),
            ratio(rows, "unfused", "fused"),
        )
        lines.append(f"| {x_by(grid)} = {rows['fused']['S']:,} tokens | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def publish(result: dict[str, Any]) -> None:
    """Put the table between the marks of `bench/README.md`."""
    PAGE.write_text(replaced(PAGE.read_text(), table(result), BEGIN, END))


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write the file and the table; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.passes", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: bench/results/passes.json)")
    parser.add_argument("--repeats", type=int, default=7, help="samples of each row (default: 7)")
    parser.add_argument("--only", choices=("step", *TOKENS), nargs="+", default=["step", *TOKENS], help="parts to run")
    parser.add_argument("--table", action="store_true", help="write the table from the result file, run nothing")
    options = parser.parse_args(argv)
    if options.table:
        publish(json.loads(options.out.read_text()))
        return 0
    torch.set_num_threads(1)
    head = header(1, repeats=options.repeats, parts=options.only)
    rows: list[Row] = []
    for part in options.only:
        print(part, file=sys.stderr, flush=True)
        if part == "step":
            rows += step_rows((8, 16, 16), options.repeats) + step_rows((16, 16, 32), options.repeats)
        else:
            rows += selection_rows(TOKENS[part], options.repeats if part != "64k" else max(3, options.repeats // 2))
    for row in rows:
        if not row["checked"]:
            print(f"{row['op']} {row['impl']} {row['grid']} FAILED its check: {row['error']}", file=sys.stderr)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"header": head, "rows": rows}, indent=None)
    options.out.write_text(text.replace(', {"op"', ',\n{"op"') + "\n")
    if options.out == RESULTS:
        publish({"header": head, "rows": rows})
    return 0 if all(row["checked"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
