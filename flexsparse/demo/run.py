"""One demo run from the clip to the report."""

import datetime
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from flexsparse.demo import figures, measure, report
from flexsparse.demo.data import HELD_OUT_TIMES, ClipData, frames_needed
from flexsparse.demo.folder import CHECKPOINT, METRICS, REPORT, open_folder
from flexsparse.demo.methods import count_parameters
from flexsparse.demo.settings import Settings
from flexsparse.demo.train import Training, pack, start_trainings, train, unpack
from flexsparse.training.checkpoint import load_checkpoint, save_checkpoint
from flexsparse.training.environment import check_device, check_threads, describe
from flexsparse.training.errors import RunError
from flexsparse.training.files import printable, write_file
from flexsparse.training.folder import check_folder
from flexsparse.training.progress import TrainingProgress
from flexsparse.training.video import Source, decode, find_source
from flexsparse.training.windows import decoded_size

_SHOWN_TIME = 0.5
_LINES = 16  # plain progress lines of a whole run, where there is no terminal


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where a run reads and writes, and how it uses the machine: not part of what the run is."""

    video: Path | None = None
    """A clip, or None for the default one."""
    folder: Path
    """Output folder."""
    resume: bool = False
    """Continue the run in the folder."""
    force: bool = False
    """Replace the run in the folder."""
    save_every: int = 10
    """Steps between checkpoints."""
    threads: int | None = None
    """CPU threads, None for one on each core; another number rounds differently."""


def run_demo(
    settings: Settings, options: Options, console: Console, *, after_step: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Trains all methods and writes report.html, metrics.json and the checkpoint.

    Args:
        settings: what shapes the curves; its `video_sha256` is filled in here.
        options: where to read and write.
        console: shows progress and results.
        after_step: see `train`.

    Returns:
        What metrics.json holds.

    Raises:
        RunError: bad input; the message names the argument, its value and the remedy.
    """
    started = time.monotonic()
    if options.save_every < 1:
        raise RunError(f"--save-every {options.save_every} is too small: pass at least 1")
    if options.threads is not None:
        check_threads(options.threads)
        torch.set_num_threads(options.threads)
    check_device(settings.device)
    check_folder(options.folder, resume=options.resume, force=options.force)
    source = find_source(options.video)
    settings = replace(settings, video_sha256=source.digest())
    height, width = decoded_size(settings.height, settings.width)
    console.print(f"clip: {source.title}", markup=False, highlight=False)
    if source.attribution:
        console.print(f"      {source.attribution}", markup=False, highlight=False)
    video = decode(source, height=height, width=width, min_frames=frames_needed(settings.frames))
    data = ClipData(video, frames=settings.frames, height=settings.height, width=settings.width, seed=settings.seed)
    stored = open_folder(options.folder, resume=options.resume, force=options.force)
    trainings, first_step = _prepare(settings, stored, options.folder / CHECKPOINT)
    console.print(_plan(settings, trainings, first_step), markup=False, highlight=False)

    with TrainingProgress(
        console,
        settings.methods,
        steps=settings.steps,
        done=first_step,
        lines_every=max(1, settings.steps // _LINES),
    ) as progress:
        train(
            trainings,
            data,
            settings,
            first_step=first_step,
            checkpoint_path=options.folder / CHECKPOINT,
            save_every=options.save_every,
            progress=progress,
            after_step=after_step,
        )
    console.print("measuring, drawing ...", highlight=False)
    metrics, pictures = _results(settings, trainings, data)
    metrics["header"] = _header(settings, options, source, data) | {
        "seconds_in_this_process": round(time.monotonic() - started, 1)
    }
    write_file(options.folder / METRICS, json.dumps(metrics, indent=1).encode())
    write_file(options.folder / REPORT, report.render(metrics, pictures).encode())
    return metrics


def _prepare(settings: Settings, stored: Path | None, path: Path) -> tuple[list[Training], int]:
    """Fresh or continued trainings, and the number of steps done."""
    checkpoint = load_checkpoint(stored) if stored else None
    trainings = start_trainings(settings)
    if checkpoint:
        return trainings, unpack(checkpoint, trainings, settings)
    save_checkpoint(path, pack(trainings, 0, settings))  # a full disk shows now; a resume always finds settings
    return trainings, 0


def _plan(settings: Settings, trainings: list[Training], first_step: int) -> str:
    grid = " x ".join(map(str, settings.grid))
    begin = f", continuing after step {first_step}" if first_step else ""
    return (
        f"model: {count_parameters(trainings[0].model):,} parameters; {settings.tokens:,} video tokens "
        f"(grid {grid}); {settings.steps} steps each of {', '.join(settings.methods)} on "
        f"{settings.device}{begin}"
    )


def _results(settings: Settings, trainings: list[Training], data: ClipData) -> tuple[dict[str, Any], dict[str, bytes]]:
    """metrics.json without its header, and the report's pictures."""
    layer = settings.depth // 2
    batch = data.held_out()[HELD_OUT_TIMES.index(_SHOWN_TIME)].to(torch.device(settings.device))
    clean, noise = batch.clean[0].cpu(), batch.noise[0].cpu()
    sparse = [training for training in trainings if training.method != "dense"]
    inputs = {training.method: measure.attention_inputs(training, settings, batch, layer) for training in sparse}
    analysed = {method: measure.analyse(method, settings, tensors) for method, tensors in inputs.items()}
    rows = {"original": clean, "noisy": (1 - _SHOWN_TIME) * clean + _SHOWN_TIME * noise}
    rows |= {figures.LABELS[name]: video for name, video in measure.denoised(trainings, batch).items()}
    curves = {training.method: training.curves for training in trainings}
    places = figures.query_places(settings) if sparse else []
    pictures = {"curves": figures.loss_curves(curves), "frames": figures.frame_table(rows)}
    keep = {method: result.keep for method, result in analysed.items()}
    for index, place in enumerate(places):
        pictures[f"heat {index}"] = figures.heat_map(clean, keep, place, settings)

    steps, attention = measure.step_times(trainings), measure.attention_times(inputs, settings)
    dense_flops = measure.dense_flops(settings)
    methods: dict[str, dict[str, Any]] = {}
    for training in trainings:
        entry: dict[str, Any] = {
            "density": 1.0,
            "attention_flops": dense_flops,
            "attention_flops_ratio": 1.0,
        }
        if training.method in analysed:
            entry |= analysed[training.method].numbers
        entry |= {
            "parameters": count_parameters(training.model),
            "step": steps.get(training.method, {}),
            "attention_time": attention.get(training.method, {}),
            "held_out_loss": training.curves.held_out[-1]["mean"],
            "calls": measure.attention_calls(training),
            "curves": asdict(training.curves),
        }
        methods[training.method] = entry
    if attention and "dense" in methods:
        seconds = min(times["dense_seconds"] for times in attention.values())
        methods["dense"]["attention_time"] = {"seconds": seconds, "dense_seconds": seconds, "ratio": 1.0}
    metrics = {
        "header": {},
        "settings": settings.as_dict(),
        "grid": list(settings.grid),
        "tokens": settings.tokens,
        "num_tiles": settings.num_tiles,
        "parameters": count_parameters(trainings[0].model),
        "layer": layer,
        "held_out_times": list(HELD_OUT_TIMES),
        "shown_time": _SHOWN_TIME,
        "query_tiles": [list(place) for place in places],
        "methods": methods,
    }
    return metrics, pictures


def _header(settings: Settings, options: Options, source: Source, data: ClipData) -> dict[str, Any]:
    train_frames, held_out_frames = data.train_video.shape[1], data.held_out_video.shape[1]
    return {
        "name": printable(options.folder.name),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "clip": source.title,
        "attribution": source.attribution,
        "clip_frames": train_frames + held_out_frames,
        "held_out_frames": held_out_frames,
    } | describe(settings.device)
