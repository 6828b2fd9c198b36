"""`flexsparse info`: what is installed, which devices there are, and which attention backends work."""

from dataclasses import dataclass

import torch
from rich.console import Console

import flexsparse as fs
from flexsparse.training.environment import PACKAGES, cpu_name, git_revision, versions

BACKENDS = ("reference", "gather", "flex", "triton")
_GRID, _TILE, _HEAD_DIM = (2, 8, 8), (2, 4, 4), 32


@dataclass(frozen=True, kw_only=True)
class Usability:
    """Whether one backend works on one device; a reason where it does not."""

    backend: str
    device: str
    inference: str | None
    """None: works. Otherwise the first line of the error."""
    training: str | None
    """The same with gradients."""

    def describe(self) -> str:
        """One line for people."""
        if self.inference is None and self.training is None:
            return "inference and training"
        if self.inference is None:
            return f"inference only; training: {self.training}"
        if self.training is None:
            return f"training only; inference: {self.inference}"
        return f"not usable: {self.inference}"


def devices() -> list[str]:
    """Devices that attention can run on here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def probe(backend: str, device: str) -> Usability:
    """Runs a tiny sparse attention through one backend, without and with gradients."""
    return Usability(
        backend=backend,
        device=device,
        inference=_failure(backend, device, train=False),
        training=_failure(backend, device, train=True),
    )


def _failure(backend: str, device: str, *, train: bool) -> str | None:
    """None if the backend works, else why not, on one line."""
    layout = fs.TileLayout(grid=_GRID, tile=_TILE)
    q, k, v = (torch.randn(1, 1, layout.seq_len, _HEAD_DIM, device=device, requires_grad=train) for _ in range(3))
    try:
        out = fs.sparse_attention(q, k, v, layout, fs.VSA(top_k=1), backend=backend)
        if train:
            out.sum().backward()
    except Exception as error:  # whatever a compiler or a driver throws is the answer here
        text = " ".join(str(error).split())
        reason = text.partition("cannot do this case: ")[2] or text
        return reason[:200] or type(error).__name__
    return None


def print_info(console: Console) -> None:
    """Prints the whole page."""
    found = versions()
    _section(console, "versions")
    for name in ("python", *PACKAGES):
        _line(console, name, found.get(name, "not installed"))
    if revision := git_revision():
        _line(console, "revision", revision)
    _section(console, "devices")
    _line(console, "cpu", f"{cpu_name()}, torch uses {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            major, minor = torch.cuda.get_device_capability(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            _line(console, f"cuda:{index}", f"{properties.name}, sm_{major}{minor}, {memory}")
    else:
        built = "this torch is a CPU build" if torch.version.cuda is None else "no device or no driver"
        _line(console, "cuda", f"none ({built})")
    _section(console, "backends")
    for device in devices():
        for backend in BACKENDS:
            _line(console, f"{backend} on {device}", probe(backend, device).describe())


def _section(console: Console, title: str) -> None:
    console.print(title, style="bold", highlight=False)


def _line(console: Console, name: str, value: str) -> None:
    console.print(f"  {name:<18} {value}", markup=False, highlight=False, soft_wrap=True)
