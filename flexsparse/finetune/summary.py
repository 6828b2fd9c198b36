"""What the terminal shows when a run is over."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from flexsparse.finetune.run import Result
from flexsparse.finetune.settings import Settings
from flexsparse.training.files import printable


def print_summary(result: Result, settings: Settings, folder: Path, console: Console) -> None:
    """Prints the first and the last validation, the skipped clips, and where the result is."""
    held_out = result.curves.held_out
    if held_out:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("held-out loss")
        for level in settings.noise_levels:
            table.add_column(f"noise {level:g}", justify="right")
        table.add_column("mean", justify="right")
        for point in held_out if len(held_out) == 1 else (held_out[0], held_out[-1]):
            cells = [f"{loss:.4f}" for loss in (*point["losses"], point["mean"])]
            table.add_row(f"step {point['step']}", *cells)
        console.print(table)
    if result.bad:
        _line(console, f"skipped clips: {len(result.bad)}")
        for name, reason in result.bad.items():
            _line(console, f"  {printable(name)}: {printable(reason)}")
    for path in result.written:
        _line(console, f"written: {printable(str(path))}")
    _line(console, f"logs:    tensorboard --logdir {printable(str(folder))}")


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
