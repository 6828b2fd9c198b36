"""One fine-tuning run: from a folder of clips to weights."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import flexsparse as fs
from flexsparse.compile_passes import RewriteError
from flexsparse.finetune import clips as clip_files
from flexsparse.finetune import state
from flexsparse.finetune.clips import RUN, Clip
from flexsparse.finetune.export import GATES, LORA, TRANSFORMER, export
from flexsparse.finetune.families import WAN, family_of
from flexsparse.finetune.inputs import Family, takes_of
from flexsparse.finetune.interrupts import Interrupts
from flexsparse.finetune.launch import make_accelerator, together
from flexsparse.finetune.model import Encoder, check_channels, config_of, describe_model, load_model, prepare_model
from flexsparse.finetune.objectives import SCHEDULER, Objective, model_folder, objective_of
from flexsparse.finetune.samples import Samples
from flexsparse.finetune.saving import METRICS, resume, save, skipped, write_metrics
from flexsparse.finetune.settings import TINY, Options, Settings
from flexsparse.finetune.train import Curves, Task, Training, hold_out, train
from flexsparse.training.errors import RunError
from flexsparse.training.files import write_file
from flexsparse.training.folder import check_folder
from flexsparse.training.progress import TrainingProgress

SETTINGS = RUN
LOGS = "tensorboard"
UNITS = {"frames": "frames", "height": "rows", "width": "columns"}
_LINES = 20  # plain progress lines of a whole run, where there is no terminal


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a run."""

    steps: int
    """Steps done, in all processes that this run had."""
    curves: Curves
    """Losses of every step."""
    bad: dict[str, str]
    """Why clips were skipped, by name."""
    written: list[Path]
    """Weights; empty for an interrupted run, and on other processes than the first."""
    interrupted: int | None
    """The signal that ended the run early."""
    main: bool
    """Whether this is the first process, which writes and prints."""


