"""Gates as safetensors files, under our names and FastVideo's.

A gate is a module of its attention, so a model's `save_pretrained` writes it; `from_pretrained` makes the plain model again and
drops it with a warning of diffusers' own. So a checkpoint with gates is loaded in three steps::

    model = WanTransformer3DModel.from_pretrained(folder)
    fs.wrap(model, fs.VSA(sparsity=0.9), gates=True)       # warns that the folder has gates, which the model has not yet
    fs.load_gates(model, folder)
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from flexsparse.gates import FINE, NAME, gate_modules
from flexsparse.rules import plain_name

FORMAT = "flexsparse-gates"


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError("saving and loading gates needs safetensors: pip install 'flexsparse[gates]'") from None
    return safetensors


def _fastvideo_name(name: str) -> str:
    """FastVideo keeps a gate beside its attention module, in the block."""
    return name.rpartition(".")[0]


def settings_of(model: nn.Module) -> dict[str, str]:
    """What a file of gates says of the model that they were trained in: strings, as safetensors' metadata wants them."""
    import flexsparse

    found = {"format": FORMAT, "flexsparse": flexsparse.__version__}
    state = model.__dict__.get("_flexsparse")
    if state is not None:
        backend = state.backend
        found["builder"] = json.dumps({pattern: None if b is None else repr(b) for pattern, b in backend.rules.rules})
        found["tile"] = json.dumps(backend.tile)
    return found


def save_gates(model: nn.Module, path: str | Path, names: Literal["flexsparse", "fastvideo"] = "flexsparse") -> None:
    """Write every gate to a safetensors file; the builder's settings, tile and version are in its metadata.

    Args:
        model: wrapped with gates. Where FSDP2 has sharded them every rank calls this, and the first one writes.
        path: the file to write.
        names: ``"flexsparse"`` for ``blocks.0.attn1.to_gate_compress.weight``, ``"fastvideo"`` for
            ``blocks.0.to_gate_compress.weight``.

    Raises:
        ValueError: the model has no gates, or two in one block, which FastVideo's names cannot tell apart; or FSDP1 holds them
            in flat tensors of its own.
        FileNotFoundError: the folder that the file would be in does not exist.
        OSError: it cannot be written; what it held before is untouched.
    """
    if names not in ("flexsparse", "fastvideo"):
        raise ValueError(f"names is {names!r}: give 'flexsparse' or 'fastvideo'")
    tensors: dict[str, Tensor] = {}
    first = True
    for name, own, gate in gate_modules(model):
        holder = name if names == "flexsparse" else _fastvideo_name(name)
        for kind, value in _values(f"{name}.{own}".lstrip("."), gate):
            key = f"{holder}.{own}.{kind}".lstrip(".")
            if key in tensors:
                raise ValueError(f"names is 'fastvideo', but {holder} has two gates: save them with names='flexsparse'")
            first = first and not (_is_sharded(value) and torch.distributed.get_rank())
            whole = _whole(value.detach())
            shared = any(whole.data_ptr() == other.data_ptr() for other in tensors.values())
            tensors[key] = whole.clone() if shared else whole  # of gates that are tied each key has the value
    if not tensors:
        raise ValueError(f"{type(model).__name__} has no gates: wrap it with gates=True before saving them")
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"path is {path}, but there is no folder {folder}: make it first")
    from flexsparse.training.files import write_atomically  # not with the library: commands share it

    if first:
        write_atomically(Path(path), _safetensors().torch.save(tensors, metadata=settings_of(model)))


def _values(name: str, gate: nn.Linear) -> Iterator[tuple[str, Tensor]]:
    """Weight and bias of a gate as it computes with them, a parametrised one (`weight_norm`) too."""
    weight, bias = getattr(gate, "weight", None), getattr(gate, "bias", None)
    if weight is None or weight.dim() != 2:
        raise ValueError(
            f"the gate {name} is part of a flat tensor of FSDP1's: call save_gates within "
            "FullyShardedDataParallel.summon_full_params(model)"
        )
    yield "weight", weight
    if bias is not None:
        yield "bias", bias


def _is_sharded(x: Tensor) -> bool:
    return hasattr(x, "device_mesh")  # a DTensor; torch without distributed has no such class


def _whole(x: Any) -> Tensor:
    """All of what FSDP2 has sharded, for which every rank is needed; gathered by the mesh's backend, and kept on the CPU."""
    whole: Tensor = x.to(x.device_mesh.device_type).full_tensor().cpu() if _is_sharded(x) else x
    return whole.contiguous()


def _shard(whole: Tensor, like: Any) -> Tensor:
    """This rank's part of what every rank has read."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _files(path: Path) -> list[Path]:
    """The file, or a folder's files: a model's, or a pipeline's with transformers in sub-folders."""
    if path.is_dir():
        return sorted([*path.glob("*.safetensors"), *path.glob("transformer*/*.safetensors")])
    return [path] if path.is_file() else []


