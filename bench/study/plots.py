"""Figures of a study's rows; each is drawn only where there are rows for it.

A figure is a function of its data, so that what is wanted is known without matplotlib, which only drawing needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.study import plot_data as data
from bench.study.evidence import Study
from bench.study.paper import SHARING_PAYS
from bench.study.plot_style import COLOURS, MARKERS, WIDTH, colour, label, log_ticks, panels, plain


def _trade(found: Mapping[str, data.Trade], figure: Any, x: str, unit: str) -> None:
    for ax, (size, curves) in zip(panels(figure, len(found)), found.items()):
        ends = {}
        for method, points in curves.items():
            xs, ys, low, high = zip(*points)
            ax.plot(xs, ys, color=colour(method), linewidth=1.4)
            error = [[ys[-1] - low[-1]], [high[-1] - ys[-1]]]
            ax.errorbar(xs[-1:], ys[-1:], yerr=error, fmt="o", markersize=5, capsize=3, color=colour(method))
            ends[method] = (xs[-1], ys[-1])
        ax.set_xscale("log")
        ax.set_yscale("log")
        log_ticks(ax.yaxis)
        log_ticks(ax.xaxis, (1, 2, 5))
        plain(ax, f"{x} ({unit})", "held-out loss", f"size {size}: down and left is better; bars: range of seeds")
        label(ax, ends)


def flops(found: Mapping[str, data.Trade], figure: Any) -> None:
    """Loss against training FLOPs."""
    _trade(found, figure, "training FLOPs", "log scale")


def time(found: Mapping[str, data.Trade], figure: Any) -> None:
    """Loss against steps x median seconds of a step."""
    _trade(found, figure, "steps x measured seconds of a step", "log scale")


def curves(found: Mapping[str, tuple[data.Trade, data.Trade]], figure: Any) -> None:
    """Loss and gap to dense by step, bands over seeds."""
    axes = panels(figure, 2 * len(found), 2)
    for row, (size, both) in enumerate(found.items()):
        for ax, lines, what in zip(axes[2 * row : 2 * row + 2], both, ("held-out loss", "gap to dense, %")):
            ends = {}
            for method, points in lines.items():
                xs, ys, low, high = zip(*points)
                ax.plot(xs, ys, color=colour(method), linewidth=1.4, marker="o", markersize=2.5)
                ax.fill_between(xs, low, high, color=colour(method), alpha=0.15, linewidth=0)
                ends[method] = (xs[-1], ys[-1])
            if what == "held-out loss":
                ax.set_yscale("log")
                log_ticks(ax.yaxis)
            else:
                ax.axhline(0, color=COLOURS["dense"], linewidth=1)
            plain(ax, "step", what, f"size {size}" + ("; bands: range of seeds" if what == "held-out loss" else ""))
            label(ax, ends)


def training_free(found: Mapping[str, tuple[data.Lines, data.Lines]], figure: Any) -> None:
    """Error and recall against density."""
    axes = panels(figure, 2 * len(found), 2)
    for row, (size, both) in enumerate(found.items()):
        for ax, lines, what in zip(axes[2 * row : 2 * row + 2], both, ("output error", "attention mass kept")):
            ends = {}
            for index, (method, points) in enumerate(lines.items()):
                style = "--" if method in ("random", "best") else "-"
                marker = MARKERS[index % len(MARKERS)]
                ax.plot(*zip(*points), style, color=colour(method), marker=marker, markersize=4, linewidth=1.4)
                ends[method] = max(points)
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:g}")
            ax.set_ylim(0, None if what == "output error" else 1.02)
            plain(ax, "density (share of pairs computed)", what, f"size {size}, dense model, no training")
            label(ax, ends)


def rules(found: Mapping[str, data.Bars], figure: Any) -> None:
    """Output error of BSA's rules, sorted; thin: over the pruned query tokens only."""
    axes = panels(figure, len(found))
    tall = sum(0.9 + 0.3 * len(bars) for bars in found.values())
    figure.set_size_inches(WIDTH, tall + 0.4)
    for ax, (size, bars) in zip(axes, found.items()):
        places = range(len(bars), 0, -1)
        for place, (rule, (error, low, high, pruned, density)) in zip(places, bars.items()):
            shade = COLOURS["bsa"] if rule == "default" else "#e3b08f"
            ax.barh(place, error, height=0.7, color=shade)
            ax.plot([low, high], [place, place], color="#3b3b3b", linewidth=1)
            if pruned is not None:
                ax.plot([pruned], [place], marker="D", color=COLOURS["vsa"], markersize=4, linestyle="")
            ax.annotate(
                f"density {density:.3f}", xy=(1.01, place), xycoords=("axes fraction", "data"), fontsize=7, va="center"
            )
        ax.set_yticks(list(places), list(bars), fontsize=8)
        plain(
            ax,
            "output error; line: range over layers, levels, models; diamond: pruned queries only",
            "",
            f"size {size}",
        )
        ax.grid(axis="y", visible=False)
        ax.set_xlim(left=0)


