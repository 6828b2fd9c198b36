"""Tiny diffusers models whose attention joins text with the video, on several ranks against one process; runs on the ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from models.zoo import ZOO, Size
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import flexsparse as fs
from distributed.training import _same_gradient
from flexsparse import calls
from flexsparse.models import KNOWN, Part

GRID = (3, 5, 5)  # 75 tokens in partial tiles
ROUNDED = {
    "kandinsky5": 1e-2
}  # its rotary code rounds q, k and their gradients to bfloat16, whatever the model's dtype
BATCH = 2  # whose texts have different lengths


def model_of(name: str, heads: int, config: dict[str, Any], checkpointing: bool = False) -> nn.Module:
    """One of the zoo, with other numbers; the same on every rank."""
    kind, numbers = ZOO[name].make
    of_heads = {"model_dim": 16 * heads} if name == "kandinsky5" else {"num_attention_heads": heads}
    model = dataclasses.replace(ZOO[name], make=(kind, {**numbers, **of_heads, **config})).model()
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def inputs_of(name: str, grid: Size, rotary: int = 0) -> dict[str, Any]:
    """A call, where ``rotary`` is the head dim of position tables, for a model that is given them."""
    inputs = {**ZOO[name].inputs(grid, BATCH), "return_dict": False}
    if rotary and name == "allegro":
        inputs["image_rotary_emb"] = _of_axes(grid, rotary)
    elif rotary:
        angles = torch.randn(grid[0] * grid[1] * grid[2], rotary, generator=torch.Generator().manual_seed(2))
        inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
    return inputs


def _of_axes(grid: Size, dim: int) -> tuple[Any, tuple[Tensor, ...]]:
    """As Allegro's pipeline makes them: a table for each axis, and every token's place on it."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    tables = [get_1d_rotary_pos_embed(dim // 3, n, use_real=True, repeat_interleave_real=False) for n in grid]
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid)).T[:, None]
    return tuple(tables), tuple(places)


@contextmanager
def selections() -> Iterator[list[fs.TileSelection]]:
    """What uncompiled calls select meanwhile."""
    found: list[fs.TileSelection] = []
    plan = calls.plan

    def spy(*args: Any) -> Any:
        planned = plan(*args)
        found.append(planned[0])
        return planned

    calls.plan = spy
    try:
        yield found
    finally:
        calls.plan = plan


def same_joint(name: str, compile: bool | str, options: dict[str, Any]) -> list[tuple[str, bool, tuple[int, ...]]]:
    """Name, whether it is sparse, and shape of every attention call, of a model that is `compared`."""
    *_, model = compared(name, compile, options)
    return [(call.name, call.sparse, call.shape) for call in fs.report(model).calls]


def compared(name: str, compile: bool | str, options: dict[str, Any]) -> Iterator[nn.Module]:
    """Output, gradients averaged over the ranks, and, uncompiled, the very tiles of the model in one process.

    Args:
        name: of the zoo.
        compile: as `fs.wrap`.
        options: ``heads``; ``config`` of the model; ``rotary`` head dim of given position tables; ``checkpointing``; ``grids``,
            one after the other; ``inputs`` besides the zoo's; the rest goes to `fs.wrap`.

    Yields:
        The model, after each grid.
    """
    options = dict(options)
    ranks = dist.get_world_size()
    heads, config, rotary = options.pop("heads", ranks + 1), options.pop("config", {}), options.pop("rotary", 0)
    checkpointing, grids = options.pop("checkpointing", False), options.pop("grids", [GRID])
    more = options.pop("inputs", {})
    options = {"gates": True, "builder": fs.VSA(top_k=2), **options}
    alone, model = (model_of(name, heads, config, checkpointing) for _ in range(2))
    fs.wrap(alone, tile=(2, 4, 4), compile=False, **options)
    fs.wrap(model, tile=(2, 4, 4), compile=compile, **({"inner": "aot_eager", **options} if compile else options))
    for one in (alone, model) if options["gates"] else ():
        g = torch.Generator().manual_seed(1)
        for parameter in fs.gate_parameters(one):
            parameter.data.copy_(torch.randn(parameter.shape, generator=g) / 10)
    fs.distributed.ulysses(model, init_device_mesh("cpu", (ranks,)))
    for grid in grids:
        inputs = {**inputs_of(name, grid, rotary), **more}
        with selections() as wanted_tiles:
            wanted = alone(**inputs)[0]
        with selections() as got_tiles:
            got = model(**inputs)[0]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        if not compile:
            own = slice(*fs.distributed.heads.Heads(heads, heads, ranks).query(dist.get_rank()))
            _same_tiles(got_tiles, wanted_tiles, own)
        for one, out in ((alone, wanted), (model, got)):
            one.zero_grad()
            out.square().mean().backward()
        gradients = {name_: parameter.grad for name_, parameter in alone.named_parameters()}
        for name_, parameter in model.named_parameters():
            _same_gradient(name_, parameter, gradients[name_], ROUNDED.get(name, 1e-4))
        yield model


