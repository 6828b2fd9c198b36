"""The report's pictures, as PNG bytes. Matplotlib's objects are used without pyplot, which keeps global
state.

Letters: T frames, H and W pixel rows and columns, N query tiles, M KV tiles.
"""

import io
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from flexsparse.demo.settings import Settings

COLOURS = {"dense": "#3b3b3b", "vsa": "#0b6fb8", "bsa": "#c9510c"}
_HEAT = colormaps["YlOrRd"]
LABELS = {"dense": "dense", "vsa": "VSA", "bsa": "BSA"}


def to_png(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    result, average = [], 0.0
    for index, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**index))
    return result


def loss_curves(curves: dict[str, Any]) -> bytes:
    """Training loss (smoothed, raw values faint) and held-out loss of each method.

    Args:
        curves: method -> `Curves`.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, curve in curves.items():
        style = {"color": COLOURS[method], "label": LABELS[method]}
        steps = range(1, len(curve.loss) + 1)
        left.plot(steps, curve.loss, color=COLOURS[method], alpha=0.15, linewidth=0.8)
        left.plot(steps, smoothed(curve.loss), linewidth=1.6, **style)
        points = [(point["step"], point["mean"]) for point in curve.held_out]
        right.plot(*zip(*points), marker="o", markersize=3, linewidth=1.6, **style)
    left.set_title("training loss (smoothed)")
    right.set_title("held-out frames, fixed noise")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_ylabel("velocity MSE")
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_locator(_log_ticks())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return to_png(figure)


def _log_ticks() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7))


def image(frame: Tensor) -> np.ndarray:
    """`[3, H, W]` in [-1, 1] -> float `[H, W, 3]` in [0, 1]."""
    return frame.float().clamp(-1, 1).add(1).div(2).permute(1, 2, 0).numpy()


def frame_table(rows: dict[str, Tensor], columns: int = 4) -> bytes:
    """Videos below each other, a few frames of each side by side.

    Args:
        rows: title -> video `[3, T, H, W]` in [-1, 1].
        columns: frames shown of each.
    """
    frames, height, width = next(iter(rows.values())).shape[1:]
    columns = min(columns, frames)
    chosen = np.linspace(0, frames - 1, columns).round().astype(int)
    figure = Figure(figsize=(2.7 * columns, 2.7 * height / width * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (title, video) in enumerate(rows.items()):
        for column, index in enumerate(chosen):
            axis = axes[row, column]
            axis.imshow(image(video[:, index]), interpolation="nearest")
            _bare(axis)
            if row == 0:
                axis.set_title(f"frame {index + 1}", fontsize=9)
        axes[row, 0].set_ylabel(title, fontsize=9)
    return to_png(figure)


def heat_map(video: Tensor, keep: dict[str, Tensor], query: tuple[int, int, int], settings: Settings) -> bytes:
    """Which KV tiles one query tile keeps, drawn over the frames.

    Args:
        video: the clean window `[3, T, H, W]` in [-1, 1].
        keep: method -> critical tiles, bool `[heads, N, M]`.
        query: the query tile's place in the grid of tiles (t, h, w).
        settings: of the run.
    """
    places = tile_places(settings)
    index = int(np.ravel_multi_index(query, places))
    t_side, h_side, w_side = settings.tile
    height, width = video.shape[2:]
    size = (2.7 * places[0] + 0.9, 2.7 * height / width * len(keep) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(keep), places[0], squeeze=False)
    heads = next(iter(keep.values())).shape[0]
    colours = ListedColormap([_HEAT(0.1 + 0.75 * level / heads) for level in range(1, heads + 1)])
    norm = BoundaryNorm(np.arange(heads + 1) + 0.5, heads)
    for row, (method, mask) in enumerate(keep.items()):
        count = mask[:, index].sum(0).reshape(places).numpy()
        for slab in range(places[0]):
            first, last = slab * t_side, min((slab + 1) * t_side, video.shape[1]) - 1
            heat = np.repeat(np.repeat(count[slab], h_side * settings.patch, 0), w_side * settings.patch, 1)
            heat = heat[:height, :width]
            axis = axes[row, slab]
            axis.imshow(image(video[:, (first + last) // 2]).mean(-1), cmap="gray", vmin=-0.2, vmax=1.3)
            axis.imshow(heat, cmap=colours, norm=norm, alpha=np.where(heat > 0, 0.6, 0.0))
            _bare(axis)
            if row == 0:
                axis.set_title(f"frames {first + 1}-{last + 1}", fontsize=9)
            if slab == query[0]:
                _outline(axis, query, settings, height, width)
        axes[row, 0].set_ylabel(LABELS[method], fontsize=9)
    scale = ScalarMappable(norm=norm, cmap=colours)
    bar = figure.colorbar(scale, ax=axes, shrink=0.8, pad=0.01, ticks=range(1, heads + 1))
    bar.set_label("heads that keep it", fontsize=8)
    bar.ax.tick_params(labelsize=8, length=0)
    return to_png(figure)


def _outline(axis: Any, query: tuple[int, int, int], settings: Settings, height: int, width: int) -> None:
    """Draws the query tile's border; its last rows and columns may lie outside the frame."""
    side_h, side_w = settings.tile[1] * settings.patch, settings.tile[2] * settings.patch
    top, left = query[1] * side_h, query[2] * side_w
    shape = (min(side_w, width - left) - 1, min(side_h, height - top) - 1)
    axis.add_patch(Rectangle((left, top), *shape, fill=False, edgecolor="#00d5ff", linewidth=2.2))


def _bare(axis: Any) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def tile_places(settings: Settings) -> tuple[int, int, int]:
    """Tiles along (t, h, w)."""
    t, h, w = (-(-size // side) for size, side in zip(settings.grid, settings.tile))
    return t, h, w


def query_places(settings: Settings) -> list[tuple[int, int, int]]:
    """The query tiles that the report shows: places spread over the video, at most three, each once."""
    shares = ((0.3, 0.5, 0.5), (0.6, 0.3, 0.75), (0.9, 0.8, 0.2))
    places = tile_places(settings)
    chosen = [tuple(min(size - 1, int(share * size)) for share, size in zip(row, places)) for row in shares]
    return list(dict.fromkeys(chosen))  # type: ignore[arg-type]
