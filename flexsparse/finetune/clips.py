"""Clips of a folder: which files they are, reading them, and those that cannot be used.

Letters: C channels, T frames, H and W rows and columns (pixels or latents), L text tokens.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flexsparse.finetune.inputs import CONDITION, EMBEDDINGS, Given, Takes
from flexsparse.finetune.settings import SAMPLE, Settings
from flexsparse.training.errors import RunError
from flexsparse.training.files import printable
from flexsparse.training.video import default_source, read_frames
from flexsparse.training.windows import decoded_size

VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".gif")
TENSORS = (".safetensors", ".pt")
TEXT = ".text"
"""`clip.text.safetensors` holds the text of `clip.mp4`."""
RUN = "settings.json"
"""What every run writes into its folder, which holds weights and no clips."""
_CACHE_BYTES = 2 << 30
_PROBES, _PROBE_BYTES = 16, 4096


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One file."""

    path: Path
    name: str
    """Path in the folder."""

    @property
    def latent(self) -> bool:
        """Whether it holds latents, not a video."""
        return self.path.suffix.lower() in TENSORS

    @property
    def text(self) -> Path | None:
        """The file beside it that holds its text embeddings."""
        beside = [self.path.with_name(self.path.stem + TEXT + suffix) for suffix in TENSORS]
        return next((path for path in beside if os.path.isfile(path)), None)  # a name that is too long is none


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a clip holds: uint8 pixels or float latents `[C, T, H, W]`, and what it brings beside them."""

    video: Tensor
    given: Given

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.video.nbytes + sum(tensor.nbytes for tensor in self.given.values())


def find_clips(settings: Settings, run: Path | None = None) -> list[Clip]:
    """The clips of `--data`, by name; links to folders are followed, folders of runs left out.

    Args:
        settings: of the run.
        run: the folder that it writes to, which may lie in that of the clips.

    Raises:
        RunError: no such folder, no clip in it, or videos and latents mixed.
    """
    if settings.data == SAMPLE:
        return [Clip(path=default_source().path, name="bigbuckbunny.mp4")]
    folder = Path(settings.data)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise RunError(f"--data {settings.data!r} {what}: pass a folder of clips, or 'sample'")
    paths = [p for p in _files(folder, run) if p.suffix.lower() in VIDEOS + TENSORS and p.is_file()]
    paths = sorted(p for p in paths if not _is_text(p) and not p.name.startswith("."))
    clips = [Clip(path=path, name=path.relative_to(folder).as_posix()) for path in paths]
    if not clips:
        raise RunError(
            f"--data {settings.data!r} holds no clip: put videos ({', '.join(VIDEOS)}) or latents ({', '.join(TENSORS)}) there"
        )
    if len({clip.latent for clip in clips}) > 1:
        one, other = (next(c.name for c in clips if c.latent is kind) for kind in (False, True))
        raise RunError(
            f"--data {settings.data!r} mixes videos ({printable(one)}) and latents ({printable(other)}): pass a folder of one "
            "kind; text embeddings are called NAME.text.safetensors"
        )
    return clips


def _is_text(path: Path) -> bool:
    """Whether a file holds the text of a clip; a video may be called anything."""
    return path.suffix.lower() in TENSORS and path.stem.endswith(TEXT)


def _files(folder: Path, run: Path | None) -> Iterator[Path]:
    """All files below a folder but those of runs."""
    own, seen = None if run is None else run.resolve(), set()
    for where, below, names in os.walk(folder, followlinks=True):
        here = Path(where)
        real = here.resolve()
        if real in seen or (here != folder and (real == own or (RUN in names and "checkpoints" in below))):
            below.clear()
            continue
        seen.add(real)
        yield from (here / name for name in names)


def digest(clips: list[Clip]) -> str:
    """SHA-256 over names, sizes and pieces of the contents: a resumed run must see the same clips in the same order."""
    listing = [(clip.name, *(_pieces(path) for path in (clip.path, clip.text) if path)) for clip in clips]
    return hashlib.sha256(repr(listing).encode("utf-8", "surrogateescape")).hexdigest()


def _pieces(path: Path) -> tuple[int, str]:
    """A file's size, and a hash of pieces all over it: latents made anew are as large as they were."""
    size, found = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for start in sorted(
            {(size - _PROBE_BYTES) * i // (_PROBES - 1) for i in range(_PROBES)} if size > _PROBE_BYTES else {0}
        ):
            file.seek(start)
            found.update(file.read(_PROBE_BYTES))
    return size, found.hexdigest()


@dataclass
class Reader:
    """Reads clips, keeps some in memory, and remembers those that cannot be read.

    Attributes:
        settings: of the run.
        takes: what the model takes; None while that follows from the clips (`tiny`).
        bad: why a clip was skipped, by its name.
        shape: what latents must have; None until the first clip is read.
    """

    settings: Settings
    takes: Takes | None = None
    bad: dict[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    _kept: "OrderedDict[str, Content]" = field(default_factory=OrderedDict)

    def read(self, clip: Clip) -> Content | None:
        """A clip's content; None for one that cannot be used, which `bad` then lists."""
        if clip.name in self.bad:
            return None
        if clip.name not in self._kept:
            try:
                self._kept[clip.name] = self._load(clip)
            except (RunError, OSError, ValueError, KeyError, RuntimeError) as error:
                self.bad[clip.name] = " ".join(str(error).split())[:300] or type(error).__name__
                return None
            self._forget()
        self._kept.move_to_end(clip.name)
        return self._kept[clip.name]

    def _forget(self) -> None:
        while len(self._kept) > 1 and sum(content.nbytes for content in self._kept.values()) > _CACHE_BYTES:
            self._kept.popitem(last=False)

    def _load(self, clip: Clip) -> Content:
        tensors = _tensors(clip.path) if clip.latent else {}
        given = _given(tensors | (_tensors(clip.text) if clip.text else {}))
        if clip.latent:
            if "latents" not in tensors:
                raise ValueError(f"it has no tensor 'latents' (it has {', '.join(sorted(tensors)[:5]) or 'none'})")
            video = _latents("latents", tensors["latents"])
            if self.shape is not None and tuple(video.shape) != self.shape:
                raise ValueError(
                    f"its latents are {tuple(video.shape)}, the first clip's {self.shape}: give all one shape"
                )
            if CONDITION in tensors:
                given[CONDITION] = _latents(CONDITION, tensors[CONDITION])
                if given[CONDITION].shape != video.shape:
                    raise ValueError(
                        f"its condition is {tuple(given[CONDITION].shape)}, its latents {tuple(video.shape)}"
                    )
        else:
            s = self.settings
            height, width = decoded_size(s.height, s.width)
            video = read_frames(clip.path, "the file", height=height, width=width, min_frames=s.frames)
        reason = self.takes.why_not(given) if self.takes is not None else None
        if reason is not None:
            raise ValueError(reason)
        return Content(video=video, given=given)


def _latents(name: str, found: Tensor) -> Tensor:
    """float32 `[C, T, H, W]`."""
    if found.dim() == 5 and found.shape[0] == 1:
        found = found[0]
    if found.dim() != 4 or not found.is_floating_point():
        raise ValueError(f"its {name} are {found.dtype} {tuple(found.shape)}: give floats [C, T, H, W]")
    if not bool(found.isfinite().all()):
        raise ValueError(f"its {name} are not finite")
    return found.float()


def _given(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The embeddings among a clip's tensors, float32; a batch of one is taken as one."""
    given = {}
    for name, dims in EMBEDDINGS.items():
        if name not in tensors:
            continue
        found = tensors[name]
        if found.dim() == dims + 1 and found.shape[0] == 1:
            found = found[0]
        if found.dim() != dims or not bool(found.isfinite().all()):
            shape = "[L, D]" if dims == 2 else "[D]"
            raise ValueError(f"its {name} is {tuple(found.shape)}: give finite embeddings {shape}")
        given[name] = found.float()
    return given


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name; a bare tensor in a .pt file is called by the kind of file that it is."""
    if path.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(str(path))
        except SafetensorError as error:
            raise ValueError(f"{path.name} is no safetensors file ({error})") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling a broken file throws
        raise ValueError(f"{path.name} cannot be loaded ({type(error).__name__})") from error
    if isinstance(found, Tensor):
        return {"text" if path.stem.endswith(TEXT) else "latents": found}
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds {type(found).__name__}: give a tensor or a dict of tensors")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
