"""Which sample is trained when, and what is held out.

A sample depends on the seed and on its number alone, and a step's samples are numbered through: so data order, crops, noise and
times (which the objective makes of the number) need no state, and do not depend on how many processes share a step.

Letters: C channels, T frames, H and W rows and columns (pixels or latents), L text tokens.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from flexsparse.finetune.clips import Clip, Content, Reader
from flexsparse.finetune.inputs import TEXT, Given, Takes
from flexsparse.finetune.settings import Settings
from flexsparse.training.errors import RunError
from flexsparse.training.files import printable
from flexsparse.training.video import as_float
from flexsparse.training.windows import Window, centre_cut, generator, random_cut

_HELD_OUT_SHARE = 0.2  # of a single clip


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One clean window: float32 `[C, T, H, W]`, what its clip brings, its number, and its random numbers for the noise."""

    clean: Tensor
    given: Given
    number: int
    random: torch.Generator


class Samples:
    """Training samples by number, and held-out samples.

    Args:
        settings: of the run.
        clips: from `find_clips`.
        takes: what the model takes of a clip, where that is known.

    Raises:
        RunError: no clip can be used, or too few to hold some out.
    """

    def __init__(self, settings: Settings, clips: list[Clip], takes: Takes | None = None) -> None:
        self.settings, self.reader = settings, Reader(settings, takes)
        self.train = clips
        self._held_out: list[Content] = []
        self._of_one = 0  # frames at the end of the single clip that are held out
        first = self._first(clips)
        if clips[0].latent:
            self.reader.shape = tuple(first.video.shape)
        self.channels = int(first.video.shape[0])
        self.brings = tuple(first.given)
        self.text_dim = int(first.given[TEXT].shape[1]) if TEXT in first.given else None
        if settings.held_out:
            self._hold_out(clips)

    def _first(self, clips: list[Clip]) -> Content:
        found = next((content for clip in clips if (content := self.reader.read(clip)) is not None), None)
        if found is None:
            name, reason = next(iter(self.reader.bad.items()))
            raise RunError(
                f"--data {self.settings.data!r}: none of {len(self.reader.bad)} clips can be used; {printable(name)}: {reason}"
            )
        return found

    def _why(self) -> str:
        """Of the first clip that cannot be used, the reason."""
        return next((f"; {printable(name)}: {reason}" for name, reason in self.reader.bad.items()), "")

    def _hold_out(self, clips: list[Clip]) -> None:
        """The clips whose names have the lowest hashes; a bad one changes nothing but itself."""
        s = self.settings
        ranked = sorted(
            clips, key=lambda clip: hashlib.sha256(f"{s.seed}/{clip.name}".encode(errors="replace")).digest()
        )
        kept: list[Clip] = []
        for clip in ranked:
            if len(kept) == s.held_out:
                break
            content = self.reader.read(clip)
            if content is not None:
                kept.append(clip)
                self._held_out.append(content)
        rest = [clip for clip in clips if clip not in kept]
        if len(kept) == s.held_out and any(self.reader.read(clip) is not None for clip in rest):
            self.train = rest
            return
        if len(kept) > 1 or kept[0].latent:
            raise RunError(
                f"--held-out {s.held_out} leaves nothing to train of {len(clips)} clips ({len(self.reader.bad)} cannot be "
                f"used{self._why()}): add clips, or pass fewer, or 0"
            )
        frames = self._held_out[0].video.shape[1]
        self._of_one = max(s.frames, round(frames * _HELD_OUT_SHARE))
        if frames - self._of_one < s.frames:
            raise RunError(
                f"--data {s.data!r} has one usable clip, of {frames} frames, and {2 * s.frames} are needed to train and to "
                "hold some out: add clips, or pass a smaller --frames or --held-out 0"
            )
        self.train = kept

    @property
    def _window(self) -> Window:
        s = self.settings
        return s.frames, s.height, s.width

    def sample(self, number: int) -> Sample:
        """A training sample. Every clip is seen once in an epoch; in a bad one's place comes the next.

        Raises:
            RunError: no training clip can be used.
        """
        count = len(self.train)
        epoch, position = divmod(number, count)
        order = torch.randperm(count, generator=generator(self.settings.seed, -2 - epoch)).tolist()
        for index in (*order[position:], *order[:position]):
            content = self.reader.read(self.train[index])
            if content is not None:
                return self._cut(content, number)
        self._first(self.train)
        raise AssertionError("a clip was bad and then was not")

    def _cut(self, content: Content, number: int) -> Sample:
        random = generator(self.settings.seed, number)
        clean = content.video
        if self.reader.shape is None:
            usable = clean[:, : clean.shape[1] - self._of_one]
            clean = as_float(random_cut(usable, self._window, random))[0]
        return Sample(clean=clean, given=content.given, number=number, random=random)

    def held_out(self) -> list[Sample]:
        """The centre window of each held-out clip; the same noise at every validation."""
        found = []
        for index, content in enumerate(self._held_out):
            clean = content.video
            if self.reader.shape is None:
                clean = as_float(centre_cut(clean, self._window, last=self._of_one > 0))[0]
            random = generator(self.settings.seed + 1, -2 - index)
            found.append(Sample(clean=clean, given=content.given, number=index, random=random))
        return found

    def ahead(self, numbers: Iterator[int]) -> Iterator[Sample]:
        """Samples by number, the next of them read while the last is trained on."""
        with ThreadPoolExecutor(1, thread_name_prefix="clips") as pool:
            waiting = [pool.submit(self.sample, number) for number in _some(numbers, 2)]
            while waiting:
                result = waiting.pop(0).result()
                waiting += [pool.submit(self.sample, number) for number in _some(numbers, 1)]
                yield result


def _some(numbers: Iterator[int], count: int) -> list[int]:
    return [number for _, number in zip(range(count), numbers)]