def overlap(found: Mapping[str, data.Heat], figure: Any) -> None:
    """Overlap of neighbours' lists by layer and axis."""
    axes = panels(figure, len(found))
    figure.set_size_inches(WIDTH, sum(1.1 + 0.34 * len(cells) for cells in found.values()))
    for ax, (title, cells) in zip(axes, found.items()):
        names = list(dict.fromkeys(axis for line in cells.values() for axis in line))
        grid = [[line.get(name, float("nan")) for name in names] for line in cells.values()]
        image = ax.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for row, line in enumerate(grid):
            for column, value in enumerate(line):
                if value == value:
                    text = f"{value:.2f}" + (" *" if value >= SHARING_PAYS else "")
                    ax.text(
                        column,
                        row,
                        text,
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if value < 0.55 else "black",
                    )
        ax.set_xticks(range(len(names)), [f"along {name}" for name in names])
        ax.set_yticks(range(len(cells)), [f"layer {layer}" for layer in cells], fontsize=8)
        ax.set_title(f"{title}; *: at least {SHARING_PAYS:g}", fontsize=9)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    figure.colorbar(image, ax=axes, shrink=0.9 if len(found) == 1 else 0.4, label="overlap")


def schedule(found: Mapping[str, data.Trade], figure: Any) -> None:
    """Gap to dense continued, by step after the switch."""
    for ax, (size, lines) in zip(panels(figure, len(found)), found.items()):
        ends = {}
        for method, points in lines.items():
            xs, ys, low, high = zip(*points)
            tint = colour(method)
            ax.plot(
                xs, ys, "--" if method.endswith("abrupt") else "-", color=tint, marker="o", markersize=3, linewidth=1.5
            )
            ax.fill_between(xs, low, high, color=tint, alpha=0.12, linewidth=0)
            ends[method] = (xs[-1], ys[-1])
        ax.axhline(0, color=COLOURS["dense"], linewidth=1)
        plain(ax, "step after the switch", "gap to dense continued, %", f"size {size}; bands: range of seeds")
        label(ax, ends)


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        caption: of it, on the page.
        of: its data; empty where no row is about it.
        paint: draws data into a figure.
    """

    caption: str
    of: Callable[[Study], Mapping[str, Any]]
    paint: Callable[[Any, Any], None]

    def __call__(self, study: Study, figure: Any) -> bool:
        """Draw; False where there are no rows."""
        found = self.of(study)
        if found:
            self.paint(found, figure)
        return bool(found)


PLOTS: dict[str, Plot] = {
    "curves": Plot("Held-out loss, and the gap to dense, along training", data.curves, curves),
    "loss_flops": Plot("Loss against training FLOPs", data.against_flops, flops),
    "loss_time": Plot("Loss against measured training time", data.against_time, time),
    "bsa_rules": Plot("Output error of BSA's rules", data.rules, rules),
    "training_free": Plot(
        "Without training: error and attention mass against density", data.training_free, training_free
    ),
    "schedule": Plot("From a dense model: annealed against abrupt", data.schedule, schedule),
    "overlap": Plot("Overlap of neighbouring query tiles' lists", data.overlap, overlap),
}


def wanted(study: Study) -> list[str]:
    """Names of the figures that there are rows for."""
    return [name for name, plot in PLOTS.items() if plot.of(study)]


def draw(study: Study, folder: Path) -> list[str]:
    """Write the figures that there are rows for, and remove those that there are none for.

    Returns:
        Their names.

    Raises:
        ImportError: figures are wanted and matplotlib is not installed.
    """
    made: list[str] = []
    for name, plot in PLOTS.items():
        path = folder / f"{name}.png"
        if not plot.of(study):
            path.unlink(missing_ok=True)
            continue
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        plot(study, figure)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, metadata={"Software": None}, facecolor="white")
        made.append(name)
    return made
