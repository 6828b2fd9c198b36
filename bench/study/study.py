"""A study: works through a preset's items, resumes what was cut short, and leaves out what is on file."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.study import models, probes, samples, timing, train
from bench.study.batch import Batch
from bench.study.clips import Clips
from bench.study.flops import verify
from bench.study.overlaps import overlaps_of
from bench.study.presets import Item, Preset, Probe, Timing
from bench.study.rows import Results, Row, describe
from bench.study.settings import ANCHOR, Run, Size
from flexsparse.demo.model import VideoDiT
from flexsparse.training.checkpoint import load_checkpoint
from flexsparse.training.environment import check_device
from flexsparse.training.errors import RunError


def listed(item: Item) -> str:
    """An item's name for --list and --only: of a training, with its steps, as it may stand twice."""
    return f"{item.name}@{item.steps}" if isinstance(item, Run) else item.name


@dataclass(kw_only=True)
class Study:
    """One call of the command.

    Attributes:
        preset: what to do.
        out: folder of `study.json` and, below `runs/`, of each run's checkpoint, weights and sample.
        data: folder of videos; None for the sample clips.
        vae: folder of a diffusers VAE; None for pixels.
        device: "cpu" or "cuda".
        compiled: whether models train through `torch.compile`.
        bf16: whether models run under bfloat16 autocast; probes are float32.
        seconds: when to stop, after the step that is under way; None for never.
        only: words; an item is done where its name, as `listed`, holds one of them, or where there are none.
        say: prints a line.
        interrupted: whether the user wants to stop.
    """

    preset: Preset
    out: Path
    data: Path | None = None
    vae: Path | None = None
    device: str = "cpu"
    compiled: bool = False
    bf16: bool = False
    seconds: float | None = None
    only: Sequence[str] = ()
    say: Callable[[str], None] = print
    interrupted: Callable[[], bool] = lambda: False
    _clips: dict[str, Clips] = field(default_factory=dict)
    _held_out: dict[str, list[Batch]] = field(default_factory=dict)
    _begin: float = field(default_factory=time.monotonic)

    @property
    def stopping(self) -> bool:
        """Whether time is up, or the user wants to stop."""
        return self.interrupted() or (self.seconds is not None and time.monotonic() - self._begin > self.seconds)

    def items(self) -> list[Item]:
        """What is asked for.

        Raises:
            RunError: a word of ``only`` that no item's name holds.
        """
        names = [listed(item) for item in self.preset.items]
        for word in self.only:
            if not any(word in name for name in names):
                raise RunError(
                    f"--only {word!r} matches nothing in preset {self.preset.name}: it has {', '.join(names)}"
                )
        wanted = [not self.only or any(word in name for word in self.only) for name in names]
        return [item for item, want in zip(self.preset.items, wanted) if want]

    def run(self) -> bool:
        """Work through the items.

        Returns:
            Whether all of them are done; False where time was up or the user stopped it.

        Raises:
            RunError: bad input; a count of FLOPs that torch's counter does not confirm.
        """
        check_device(self.device)
        items = self.items()
        (self.out / "runs").mkdir(parents=True, exist_ok=True)
        first = self._clips_of(_size(items[0]))
        self.results = Results(self.out / "study.json", self._header(first))
        self.results.put()  # a full disk shows now
        for size in {_size(item).name: _size(item) for item in items}.values():
            verify(size, self._clips_of(size).channels)
        for number, item in enumerate(items, start=1):
            if self.stopping:
                break
            if self._on_file(item):
                continue
            self.say(f"[{number}/{len(items)}] {listed(item)}")
            if not self._do(item):
                break
        else:
            return True
        self.say("stopped before the end: run the same command again to go on")
        return False

    def _header(self, clips: Clips) -> Row:
        return describe(
            preset=self.preset.name,
            data=clips.digest,
            device=self.device,
            threads=torch.get_num_threads(),
            compiled=self.compiled,
            bf16=self.bf16,
            sources=clips.sources,
            vae=None if self.vae is None else self.vae.name,
        )

    def _clips_of(self, size: Size) -> Clips:
        """The clips, cut for a size; read once."""
        name = f"{size.frames}x{size.height}x{size.width}x{size.batch}"
        if name not in self._clips:
            self._clips[name] = found = Clips(data=self.data, vae=self.vae, size=size, device=self.device)
            for clip, reason in found.skipped.items():
                self.say(f"skipped {clip}: {reason}")
            self._held_out[name] = [batch.to(self.device) for batch in found.held_out(self.preset.windows)]
        return self._clips[name]

    def _held_out_of(self, size: Size) -> list[Batch]:
        self._clips_of(size)
        return self._held_out[f"{size.frames}x{size.height}x{size.width}x{size.batch}"]

    def _on_file(self, item: Item) -> bool:
        """Whether an item was done before."""
        if isinstance(item, Run):
            rows = [row for row in self.results.of("run") if row["run"] == item.name]
            return any(row["steps"] >= item.steps for row in rows)
        if isinstance(item, Timing):
            done = {row["method"] for row in self.results.of("timing") if row["size"] == item.size.name}
            return all(method.name in done for method in item.methods if method.attention != "dense")
        return item.name in self.results.header.get("probed", [])

    def _do(self, item: Item) -> bool:
        if isinstance(item, Run):
            return self._train(item)
        if isinstance(item, Probe):
            return self._probe(item)
        clips = self._clips_of(item.size)
        how = {"device": self.device, "compiled": self.compiled, "bf16": self.bf16}
        batch = clips.batch(0, 0).to(self.device)
        for row in timing.measure(item, batch, clips.channels, **how, stop=lambda: self.stopping):
            self.results.put(row)
        return self._on_file(item)

    def _folder(self, name: str) -> Path:
        return self.out / "runs" / name

    def _train(self, run: Run) -> bool:
        folder, clips = self._folder(run.name), self._clips_of(run.size)
        folder.mkdir(parents=True, exist_ok=True)
        weights = None
        if run.parent is not None:
            name, steps = run.parent
            weights = train.weights_of(self._folder(name), steps)
            if not weights.exists():
                self.say(f"  left out: {name} has not been trained to step {steps} here")
                return True
        training = train.start(
            run, clips.channels, device=self.device, compiled=self.compiled, weights=weights, bf16=self.bf16
        )
        checkpoint = folder / train.CHECKPOINT
        found = load_checkpoint(checkpoint) if checkpoint.exists() else None
        if found is not None and not self._has_rows_of(run, found.state["progress"]):
            self.say("  there is a checkpoint, but its rows are gone: starts again")
            found = None
        if found is None:
            self.results.drop(run.name)
        else:
            train.unpack(training, found)
            self.say(f"  goes on after step {training.progress.step}")
            if training.progress.step > run.steps:
                self.say("  left out: it has been trained further than that")
                return True
        begin, first = time.monotonic(), training.progress.step

        def told(step: int, loss: float) -> None:
            if step % max(1, run.steps // 5) == 0 or step == first + 1:
                each = (time.monotonic() - begin) / (step - first)
                self.say(f"  step {step}/{run.steps}  loss {loss:.4f}  {each:.2f} s a step")

        done = train.train(
            training,
            clips,
            self._held_out_of(run.size),
            self.results,
            folder,
            until=run.steps,
            stop=lambda: self.stopping,
            told=told,
        )
        if done:
            loss = [row["loss"] for row in self.results.of("evaluation") if row["run"] == run.name][-1]
            if loss is None:
                self.say(f"  diverged at step {training.progress.step}: lower the size's learning rate")
                return True
            self.say(f"  held-out loss {loss:.5f}")
            video = samples.sample(training.averaged, run.size, clips.channels, self.device, self.bf16)
            samples.save(video, folder / "sample.png")
        return done

    def _has_rows_of(self, run: Run, progress: dict[str, Any]) -> bool:
        """Whether the evaluations that a checkpoint has behind it are on file."""
        steps = {row["step"] for row in self.results.of("evaluation") if row["run"] == run.name}
        return {step for step, *_ in progress["measured"]} <= steps

    def _probe(self, item: Probe) -> bool:
        run, clips = item.run, self._clips_of(item.run.size)
        weights = train.weights_of(self._folder(run.name), run.steps)
        if not weights.exists():
            self.say(f"  left out: {run.name} has not been trained to step {run.steps} here")
            return True
        method = dataclasses.replace(run.method, anneal=0.0)
        model = models.make(run.size, method, run.seed, clips.channels).to(self.device)
        model.load_state_dict(load_checkpoint(weights).tensors)
        model.requires_grad_(False)
        try:
            rows = [row | {"steps": run.steps} for row in self._probed(model, run)]
        except _Stopped:
            return False
        self.results.header["probed"] = [*self.results.header.get("probed", []), item.name]
        self.results.put(*rows)
        return True

    def _probed(self, model: VideoDiT, run: Run) -> Iterator[Row]:
        held_out, told = self._held_out_of(run.size), self._told
        if run.method.name == ANCHOR:
            yield from probes.probes(model, held_out, run.size, run.name, progress=told)
        else:
            yield from overlaps_of(model, held_out, run.size, run.name, run.method.name, progress=told)

    def _told(self, line: str) -> None:
        """What a probe says; it ends there where time is up."""
        if self.stopping:
            raise _Stopped
        self.say(f"  {line}")


class _Stopped(Exception):
    """A probe was ended: its rows are worth nothing in part."""


def _size(item: Item) -> Size:
    return item.run.size if isinstance(item, Probe) else item.size
