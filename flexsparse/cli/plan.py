"""`flexsparse plan`: FLOPs, memory, communication and time of a model's step, without a GPU and without weights."""

import importlib
import json
import math
import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from flexsparse.cli.app import app, fail, fail_missing


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="wan2.1-1.3b, wan2.1-14b, hunyuanvideo or cogvideox-5b; or a diffusers transformer's folder or config.json.",
        ),
    ],
    grid: Annotated[
        str | None, typer.Option(metavar="T,H,W", help="Tokens of the video; replaces the three below.")
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of the video.")] = 81,
    height: Annotated[int, typer.Option(help="Pixel rows.")] = 480,
    width: Annotated[int, typer.Option(help="Pixel columns.")] = 832,
    batch: Annotated[int, typer.Option(help="Samples for the GPUs that share a sequence.")] = 1,
    text: Annotated[int | None, typer.Option(help="Text tokens.", show_default="those of the model's pipeline")] = None,
    method: Annotated[str, typer.Option(help="vsa or bsa.")] = "vsa",
    sparsity: Annotated[float, typer.Option(help="Share of the tiles that a query tile does not look at.")] = 0.9,
    top_k: Annotated[
        int | None, typer.Option(help="VSA: tiles that a query tile looks at; replaces --sparsity.")
    ] = None,
    keep_queries: Annotated[
        float | None, typer.Option(help="BSA: share of the query tokens to compute.", show_default="0.5")
    ] = None,
    kv_density: Annotated[
        float | None, typer.Option(help="BSA: share of the tiles that a query tile looks at; replaces --sparsity.")
    ] = None,
    gates: Annotated[bool, typer.Option("--gates/--no-gates", help="VSA: a gate on each sparse attention.")] = False,
    tile: Annotated[str, typer.Option(metavar="t,h,w", help="Tokens of a tile, or auto.")] = "4,4,4",
    inference: Annotated[bool, typer.Option("--inference", help="A forward; without, a training step.")] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing/--no-checkpointing", help="Whether backward computes blocks again.")
    ] = True,
    compiled: Annotated[
        bool, typer.Option("--compiled/--no-compiled", help="Whether what lies between matrix products is fused.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    gpus: Annotated[int | None, typer.Option(help="All GPUs.", show_default="as many as the next two need")] = None,
    ulysses: Annotated[int, typer.Option(help="GPUs that share a sequence.")] = 1,
    fsdp: Annotated[int, typer.Option(help="GPUs that share the weights.")] = 1,
    gpu: Annotated[
        str,
        typer.Option("--machine", "--gpu", help="h100-sxm, h200, or cpu: the one that a file of --results measured."),
    ] = "h200",
    results: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Folder of result files of the GPU suite and of bench.machine, or one of them.",
            show_default="bench/results of a checkout",
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON: FLOPs, bytes and seconds.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the time of a step to a png, pdf or svg.")
    ] = None,
    plot_over: Annotated[
        str | None, typer.Option(help="What --plot draws it against: density or gpus.", show_default="density")
    ] = None,
) -> None:
    """Say what a step of a model costs: FLOPs, memory, communication, and an estimate of its time.

    The model runs on tensors without values, so that everything but the times is counted. Times are a roofline: published
    peaks (of a CPU: measured), and shares of them that are measured where result files say so and assumed where not.
    """
    try:
        for package in ("diffusers", *(("matplotlib",) if plot else ())):
            importlib.import_module(package)
        from flexsparse.planning import PlanError, Settings, evaluate, measure
        from flexsparse.planning.report import as_json
        from flexsparse.planning.table import print_plan
        from flexsparse.training.progress import make_console
    except ModuleNotFoundError as error:
        fail_missing(error)
    warnings.simplefilter("ignore")  # of diffusers' about a CPU; it runs nothing
    try:
        settings = Settings(
            model=model,
            builder=_builder(method, sparsity, top_k, keep_queries, kv_density),
            grid=None if grid is None else _three("grid", grid),
            pixels=None if grid is not None else (frames, height, width),
            tile="auto" if tile == "auto" else _three("tile", tile),
            gates=gates,
            batch=batch,
            text=text,
            training=not inference,
            checkpointing=checkpointing,
            compiled=compiled,
            dtype=dtype,
            gpus=_enough(ulysses, fsdp) if gpus is None else gpus,
            ulysses=ulysses,
            fsdp=fsdp,
            gpu=gpu,
            results=results,
        )
        kind = _plot_kind(plot, plot_over, gpu)
        counts = measure(settings)
        found = evaluate(settings, counts)
        if plot is not None:
            from flexsparse.planning.figure import draw, over_density, over_gpus, to_bytes

            over = plot_over or "density"
            plans = (over_density if over == "density" else over_gpus)(settings, counts)
            _write(plot, to_bytes(draw(plans, over), kind))
    except PlanError as error:
        fail(" ".join(str(error).split()))
    if json_:
        print(json.dumps(as_json(found), indent=1))
    else:
        print_plan(found, make_console())