def _open(path: Path) -> Any:
    try:
        return _safetensors().safe_open(str(path), framework="pt")
    except _safetensors().SafetensorError as error:
        raise ValueError(
            f"{path} is no safetensors file ({error}): give one that save_gates wrote, or a model's"
        ) from None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every gate in a file or folder, and the metadata of the first file that has some.

    Raises:
        ValueError: two files have different values for one gate.
    """
    found: dict[str, Tensor] = {}
    origin: dict[str, Path] = {}
    metadata: dict[str, str] = {}
    for file_path in _files(path):
        with _open(file_path) as file:
            for key in file.keys():  # noqa: SIM118
                if f"{NAME}." in key or f"{FINE}." in key:
                    value = file.get_tensor(key)
                    if key in found and not torch.equal(found[key], value):
                        raise ValueError(
                            f"path is {path}, where {origin[key]} and {file_path} have different values for {key}: give one of "
                            "these files, or the folder of one transformer"
                        )
                    found[key], origin[key] = value, file_path
                    metadata = metadata or file.metadata() or {}
    return found, metadata


def _assign(model: nn.Module, found: dict[str, Tensor], path: Path) -> Iterator[tuple[Tensor, str, str | None]]:
    """(parameter, its name, the key that fits it or None), shapes checked."""
    gates = list(gate_modules(model))
    prefix = _prefix(model, [own for pair in gates for own in _keys_of(*pair[:2])], found)
    for name, own, gate in gates:
        if is_parametrized(gate):
            raise ValueError(
                f"the gate {name}.{own} is parametrized, so that its weight cannot be set: load gates first, or call "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        for kind, parameter in gate.named_parameters():
            options = [f"{prefix}{key}.{kind}" for key in _keys_of(name, own)]
            key = next((key for key in options if key in found), None)
            if key is not None and found[key].shape != parameter.shape:
                raise ValueError(
                    f"{key} in {path} is {tuple(found[key].shape)}, the model's gate {tuple(parameter.shape)}"
                )
            yield parameter, options[0].removeprefix(prefix), key


def _keys_of(name: str, own: str) -> list[str]:
    """What a gate may be called, ours first."""
    return [f"{holder}.{own}".lstrip(".") for holder in (name, _fastvideo_name(name))]


def _prefix(model: nn.Module, names: list[str], found: dict[str, Tensor]) -> str:
    """What stands before every name in a file (``module.``, ``model.diffusion_model.``): that with which most of them fit.

    A name that is one of the model's own modules has none: it is that module's gate and no other's.
    """
    modules = {plain_name(name) for name, _ in model.named_modules()}
    fits: Counter[str] = Counter()
    for key in found:
        gate = key.rpartition(".")[0]
        prefixes = {gate[: len(gate) - len(name)] for name in names if f".{gate}".endswith(f".{name}")}
        fits.update({""} & prefixes if gate.rpartition(".")[0] in modules else prefixes)
    return max(fits, key=lambda prefix: (fits[prefix], not prefix), default="")


def load_gates(model: nn.Module, path: str | Path, strict: bool = True) -> list[str]:
    """Read gates from safetensors: a file of `save_gates`, a model's checkpoint, or one with FastVideo's names.

    Args:
        model: wrapped with gates; where FSDP2 has sharded them every rank calls this.
        path: a file, or a folder of `save_pretrained` (a model's, or a pipeline's); other tensors are ignored.
        strict: whether every gate of the model must be there, and the other way round.

    Returns:
        Names of the gates that were loaded, as the file has them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: keys or shapes that do not fit, or a file of another kind; nothing is loaded then.
    """
    path = Path(path)
    if not _files(path):
        raise FileNotFoundError(
            f"path is {path}: there is no such file; give a safetensors file with gates, or a folder of them"
        )
    found, metadata = _read(path)
    fits = list(_assign(model, found, path))
    used = [key for _, _, key in fits if key is not None]
    missing = [name for _, name, key in fits if key is None]
    extra = sorted(set(found) - set(used))
    twice = sorted({key for key in used if used.count(key) > 1})
    if twice:
        raise ValueError(
            f"{twice[0]} in {path} fits two gates of the model: wrap with gates=[names] of one attention a block, and "
            "leave the other dense (dense_layers)"
        )
    if not used or (strict and (missing or extra)):
        fine = " and the training's fine_gates" if any(f"{FINE}." in name for name in (*missing, *extra)) else ""
        raise ValueError(
            f"{path} and the model do not fit: missing in the file {missing or 'none'}, unknown to the model "
            f"{extra or 'none'}; wrap with gates=True{fine} first, or load with strict=False"
        )
    _compare(metadata, settings_of(model), path)
    with torch.no_grad():
        for target, _, key in fits:
            if key is not None:
                target.copy_(_shard(found[key], target) if _is_sharded(target) else found[key])
    return sorted({key.rpartition(".")[0] for key in used})


def _compare(file: dict[str, str], own: dict[str, str], path: Path) -> None:
    """Warn where gates were trained with other tiles: what they weigh, the coarse output, is another then."""
    if file.get("format") == FORMAT and "tile" in file and "tile" in own and file["tile"] != own["tile"]:
        warnings.warn(
            f"the gates in {path} were trained with tile={file['tile']}, and the model is wrapped with tile={own['tile']}: the "
            "coarse output that they weigh is another one",
            stacklevel=3,
        )


def warn_of_dropped_gates(model: nn.Module) -> None:
    """Warn where the folder that a diffusers model came from has gates: `from_pretrained` knows no such weights."""
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(source, str | Path) or not str(source) or not Path(source).is_dir():
        return
    try:
        safetensors = _safetensors()
    except ImportError:
        return  # nothing was read from such files either
    folders: dict[str, tuple[Path, list[str]]] = {}
    for file_path in _files(Path(source)):
        with safetensors.safe_open(str(file_path), framework="pt") as file:
            keys = [key for key in file.keys() if f"{NAME}." in key]  # noqa: SIM118
        if keys:
            folders.setdefault(str(file_path.parent), (file_path, keys))
    if folders:
        file_path, keys = next(iter(folders.values()))
        warnings.warn(
            f"{file_path} has {len(keys)} tensors of gates ({keys[0]}, ...), which from_pretrained dropped: wrap with "
            f"gates=True, then call flexsparse.load_gates(model, {' or '.join(map(repr, folders))})",
            stacklevel=3,
        )