def finetune(
    settings: Settings,
    options: Options,
    console: Console,
    *,
    family: Family | None = None,
    after_step: Callable[[int], None] | None = None,
) -> Result:
    """Trains a video transformer with sparse attention; every process of an `accelerate launch` calls it.

    Args:
        settings: what shapes the curve.
        options: where to write, and how to use the machine.
        console: shows progress.
        family: how the model is called, for a class that `families.FAMILIES` does not have.
        after_step: see `train`.

    Raises:
        RunError: bad input; the message names the argument, its value and the remedy.
    """
    had_group = torch.distributed.is_initialized()
    accelerator = make_accelerator(settings, options)
    main = accelerator.is_main_process
    folder = options.folder
    together(accelerator, lambda: check_folder(folder, resume=options.resume, force=options.force), main)
    if options.force:
        _check_force(folder, settings)
    clips = clip_files.find_clips(settings, folder)
    kind, config = (None, {}) if settings.model == TINY else describe_model(settings.model)
    family = family or (WAN if kind is None else family_of(kind, config))
    published = None if family.scheduler is None else family.scheduler(config)
    objective = objective_of(settings.model, published, settings.time_shift)
    if options.compile not in family.compile:
        raise RunError(
            f"--compile {options.compile!r}: the code of this --model breaks such a graph: pass --compile {family.compile[0]}"
        )
    about = {
        "settings": settings.as_dict(),
        "clips": clip_files.digest(clips),
        "objective": objective.about,
        "flexsparse": fs.__version__,
    }
    if options.resume:
        _check_same(folder, settings, about)
    model, task = _load(settings, clips, family, objective, config)
    training = _prepare(settings, options, accelerator, model, task)
    _check_window(training)
    first_step = resume(training) if options.resume else 0
    hold_out(training)
    together(accelerator, lambda: _open(folder, options, about), main)  # late: bad input leaves no folder behind
    together(accelerator, lambda: _open_logs(accelerator, folder, first_step))
    if main:
        console.print(_plan(training, len(clips), first_step), markup=False, highlight=False)
    shown = console if main else Console(quiet=True)
    every = max(1, settings.steps // _LINES)
    bars = TrainingProgress(shown, (settings.method,), steps=settings.steps, done=first_step, lines_every=every)
    with Interrupts() as interrupts, bars as progress:
        try:
            done = train(
                training,
                first_step=first_step,
                save=lambda done: save(training, done),
                progress=progress,
                interrupts=interrupts,
                after_step=after_step,
            )
        except RewriteError as error:
            raise RunError(f"--compile {options.compile!r}: {' '.join(str(error).split())}") from error
    written: list[Path] = []
    if done == settings.steps:
        together(accelerator, lambda: written.extend(export(training, folder)))
    bad = skipped(training)
    together(accelerator, lambda: write_metrics(training, done, bad), main)
    for tracker in accelerator.trackers:
        with contextlib.suppress(OSError):  # a full disk: all else is written
            tracker.finish()
    if not had_group and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return Result(
        steps=done,
        curves=training.curves,
        bad=bad,
        written=written,
        interrupted=interrupts.signal if done < settings.steps else None,
        main=main,
    )


def _load(
    settings: Settings, clips: list[Clip], family: Family, objective: Objective, config: Mapping[str, Any]
) -> tuple[torch.nn.Module, Task]:
    """The model and all that it is trained with; the model last, as it may be large. A tiny one is made to fit the clips."""
    vae, tiny = settings.vae is not None, settings.model == TINY
    takes = None if tiny else takes_of(family, config, settings.text_tokens, vae=vae)
    samples = Samples(settings, clips, takes)
    if vae and clips[0].latent:
        raise RunError(f"--vae {settings.vae!r}: --data {settings.data!r} holds latents already: leave --vae out")
    encoder = Encoder(settings) if vae else None
    channels = encoder.channels if encoder is not None else samples.channels
    pixels = encoder is None and not clips[0].latent
    if takes is not None:
        check_channels(settings, takes.latents, channels, pixels=pixels)
    model = load_model(settings, channels=channels, text_dim=samples.text_dim, pixels=pixels)
    if takes is None:
        takes = samples.reader.takes = takes_of(family, config_of(model), settings.text_tokens, vae=vae)
    return model, Task(family=family, objective=objective, takes=takes, samples=samples, encoder=encoder)


def _check_same(folder: Path, settings: Settings, about: dict[str, Any]) -> None:
    path = folder / SETTINGS
    try:
        stored = json.loads(path.read_text())
        differences = settings.differences(stored["settings"])
        same_clips = stored["clips"] == about["clips"]
        same_objective = stored.get("objective", about["objective"]) == about["objective"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{str(path)!r} cannot be read ({' '.join(str(error).split())}): pass the folder of a run, or start with --force"
        ) from error
    if differences:
        raise RunError(
            f"--resume with other settings ({'; '.join(differences)}): pass the settings of the run, or start with --force"
        )
    if not same_clips:
        raise RunError(
            f"--data {settings.data!r} has other clips than the run began with: put them back, or start with --force"
        )
    if not same_objective:
        raise RunError(
            f"--model {settings.model!r} has another scheduler than the run began with: put that back, or start with --force"
        )


_FILES, _FOLDERS = (SETTINGS, METRICS, GATES, LORA), (state.FOLDER, TRANSFORMER, SCHEDULER, LOGS)
"""What a run writes, and `--force` removes."""


def _check_force(folder: Path, settings: Settings) -> None:
    """Raise where `--force` would remove what the run is to read: the weights of an earlier stage, say."""
    removed = [(folder / name).resolve() for name in (*_FILES, *_FOLDERS)]
    given = {"model": settings.model, "gates-from": settings.gates_from, "vae": settings.vae, "data": settings.data}
    for option, value in given.items():
        if value is None or (option, value) in (("model", TINY), ("data", clip_files.SAMPLE)):
            continue
        path = (model_folder(value) if option == "model" else Path(value)).resolve()
        for one in removed:
            if one == path or one in path.parents:
                raise RunError(
                    f"--force would remove {str(one)!r}, where --{option} {value!r} is: pass another --out or --name"
                )


def _open(folder: Path, options: Options, about: dict[str, Any]) -> None:
    """Makes the output folder ready; with `force` what an old run wrote goes, all else stays."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if options.force:
            for name in _FILES:
                (folder / name).unlink(missing_ok=True)
            for name in _FOLDERS:
                shutil.rmtree(folder / name, ignore_errors=True)
    except OSError as error:
        raise RunError(
            f"output folder {str(folder)!r} cannot be made ({error.strerror}): pass another --out"
        ) from error
    if not options.resume:
        write_file(folder / SETTINGS, json.dumps(about, indent=1).encode())


def _open_logs(accelerator: Any, folder: Path, first_step: int) -> None:
    try:
        accelerator.init_trackers(LOGS, init_kwargs={"tensorboard": {"purge_step": first_step + 1}})
    except OSError as error:
        raise RunError(
            f"the logs in {str(folder / LOGS)!r} cannot be written ({error.strerror or error}): make room, or pass another "
            "--out"
        ) from error


def _prepare(settings: Settings, options: Options, accelerator: Any, model: torch.nn.Module, task: Task) -> Training:
    kind, config = type(model), config_of(model)
    schedules = prepare_model(model, settings, options)
    model.train()
    for module in task.family.unused(model):
        module.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    core = accelerator.unwrap_model(prepared)
    average = state.MovingAverage(core, settings.ema_decay) if settings.ema_decay else None
    return Training(
        settings=settings,
        options=options,
        accelerator=accelerator,
        model=prepared,
        core=core,
        kind=kind,
        config=config,
        task=task,
        optimizer=optimizer,
        schedules=schedules,
        average=average,
        curves=Curves(),
    )


def _check_window(training: Training) -> None:
    """Raise for a window that the model cannot cut into its patches, or has no positions for."""
    config = training.config
    clean = training.latents([training.task.samples.sample(0)]).clean
    patch = config.get("patch_size") or 1
    sides = (config.get("patch_size_t") or 1, patch, patch) if isinstance(patch, int) else tuple(patch)
    # CogVideoX of image to video
    learned = config.get("use_learned_positional_embeddings") and not config.get("patch_size_t")
    ratio = config.get("temporal_compression_ratio", 1)
    whole = training.task.samples.reader.shape is not None
    for name, size, side in zip(("frames", "height", "width"), clean.shape[2:], sides):
        given, remedy = f"--{name} gives the model {size}", "a window that fits"
        if whole:
            given, remedy = f"--data {training.settings.data!r}: latents have {size} {UNITS[name]}", "others"
        if size % side:
            raise RunError(f"{given}, and its patches take multiples of {side}: pass {remedy}")
        if not learned:
            continue
        wanted = int(config[f"sample_{name}"])
        wanted = (wanted - 1) // ratio + 1 if name == "frames" else wanted
        if size != wanted:  # of other frames diffusers would leave out what was learned, without a word
            raise RunError(f"{given}, and its learned positions are of {wanted}: pass {remedy}")


def _plan(training: Training, clips: int, first_step: int) -> str:
    s = training.settings
    trained = sum(p.numel() for p in training.core.parameters() if p.requires_grad)
    total = sum(p.numel() for p in training.core.parameters())
    absent = [name for name in training.task.takes.channels if name not in training.task.samples.brings]
    zeros = f"\nthe first clip brings no {' and no '.join(absent)}: zeros are given" if absent else ""
    begin = f", continuing after step {first_step}" if first_step else ""
    return (
        f"{training.kind.__name__}: {total:,} parameters, {trained:,} trained; {clips} clip(s), {len(training.held_out)} held "
        f"out here; learns {training.task.objective.name}; {s.steps} steps of {s.method} to sparsity {s.sparsity:g}{begin}"
        f"{zeros}"
    )
