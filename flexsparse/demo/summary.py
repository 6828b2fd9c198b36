"""What the terminal shows when a run is done."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flexsparse.demo.figures import LABELS
from flexsparse.demo.folder import REPORT
from flexsparse.training.files import printable


def print_summary(metrics: dict[str, Any], folder: Path, console: Console) -> None:
    """Prints a short table and where the report is."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("attention")
    columns = (
        "density",
        "attention FLOPs / dense",
        "attention time / dense",
        "whole step / dense",
        "error to oracle",
        "held-out loss",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for method, entry in metrics["methods"].items():
        table.add_row(
            LABELS[method],
            f"{entry['density']:.3f}",
            _ratio(entry["attention_flops_ratio"]),
            _ratio(entry["attention_time"].get("ratio")),
            _ratio(entry["step"].get("ratio")),
            f"{entry['error_to_oracle']:.1e}" if "error_to_oracle" in entry else "-",
            f"{entry['held_out_loss']:.4f}",
        )
    console.print(table)
    console.print("FLOPs and times are shares of dense's, measured in this run: above 1 is more.", highlight=False)
    console.print(f"report: {printable(str(folder / REPORT))}", markup=False, highlight=False, soft_wrap=True)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
