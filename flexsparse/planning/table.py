"""A plan for people: rich tables, notes, and what was assumed."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from flexsparse.planning.machines import Machine
from flexsparse.planning.plan import Plan
from flexsparse.planning.times import Times

GIB, MB = 2**30, 1e6
TIMES = {
    "products": "matrix products outside of attention",
    "elementwise": "between them",
    "dense_calls": "attention that stays dense",
    "attention": "the planned calls, dense",
    "coarse": "coarse stage",
    "selection": "selection",
    "fine": "fine stage",
    "tiling": "tile order, gates (uncompiled)",
    "ulysses": "all-to-alls (Ulysses)",
    "optimizer": "AdamW",
    "beside": "FSDP and replicas, beside all of it",
}

BETWEEN_GPUS = ("ulysses", "beside")
"""Zero where there is one. What runs beside the computation counts where it takes longer."""


def print_plan(plan: Plan, console: Console) -> None:
    """Prints everything."""
    _about(plan, console)
    console.print(_flops(plan))
    console.print(_memory(plan))
    if plan.settings.gpus > 1:
        console.print(_communication(plan))
    console.print(_times(plan))
    console.print(_shares(plan))
    for note in (_peaks(plan.settings.machine), *plan.notes):
        console.print(f"- {note}", markup=False, highlight=False, soft_wrap=True)


def _about(plan: Plan, console: Console) -> None:
    s, (tiles, kept, slots) = plan.settings, plan.tiles
    tokens = plan.grid[0] * plan.grid[1] * plan.grid[2]
    what = "training step" if s.training else "forward"
    how = ("" if s.compiled else ", uncompiled") + (", checkpointed" if s.training and s.checkpointing else "")
    lines = (
        f"{s.model}: {plan.kind}, {plan.parameters:,} parameters, a {what} in {s.dtype}{how}",
        f"grid {'x'.join(map(str, plan.grid))} = {tokens:,} tokens, batch {s.batch}; {plan.calls[0]} sparse attention calls, "
        f"{plan.calls[1]} dense",
        f"{type(s.builder).__name__}{' with gates' if s.gates else ''}: {kept:.4g} of {tiles:,} tiles of {slots} slots a row, "
        f"density {plan.density:.4f}; tiles pad the tokens by {plan.padding:.1%}",
        s.machine.name
        if s.machine.measured
        else f"{s.gpus} x {s.machine.name}: sequences over {s.ulysses}, weights over {s.fsdp}",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _flops(plan: Plan) -> Table:
    f = plan.flops
    table = _table("\nTFLOPs of a replica", "forward", "backward", "step")
    rows = {
        "outside of attention": f.other,
        "attention that stays dense": f.dense_calls,
        "coarse stage": f.coarse,
        "fine stage, padding included": f.fine,
        "the same calls, if dense": f.attention,
    }
    for name, (forward, backward) in rows.items():
        table.add_row(name, *(f"{x / 1e12:,.3f}" for x in (forward, backward, forward + backward)))
    table.add_row("selection, 10^12 comparisons", *(f"{x / 1e12:,.3f}" for x in (*f.selection, sum(f.selection))))
    table.add_row("together, sparse", "", "", f"{f.sparse_total / 1e12:,.3f}")
    table.add_row("together, dense", "", "", f"{f.dense_total / 1e12:,.3f}")
    return table


def _memory(plan: Plan) -> Table:
    m = plan.memory
    table = _table(f"\nMemory of a {plan.settings.machine.unit}", "GiB")
    rows = {
        "weights": m.weights,
        "weights as computed with": m.compute_weights,
        "gradients": m.gradients,
        "AdamW's averages": m.optimizer,
        "activations": m.activations,
        "temporaries beside them": m.temporaries,
        "lists of one call": m.lists,
        "together": m.total,
    }
    for name, size in rows.items():
        table.add_row(name, f"{size / GIB:,.3f}")
    if plan.settings.training:
        again = "none of its own" if m.checkpointed is None else f"{m.checkpointed / GIB:,.3f}"
        table.add_row("activations without checkpointing", f"{m.plain / GIB:,.3f}")
        table.add_row("activations with checkpointing", again)
    table.add_row("bitmasks", f"{m.bitmasks / GIB:,.3f}")
    room = plan.settings.machine.memory
    table.add_row(
        f"the {plan.settings.machine.unit} has ({'fits' if m.total <= room else 'does not fit'})", f"{room / GIB:,.1f}"
    )
    return table


def _communication(plan: Plan) -> Table:
    c = plan.communication
    table = _table(f"\nReceived by a {plan.settings.machine.unit} in a step", "MB")
    rows = {
        "all-to-alls around attention (Ulysses)": c.ulysses,
        "all-gathers of weights (FSDP)": c.gather,
        "reduce-scatter of gradients (FSDP)": c.scatter,
        "all-reduce of gradients (replicas)": c.replicas,
    }
    for name, size in rows.items():
        table.add_row(name, f"{size / MB:,.1f}")
    return table


def _times(plan: Plan) -> Table:
    table = _table("\nTime of a step, ms (estimate)", "dense", "sparse")

    def cell(times: Times, name: str) -> str:
        return f"{getattr(times, name) * 1e3:,.2f}"

    for name, title in TIMES.items():
        if name in BETWEEN_GPUS and plan.settings.gpus == 1:
            continue
        table.add_row(title, cell(plan.dense, name), cell(plan.sparse, name))
    table.add_row("step", cell(plan.dense, "total"), cell(plan.sparse, "total"))
    table.add_row("speed-up", "", f"{plan.speedup:.2f}x")
    return table


def _shares(plan: Plan) -> Table:
    table = _table("\nShare of the peak that is reached", "share", "from")
    for field in dataclasses.fields(plan.shares):
        share = getattr(plan.shares, field.name)
        table.add_row(field.name.replace("_", " "), f"{share.value:.2f}", share.origin)
    return table


def _peaks(machine: Machine) -> str:
    products = ", ".join(f"{dtype} {rate / 1e12:,.3g}" for dtype, rate in machine.products.items())
    links = f", NVLink {machine.nvlink / 1e9:,.0f} and network {machine.network / 1e9:,.0f} GB/s one way"
    return (
        f"Peaks, {'measured' if machine.measured else 'published'}: matrix products {products} TFLOP/s, other float32 "
        f"{machine.scalar / 1e12:,.3g}, memory {machine.hbm / 1e9:,.3g} GB/s{'' if machine.measured else links} "
        f"({'; '.join(machine.sources)})."
    )