def same_short(name: str, compile: bool | str, options: dict[str, Any]) -> None:
    """With ``min_tokens`` between two videos' numbers of tokens, both have the output of one process; whatever comes first.

    Args:
        name: of the zoo.
        compile: as `fs.wrap`.
        options: as `compared`; without grids, wrapping or training.
    """
    heads, config, rotary = 3, options.get("config", {}), options.get("rotary", 0)
    alone, model = (model_of(name, heads, config) for _ in range(2))
    for one, how in ((alone, False), (model, compile)):
        inner = {"inner": "aot_eager"} if how else {}
        fs.wrap(one, fs.VSA(sparsity=0.5), tile=(2, 4, 4), compile=how, min_tokens=60, **inner)
    fs.distributed.ulysses(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    for grid in (GRID, (2, 3, 4), GRID):
        inputs = inputs_of(name, grid, rotary)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs)[0], alone(**inputs)[0], rtol=1e-4, atol=1e-5)


def _same_tiles(got: list[fs.TileSelection], wanted: list[fs.TileSelection], heads: slice) -> None:
    assert len(got) == len(wanted) > 0
    for mine, whole in zip(got, wanted):
        assert torch.equal(mine.keep(), whole.keep()[:, heads]), "other tiles are selected"
        counts: list[Tensor | None] = [one.tile_counts for one in (mine, whole)]
        assert (counts[0] is None) == (counts[1] is None)
        assert counts[0] is None or torch.equal(*counts), "other text lengths"


def said(kind: str) -> str:
    """What a case that cannot be says on this rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "data":  # how many tokens a call of Mochi has
        model = fs.wrap(
            model_of("mochi", 3, {}), fs.VSA(top_k=2), tile=(2, 4, 4), compile="regional", inner="aot_eager"
        )
        fs.distributed.ulysses(model, mesh)
        return _raised(model, inputs_of("mochi", GRID))
    model = fs.wrap(model_of("hunyuan", 3, {}), fs.VSA(top_k=2), tile=(2, 4, 4), compile=False)
    plan = dict(KNOWN["HunyuanVideoTransformer3DModel"].plan)
    if kind == "joined":  # a sequence that holds text
        plan["context_embedder"] = {0: Part(1, 3)}
    if kind == "name":
        plan["transformer_blocks.0"] = {"latents": Part(1, 3)}
    try:
        fs.distributed.ulysses(model, mesh, plan)
    except ValueError as error:
        return str(error)
    if kind == "mask":  # one that hides a video token of each rank
        model.transformer_blocks[0].register_forward_pre_hook(_hide_first)
    return _raised(model, inputs_of("hunyuan", GRID))


def _hide_first(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    mask = args[3].clone()
    mask[..., 0] = False
    return (*args[:3], mask, *args[4:])


def _raised(model: nn.Module, inputs: dict[str, Any]) -> str:
    try:
        model(**inputs)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing"
