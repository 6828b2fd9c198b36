"""report.html: what a run did, on one page that opens offline."""

from typing import Any

from flexsparse.demo import page
from flexsparse.demo.figures import LABELS


def render(metrics: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The whole page.

    Args:
        metrics: what metrics.json holds.
        pictures: `curves`, `frames` and `heat 0`, `heat 1`, ..., PNG bytes; a run without sparse methods has
        no heat maps.

    Returns:
        HTML that makes no request.
    """
    header, settings = metrics["header"], metrics["settings"]
    sparse = [name for name in metrics["methods"] if name != "dense"]
    names = ", ".join(LABELS[name] for name in metrics["methods"])
    grid = " x ".join(map(str, metrics["grid"]))
    body = [
        page.heading(f"flexsparse demo: {header['name']}", level=1),
        page.paragraph(
            f"One small video diffusion transformer ({metrics['parameters']:,} parameters), trained on one "
            f"clip with {names} attention: same initial weights, same data in the same order, "
            f"{settings['steps']} steps each, {metrics['tokens']:,} video tokens (grid {grid}) in a window."
        ),
        page.paragraph(
            "What this is: a tiny model and few steps. It shows that the sparse methods train, what they "
            "look at and what they cost here. It makes no claim about the quality of a trained video model.",
            kind="note",
        ),
        page.paragraph(_clip_line(header)),
        page.heading("Numbers"),
        page.table(*_table(metrics)),
        page.paragraph(_table_legend(metrics)),
        *([page.paragraph(_gate_text(metrics))] if "gate_rms" in metrics["methods"].get("vsa", {}) else []),
        page.heading("Loss"),
        page.picture(pictures["curves"], _curves_caption(metrics)),
        page.heading("Denoised held-out frames"),
        page.picture(pictures["frames"], _frames_caption(metrics)),
    ]
    if sparse:
        body += [page.heading("Critical tiles"), page.paragraph(_heat_text(metrics))]
        for index, place in enumerate(metrics["query_tiles"]):
            text = f"Query tile (t, h, w) = ({', '.join(map(str, place))}), outlined in blue."
            body.append(page.picture(pictures[f"heat {index}"], text))
        body += [page.heading("Attention calls"), _calls_table(metrics)]
    body += [page.heading("How this was run"), page.details(_details(metrics)), _footer(header)]
    return page.page(f"flexsparse demo: {header['name']}", body)


def _clip_line(header: dict[str, Any]) -> str:
    credit = f" Credit: {header['attribution']}." if header["attribution"] else ""
    return (
        f"Clip: {header['clip']}, {header['clip_frames']} frames; the last {header['held_out_frames']} "
        "are held out." + credit
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x dense"


def _table(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    columns = [
        "attention",
        "tokens",
        "density",
        "attention FLOPs",
        "attention time",
        "whole step",
        "error to oracle",
        "distance to dense",
        "held-out loss",
    ]
    rows = []
    for method, entry in metrics["methods"].items():
        step, attention = entry.get("step", {}), entry.get("attention_time", {})
        flops = f"{entry['attention_flops'] / 1e9:.2f} G ({_ratio(entry['attention_flops_ratio'])})"
        attention_cell = f"{1e3 * attention['seconds']:.0f} ms ({_ratio(attention['ratio'])})" if attention else "-"
        step_cell = f"{1e3 * step['seconds']:.0f} ms ({_ratio(step.get('ratio'))})" if step else "-"
        rows.append(
            [
                LABELS[method],
                f"{metrics['tokens']:,}",
                f"{entry['density']:.3f}",
                flops,
                attention_cell,
                step_cell,
                _scientific(entry.get("error_to_oracle")),
                _scientific(entry.get("distance_to_dense")),
                f"{entry['held_out_loss']:.4f}",
            ]
        )
    return columns, rows


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value < 1e-2 else f"{value:.2f}"


def _table_legend(metrics: dict[str, Any]) -> str:
    how = "compiled" if metrics["settings"]["compile"] else "eager"
    return (
        "Density: share of the (query token, KV token) pairs that are computed, measured on the trained "
        "layer. FLOPs: one attention forward in one layer, coarse stage included. Attention time: forward "
        "and backward of one layer, selection and tiling included, on the tensors that layer "
        f"{metrics['layer'] + 1} of the trained model sees for a held-out window. Whole step: forward, "
        f"backward and optimizer of the {how} model. Times are medians of runs that take turns with "
        "dense in this very run; in brackets the ratio to dense, below 1 is faster. Error to oracle: RMS "
        "error over RMS, against the float64 reference with the same tiles. Distance to dense: the same "
        "measure against dense attention on the same q, k, v; this is what sparsity leaves out, not an "
        "error of the code."
    )


def _gate_text(metrics: dict[str, Any]) -> str:
    return (
        "VSA's gate, which lets the coarse output through, is zero at the start; after this training its "
        f"RMS in that layer is {metrics['methods']['vsa']['gate_rms']:.3f}."
    )


def _curves_caption(metrics: dict[str, Any]) -> str:
    times = ", ".join(f"{time:g}" for time in metrics["held_out_times"])
    return (
        "Left: training loss, smoothed; raw values are faint. Right: mean loss on the held-out frames at "
        f"the fixed noise levels {times} with fixed noise. Smaller is better."
    )


def _frames_caption(metrics: dict[str, Any]) -> str:
    return (
        f"Held-out frames with noise level {metrics['shown_time']:g}, and what each model makes of them in "
        "a single step. A sampler would take many."
    )


def _heat_text(metrics: dict[str, Any]) -> str:
    return (
        f"Which KV tiles a query tile keeps in layer {metrics['layer'] + 1}, chosen from that layer's own "
        "queries and keys for the held-out window. The colour says how many heads keep the tile; tiles "
        "without colour are not looked at by any head."
    )


def _calls_table(metrics: dict[str, Any]) -> str:
    rows = [
        [
            LABELS[method],
            call["name"],
            "sparse" if call["sparse"] else "dense",
            call["backend"],
            call["reason"],
        ]
        for method, entry in metrics["methods"].items()
        for call in entry["calls"]
    ]
    return page.table(("attention", "call", "state", "backend", "why"), rows)


def _details(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [(name, _text(value)) for name, value in metrics["header"].items()]
    return pairs + [(f"setting {name}", _text(value)) for name, value in metrics["settings"].items()]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


def _footer(header: dict[str, Any]) -> str:
    text = f"Written by flexsparse {header['versions']['flexsparse']}, {header['date']}."
    return f"<footer>{page.paragraph(text)}</footer>"
