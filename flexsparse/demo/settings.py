"""What one demo run is told: everything that shapes its curves, checked once."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from flexsparse.training.environment import check_seed
from flexsparse.training.errors import RunError

METHODS = ("dense", "vsa", "bsa")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run; equal settings give equal curves on one machine (on a GPU up to rounding)."""

    steps: int = 80
    """Training steps of each method."""
    frames: int = 16
    """Frames in one training window."""
    height: int = 120
    """Pixel rows."""
    width: int = 216
    """Pixel columns."""
    sparsity: float = 0.875
    """Share of the KV tiles that a query tile does not look at (VSA: exact; BSA: on average)."""
    top_k: int | None = None
    """KV tiles that a VSA query tile keeps; replaces `sparsity`."""
    keep_queries: float = 0.5
    """Share of the query tokens that BSA keeps."""
    tile: tuple[int, int, int] = (4, 4, 4)
    """Tile, in tokens along (T, H, W)."""
    dim: int = 128
    """Model width."""
    depth: int = 4
    """Transformer blocks."""
    heads: int = 2
    """Attention heads."""
    patch: int = 8
    """Side of a patch in pixels."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    seed: int = 0
    """Seeds weights, crops, flips and noise."""
    methods: tuple[str, ...] = METHODS
    """Which trainings to run, in this order."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    compile: bool = True
    """Whether the models go through torch.compile."""
    eval_every: int = 10
    """Steps between two measurements of the held-out loss."""
    video_sha256: str = ""
    """SHA-256 of the clip's file."""

    def __post_init__(self) -> None:
        for name in ("steps", "frames", "height", "width", "dim", "depth", "heads", "patch", "eval_every"):
            if getattr(self, name) < 1:
                raise RunError(f"--{_flag(name)} {getattr(self, name)} is too small: pass at least 1")
        check_seed(self.seed)
        if self.frames < 2:
            raise RunError(f"--frames {self.frames} is no video: pass at least 2")
        for name in ("height", "width"):
            if getattr(self, name) % self.patch:
                raise RunError(
                    f"--{name} {getattr(self, name)} is not a multiple of the patch: pass a multiple of {self.patch}"
                )
        if not 0 <= self.sparsity < 1:
            raise RunError(f"--sparsity {self.sparsity} is outside [0, 1): pass for example 0.875")
        if not 0 < self.keep_queries <= 1:
            raise RunError(f"--keep-queries {self.keep_queries} is outside (0, 1]: pass for example 0.5")
        if self.learning_rate <= 0:
            raise RunError(f"--lr {self.learning_rate} is not positive: pass for example 0.002")
        tiles = self.num_tiles
        if self.top_k is not None and not 1 <= self.top_k <= tiles:
            raise RunError(f"--top-k {self.top_k} is outside [1, {tiles}], the number of tiles: pass a value inside")
        if self.dim % self.heads or self.dim // self.heads % 8:
            raise RunError(f"--dim {self.dim} and --heads {self.heads}: pass heads of a multiple of 8 channels")
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise RunError(
                f"--methods {','.join(self.methods)!r} is not understood: list some of {','.join(METHODS)}, each once"
            )
        if self.device not in ("cpu", "cuda"):
            raise RunError(f"--device {self.device!r} is unknown: pass cpu or cuda")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token grid (T, H, W)."""
        return (self.frames, self.height // self.patch, self.width // self.patch)

    @property
    def tokens(self) -> int:
        """Video tokens in one window."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def num_tiles(self) -> int:
        """Tiles that cover the grid."""
        product = 1
        for size, side in zip(self.grid, self.tile):
            product *= -(-size // side)
        return product

    @property
    def kv_density(self) -> float:
        """Share of the KV tiles that BSA keeps on average; the same as VSA's."""
        return 1 - self.sparsity if self.top_k is None else self.top_k / self.num_tiles

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def digest(self) -> str:
        """SHA-256 over all settings."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def differences(self, stored: dict[str, Any]) -> list[str]:
        """One text for each setting that differs from `stored`, the `as_dict` of another run."""
        mine = self.as_dict()
        return [
            f"--{_flag(field.name)} is {mine[field.name]!r}, the run has {stored.get(field.name)!r}"
            for field in fields(self)
            if mine[field.name] != stored.get(field.name)
        ]


def _flag(name: str) -> str:
    return {"video_sha256": "video (SHA-256)", "learning_rate": "lr"}.get(name, name.replace("_", "-"))
