"""The look of the study's figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLOURS = {
    "dense": "#3b3b3b",
    "vsa": "#0b6fb8",
    "bsa": "#c9510c",
    "bsa_kv": "#e69f00",
    "fine_only": "#56b4e9",
    "top_p": "#009e73",
    "sliding_tile": "#cc79a7",
    "own_tile": "#bcbd22",
    "spatial_temporal": "#8c6d1f",
    "spatial_full": "#6a51a3",
    "compressed_kv": "#7f7f7f",
    "random": "#9a9a9a",
    "best": "#3b3b3b",
}
"""Okabe and Ito's palette, told apart by the colour-blind, with the house's blue and orange; labels stand at the lines."""
OTHERS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f", "#6a51a3")
MARKERS = "osD^vP<>X*"
WIDTH, HIGH = 7.5, 4.2
"""Inches of a panel: at 120 dots, 900 pixels wide."""


def colour(name: str) -> str:
    """Of a method, the same in every figure."""
    name = name.removesuffix("_abrupt").removesuffix("_annealed")
    return COLOURS.get(name) or OTHERS[sum(map(ord, name)) % len(OTHERS)]


def plain(ax: Any, x: str, y: str, title: str) -> None:
    """House style of axes."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def label(ax: Any, ends: Mapping[str, tuple[float, float]], names: Mapping[str, str] | None = None) -> None:
    """Names beside the last points, pushed apart where they would overlap, each with a thin line to its point."""
    if not ends:
        return
    ax.figure.canvas.draw()
    to_axes = ax.transData + ax.transAxes.inverted()
    places = sorted((float(to_axes.transform(point)[1]), name) for name, point in ends.items())
    gap = 11 / (ax.get_window_extent().height * 72 / ax.figure.dpi)  # of a line of text, as a share of the axes
    at, floor = {}, -1.0
    for height, name in places:
        at[name] = floor = max(height, floor + gap)
    over = max(0.0, floor - 1.0)
    ceiling = 2.0
    for _, name in reversed(places):
        at[name] = ceiling = min(at[name] - over if at[name] - over > 0 else at[name], ceiling - gap)
    for name, point in ends.items():
        ax.annotate(
            (names or {}).get(name, name),
            xy=point,
            xytext=(1.02, at[name]),
            textcoords="axes fraction",
            color=colour(name),
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={
                "relpos": (0, 0.5),
                "arrowstyle": "-",
                "color": colour(name),
                "alpha": 0.5,
                "linewidth": 0.7,
                "shrinkA": 0,
                "shrinkB": 3,
            },
        )


def panels(figure: Any, count: int, columns: int = 1) -> list[Any]:
    """Axes below each other, or in columns."""
    rows = -(-count // columns)
    figure.set_size_inches(WIDTH if columns == 1 else 9.2, HIGH * rows if columns == 1 else 3.7 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in axes[count:]:
        spare.set_axis_off()
    return axes[:count]


def log_ticks(axis: Any, subs: tuple[float, ...] = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7)) -> None:
    """Few plain numbers on a log axis of less than a decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
