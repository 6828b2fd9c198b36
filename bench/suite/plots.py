"""Figures of result rows; each is drawn only where there are rows for it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.suite.cases import OURS
from bench.suite.measures import WHOLE, File, Group, groups, not_run, ratio
from bench.suite.rows import Row, median

DENSE = "dense_cudnn"
SIZE = {"float32": 4}
"""Bytes of a number; 2 for all other dtypes."""


def speedups(files: Sequence[File]) -> list[tuple[Row, float]]:
    """Whole attentions (VSA) and how many times faster than cuDNN they are."""
    found = []
    for group in groups(files):
        for op in WHOLE:
            own, dense = group.best(op, OURS), group.best(op, DENSE)
            if own is not None and dense is not None and own["method"] == "vsa":
                found.append((own, ratio(dense["ms"], own["ms"])))
    return found


def against(files: Sequence[File], x: Callable[[Row], float], keep: Callable[[Row], bool], ax: Any) -> bool:
    """Speed-up against something, a line for each op."""
    drawn = False
    for op in WHOLE:
        points = sorted({(x(row), value) for row, value in speedups(files) if row["op"] == op and keep(row)})
        if points:
            ax.plot(*zip(*points), marker="o", label=op.replace("_", " "))
            drawn = True
    ax.set_ylabel("times faster than dense cuDNN")
    if drawn:
        ax.legend()
    ax.set_ylim(bottom=0)
    return drawn


def density(files: Sequence[File], ax: Any) -> bool:
    """Speed-up against density, D=128, 32k tokens."""
    ax.set_xlabel("density (share of pairs computed), 32k tokens")
    return against(files, lambda row: row["density"], lambda row: row["S"] == 32768 and row["D"] == 128, ax)


def length(files: Sequence[File], ax: Any) -> bool:
    """Speed-up against tokens, density 0.1."""
    ax.set_xlabel("tokens, density 0.1")
    return against(files, lambda row: row["S"], lambda row: abs(row["density"] - 0.1) < 0.01 and row["D"] == 128, ax)


def intensity(row: Row) -> float:
    """Operations a byte of device memory, q, k, v read and the output written once."""
    return row["flops"] / (4 * row["B"] * row["H"] * row["S"] * row["D"] * SIZE.get(row["dtype"], 2))


def roofline(files: Sequence[File], ax: Any) -> bool:
    """Rates of the fine stage under the ceilings that the same files measured."""
    every = list(groups(files))
    matmul, copy = (
        next((row for g in every if (row := g.best("ceiling", "torch", part))), None) for part in ("matmul", "copy")
    )
    points: dict[str, list[tuple[float, float]]] = {}
    for group in every:
        for row in group.rows:
            if row["op"] == "fine_forward" and row["ms"] and row["tflops"]:
                points.setdefault(row["impl"], []).append((intensity(row), row["tflops"]))
    if matmul is None or copy is None or not points:
        return False
    top, slope = matmul["tflops"], copy["bytes"] / statistics.median(copy["ms"]) / 1e9  # TFLOPS, TB/s
    right = 2 * max(x for some in points.values() for x, _ in some)
    xs = sorted({top / slope / 8, top / slope, max(right, 2 * top / slope)})
    ax.plot(xs, [min(top, x * slope) for x in xs], color="black", label="measured ceilings: matrix product, copy")
    for name, some in points.items():
        ax.plot(*zip(*some), marker="o", linestyle="", label=name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("operations a byte of device memory")
    ax.set_ylabel("TFLOPS on selected tiles")
    ax.legend(fontsize=7)
    return True


def pieces(group: Group) -> dict[str, float] | None:
    """Milliseconds of one attention call by piece; None where it was not taken apart. ``rest`` may be negative: pieces that
    are timed alone do not overlap."""
    best = group.best("attention_forward", OURS)
    group = group if best is None else group.like(best)

    def ms(op: str, part: str | None) -> float | None:
        if not_run(group, op, part):
            return 0.0
        row = group.best(op, OURS, part)
        return None if row is None else median(row)

    names = {
        "tiling": ("attention_forward", "tiling"),
        "selection": ("select", None),
        "lists": ("attention_forward", "lists"),
    }
    found = {name: ms(*where) for name, where in names.items()}
    fine, combine, whole = (ms("attention_forward", part) for part in ("fine", "combine", None))
    combine = combine if combine is not None else ms("attention_forward", "untile")
    if fine is None or combine is None or whole is None or None in found.values():
        return None
    known = {name: value for name, value in found.items() if value is not None}
    known |= {"fine stage": fine - known["lists"], "way back, gate": combine}
    return known | {"rest": whole - sum(known.values())}


def split(files: Sequence[File], ax: Any) -> bool:
    """Time split of one attention call, a bar a case."""
    bars = {group.case: found for group in groups(files) if (found := pieces(group)) is not None}
    left = dict.fromkeys(bars, 0.0)
    for name in next(iter(bars.values()), {}):
        widths = [max(found[name], 0.0) for found in bars.values()]
        ax.barh(list(bars), widths, left=list(left.values()), label=name)
        left = {case: at + width for (case, at), width in zip(left.items(), widths)}
    ax.set_xlabel("ms")
    if bars:
        ax.legend(fontsize=7)
    return bool(bars)


FIGURES: dict[str, Callable[[Sequence[File], Any], bool]] = {
    "speedup_density": density,
    "speedup_length": length,
    "roofline": roofline,
    "time_split": split,
}


class _Nothing:
    """Takes the place of axes where it only counts whether something would be drawn."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def wanted(files: Sequence[File]) -> list[str]:
    """Names of the figures that there are rows for."""
    return [name for name, function in FIGURES.items() if function(files, _Nothing())]


def draw(files: Sequence[File], folder: Path) -> list[Path]:
    """Write the figures that there are rows for, and remove those that there are none for.

    Returns:
        Their paths. None without matplotlib, which only this needs.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no figures: matplotlib is not installed")
        return []
    made = []
    for name, function in FIGURES.items():
        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        path = folder / f"{name}.png"
        if function(files, figure.add_subplot()):
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120, metadata={"Software": None})
            made.append(path)
        else:
            path.unlink(missing_ok=True)
    return made
