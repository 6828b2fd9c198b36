"""A plan as a picture: time of a step against density, or against GPUs. Matplotlib's objects, without pyplot."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from flexsparse.masks import BSA, VSA
from flexsparse.planning.counting import PlanError
from flexsparse.planning.measured import Measured
from flexsparse.planning.plan import Plan, evaluate
from flexsparse.planning.settings import Settings
from flexsparse.planning.shares import assumed

DENSITIES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
COLOURS = {"dense": "#3b3b3b", "VSA": "#0b6fb8", "BSA": "#c9510c"}
AGAINST = ("density", "gpus")


def over_density(settings: Settings, measured: Measured) -> list[Plan]:
    """Plans of other densities of KV tiles."""
    builders: list[VSA | BSA] = []
    for density in DENSITIES:
        if isinstance(settings.builder, BSA):
            builders.append(dataclasses.replace(settings.builder, kv_density=density))
        else:
            builders.append(dataclasses.replace(settings.builder, top_k=None, sparsity=1 - density))
    return [evaluate(dataclasses.replace(settings, builder=builder), measured) for builder in builders]


def over_gpus(settings: Settings, measured: Measured) -> list[Plan]:
    """Plans with 1, 2, 4, ... GPUs that share one sequence and the weights, up to one a head."""
    heads = min(call.heads for call in measured.sparse.sparse)
    counts = [2**i for i in range(heads.bit_length()) if 2**i <= heads]
    return [evaluate(dataclasses.replace(settings, gpus=n, ulysses=n, fsdp=n), measured) for n in counts]


def draw(plans: Sequence[Plan], against: str) -> Figure:
    """Time of a step and of its communication.

    Raises:
        PlanError: against something unknown.
    """
    if against not in AGAINST:
        raise PlanError(f"plot-over is {against!r}: give one of {', '.join(AGAINST)}")
    places = [plan.density if against == "density" else float(plan.settings.gpus) for plan in plans]
    name = type(plans[0].settings.builder).__name__
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    lines = {
        "dense": ("dense", "-", [plan.dense.total for plan in plans]),
        name: (name, "-", [plan.sparse.total for plan in plans]),
        f"{name}: fine stage": (name, ":", [plan.sparse.fine for plan in plans]),
        f"{name}: communication": (name, "--", [plan.sparse.ulysses + plan.sparse.beside for plan in plans]),
    }
    for label, (colour, style, times) in lines.items():
        if not any(times):
            continue
        seconds = [1e3 * x for x in times]
        axes.plot(places, seconds, style, color=COLOURS[colour], label=label, marker="o", markersize=3, linewidth=1.6)
    axes.set_xlabel("density" if against == "density" else "GPUs that share a sequence and the weights")
    if against == "gpus":
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_ylabel("ms a step (estimate)")
    axes.set_ylim(bottom=0)
    first = plans[0].settings
    guesses = assumed(plans[0].shares)
    source = "roofline with assumed shares of the peaks, not measured" if guesses else "shares of the peaks measured"
    axes.set_title(
        f"{first.model}, {'x'.join(map(str, plans[0].grid))} tokens, {first.machine.name}\n{source}", fontsize=9
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def to_bytes(figure: Figure, kind: str) -> bytes:
    """A figure as a file of a kind that matplotlib knows (png, pdf, svg).

    Raises:
        PlanError: it knows no such kind.
    """
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise PlanError(f"plot ends in {kind!r}: give a name that ends in one of {', '.join(sorted(known))}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=110, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()