def _enough(ulysses: int, fsdp: int) -> int:
    """The fewest GPUs that both divide; a number that makes no sense is for `Settings` to refuse."""
    return math.lcm(ulysses, fsdp) if min(ulysses, fsdp) > 0 else 1


def _three(name: str, text: str) -> tuple[int, int, int]:
    try:
        t, h, w = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        fail(f"--{name} is {text!r}: give three numbers, as 4,4,4")
    return t, h, w


def _builder(
    method: str, sparsity: float, top_k: int | None, keep_queries: float | None, kv_density: float | None
) -> Any:
    """As `inspect` and `finetune` make it; complains about options of the other method."""
    import flexsparse as fs

    others: dict[str, dict[str, float | None]] = {
        "vsa": {"keep-queries": keep_queries, "kv-density": kv_density},
        "bsa": {"top-k": top_k},
    }
    if method not in others:
        fail(f"--method is {method!r}: give vsa or bsa")
    for name, value in others[method].items():
        if value is not None:
            fail(f"--{name} is {value}, but --method is {method}, which has no such option: leave one of them out")
    if not 0 <= sparsity < 1:
        fail(f"--sparsity is {sparsity}: give a share in [0, 1)")
    try:
        if method == "vsa":
            return fs.VSA(top_k=top_k) if top_k is not None else fs.VSA(sparsity=sparsity)
        return fs.BSA(
            keep_queries=0.5 if keep_queries is None else keep_queries,
            kv_density=1 - sparsity if kv_density is None else kv_density,
        )
    except ValueError as error:
        fail(str(error))


def _plot_kind(plot: Path | None, over: str | None, gpu: str) -> str:
    """The file's kind; complains before anything is counted."""
    from flexsparse.planning.machines import CPU

    if over not in (None, "density", "gpus"):
        fail(f"--plot-over is {over!r}: give density or gpus")
    if plot is None:
        if over is not None:
            fail(f"--plot-over is {over}, but no --plot is given: name a file, as --plot plan.png, or leave it out")
        return ""
    if over == "gpus" and gpu == CPU:
        fail("--plot-over is gpus, but --machine is cpu, of which one is planned: give density, or name a GPU")
    kind = plot.suffix.lstrip(".").lower()
    if kind not in ("png", "pdf", "svg"):
        fail(f"--plot is {str(plot)!r}: give a name that ends in .png, .pdf or .svg")
    if not os.path.isdir(plot.resolve().parent):
        fail(f"--plot is {str(plot)!r}, in a folder that is not there: make it first")
    return kind


def _write(plot: Path, content: bytes) -> None:
    try:
        plot.write_bytes(content)
    except OSError as error:
        fail(f"--plot is {str(plot)!r}, which cannot be written: {error.strerror}; give another file")
