"""`flexsparse check`: whether attention is computed right here, by this torch, this Triton and this GPU."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from flexsparse.cli.app import app, fail, fail_missing


@app.command()
def check(
    device: Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu or cuda.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of bfloat16, float16, float32; separated by commas.", show_default="all")
    ] = "",
    backend: Annotated[
        str,
        typer.Option(help="Of triton, gather, flex; separated by commas.", show_default="what runs here, and gather"),
    ] = "",
    compile_: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Whether to check a compiled wrapped model too.")
    ] = True,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the outcomes there.")] = None,
) -> None:
    """Compute small sparse attentions and a wrapped model's training step here, and compare them with float64.

    Outputs and all gradients, given the tiles that were selected, and the selection; ends with exit code 1 where one is
    wrong, or where --backend names one that computed no attention. Some minutes where kernels have to be compiled. It says
    nothing about speed.
    """
    try:
        import torch

        from flexsparse.checking.run import BACKENDS, Outcome, check, problems, usable
        from flexsparse.training.environment import cpu_name, versions
        from flexsparse.training.progress import make_console
    except ModuleNotFoundError as error:
        fail_missing(error)
    console = make_console()

    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    def told(outcome: Outcome) -> None:
        state, style = ("WRONG", "bold red") if outcome.wrong else ("ok", None)
        state = "cannot" if outcome.impossible else state
        numbers = "  ".join(f"{name} {error:.1e}" for name, error in outcome.errors.items())
        what = f"{state:<7} {outcome.dtype:<9} {outcome.backend:<7} {outcome.problem:<41}"
        say(f"{what} {outcome.wrong or outcome.impossible or numbers}", style)

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    names = _words(dtype)
    for name in names:
        if name not in dtypes:
            fail(f"--dtype has {name!r}: give of {', '.join(dtypes)}")
    backends = _words(backend)
    for name in backends:
        if name not in BACKENDS:
            fail(f"--backend has {name!r}: give of {', '.join(BACKENDS)}")
    try:
        at = usable(None if device == "auto" else device)
    except ValueError as error:
        fail(f"--{error}")
    place = cpu_name() if at == "cpu" else torch.cuda.get_device_name(at)
    known = versions()
    say(f"{place}, torch {known['torch']}, triton {known.get('triton', 'not installed')}")
    say("relative RMS errors of outputs and gradients against float64:")
    outcomes = check(at, [dtypes[name] for name in names] or None, backends or None, compile_, told)
    if out is not None:
        rows = [dataclasses.asdict(outcome) for outcome in outcomes]
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({"device": place, "versions": known, "outcomes": rows}, indent=1) + "\n")
        except OSError as error:
            fail(f"--json is {str(out)!r}: {error.strerror}; the outcomes are above")
    wrong = sum(outcome.wrong is not None for outcome in outcomes)
    passed = sum(outcome.passed for outcome in outcomes)
    left = len(outcomes) - wrong - passed
    others = [f"{number} {what}" for number, what in ((wrong, "WRONG"), (left, "cannot run here")) if number]
    say(", ".join([f"{passed} of {len(outcomes)} right", *others]))
    if not any(outcome.backend == "triton" for outcome in outcomes if outcome.impossible is None):
        say("The Triton templates were not checked: they run on CUDA.")
    attention = {problem.name for problem in problems()}  # a wrapped model takes the backend that it likes
    checked = {outcome.backend for outcome in outcomes if outcome.passed and outcome.problem in attention}
    unchecked = [name for name in dict.fromkeys(backends) if name not in checked]
    for name in unchecked:
        say(f"--backend {name} passed no attention here: name one that runs here (`flexsparse info`)", "bold red")
    if wrong or unchecked or not passed:
        raise typer.Exit(1)


def _words(text: str) -> list[str]:
    return [word for word in (part.strip() for part in text.split(",")) if word]
