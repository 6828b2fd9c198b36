"""A tiny diffusers Wan on several ranks against the same model in one process; runs on the ranks."""

from __future__ import annotations

import copy
import warnings
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from models.zoo import WAN as TINY
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import flexsparse as fs
from flexsparse.models import Whole

WAN = {**TINY, "num_attention_heads": 3}  # which two ranks share unevenly
STEPS = 3


def wan(checkpointing: bool = False, heads: int = 3) -> nn.Module:
    """The same on every rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import WanTransformer3DModel

        torch.manual_seed(0)
        model = WanTransformer3DModel(**{**WAN, "num_attention_heads": heads})
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def video(number: int, size: tuple[int, int, int] = (2, 16, 16)) -> dict[str, Any]:
    """One sample."""
    g = torch.Generator().manual_seed(number)
    return {
        "hidden_states": torch.randn(1, 4, *size, generator=g),
        "timestep": torch.tensor([5.0 * number + 1]),
        "encoder_hidden_states": torch.randn(1, 8, 16, generator=g),
        "return_dict": False,
    }


def wrapped(
    compile: bool | str, *, gates: bool = True, model: nn.Module | None = None, builder: Any = None, **options: Any
) -> nn.Module:
    """Gates are no longer zero; without Inductor."""
    inner = {"inner": "aot_eager"} if compile else {}
    model = wan() if model is None else model
    fs.wrap(model, builder or fs.VSA(top_k=2), tile=(2, 4, 4), gates=gates, compile=compile, **inner, **options)
    g = torch.Generator().manual_seed(1)
    for parameter in fs.gate_parameters(model) if gates else ():
        parameter.data.copy_(torch.randn(parameter.shape, generator=g) / 10)
    return model


def train(model: nn.Module, batch: list[dict[str, Any]]) -> list[float]:
    """A few steps on a batch; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        parts = [model(**sample)[0].square().mean() / len(batch) for sample in batch]
        for part in parts:
            part.backward()
        optimizer.step()
        losses.append(sum(float(part.detach()) for part in parts))
    return losses


def ddp(model: nn.Module) -> nn.Module:
    """DDP with buckets smaller than a block, as those of real models are: Dynamo would split graphs at them."""
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 2000):
        return Small(model, bucket_cap_mb=0.003)


class Small(nn.parallel.DistributedDataParallel):
    """What is compiled inside of its forward may be split at small first buckets, too."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 2000):
            return super().forward(*args, **kwargs)


def same_training(kind: str, compile: bool | str, checkpointing: bool = False) -> None:
    """Training with a sample a rank ends at the parameters of training in one process with all of them.

    Args:
        kind: ``"ddp"``; ``"fsdp"``, sharded by block; ``"fsdp root"``, as a whole; ``"fsdp first"``, sharded before wrapping;
            ``"fsdp ulysses"``, its tokens spread over the same ranks, and so one sample for all of them.
        compile: as `fs.wrap`.
        checkpointing: of activations.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    batch = [video(0 if kind == "fsdp ulysses" else number) for number in range(ranks)]
    gates = kind != "fsdp first"
    alone = wrapped(False, gates=gates, model=wan(checkpointing))
    wanted = train(alone, batch)
    mesh = init_device_mesh("cpu", (ranks,))

    def shard(model: nn.Module) -> nn.Module:
        for block in model.blocks if kind != "fsdp root" else ():
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    if kind == "fsdp first":
        model = run = wrapped(compile, gates=gates, model=shard(wan(checkpointing)))
    else:
        model = run = wrapped(compile, gates=gates, model=wan(checkpointing))
        if kind == "fsdp ulysses":
            fs.distributed.ulysses(model, mesh)
        run = ddp(model) if kind == "ddp" else shard(model)
    losses = torch.tensor(train(run, [batch[rank]]))
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / ranks, torch.tensor(wanted), rtol=1e-5, atol=1e-6)
    parameters = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        torch.testing.assert_close(whole.detach(), parameters[name].detach(), rtol=1e-4, atol=1e-6, msg=name)
    calls = [call for call in fs.report(model).calls if call.sparse]
    assert calls, "nothing was sparse"


def said(function: str, *args: Any) -> str:
    """What a function of this module raises here."""
    try:
        globals()[function](*args)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def gates_after_sharding() -> None:
    """Gates that FSDP does not know of would be trained by each rank alone."""
    model = fully_shard(wan(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    fs.wrap(model, fs.VSA(top_k=2), tile=(2, 4, 4), gates=True, compile=False)


def backend_inside_ddp() -> None:
    """Torch splits its graph at DDP's buckets."""
    model = torch.compile(wan(), backend=fs.backend(fs.VSA(top_k=2), tile=(2, 4, 4), grid=(2, 8, 8), inner="aot_eager"))
    ddp(model)(**video(0))


def gates_after_ddp() -> None:
    """Every rank trained gates of its own, without a word."""
    shell = nn.parallel.DistributedDataParallel(wan())
    fs.wrap(shell.module, fs.VSA(top_k=2), tile=(2, 4, 4), gates=True, compile=False)
    with torch.no_grad():
        shell(**video(0))
    fs.unwrap(shell.module)
    fs.wrap(shell.module, fs.VSA(top_k=2), tile=(2, 4, 4), compile=False)
    shell(**video(0))[0].sum().backward()
    fs.unwrap(shell.module)
    fs.wrap(shell.module, fs.VSA(top_k=2), tile=(2, 4, 4), gates=True, compile=False)
    shell(**video(0))


def gates_after_fsdp1() -> None:
    """As `gates_after_sharding`, by the class of before."""
    shell = FullyShardedDataParallel(wan(), use_orig_params=True, device_id=torch.device("cpu"))
    fs.wrap(shell.module, fs.VSA(top_k=2), tile=(2, 4, 4), gates=True, compile=False)


def gates_saved_by_fsdp1(path: str) -> None:
    """Parts of flat tensors; whole ones within `summon_full_params`."""
    model = wrapped(False)
    expected = {name: x.clone() for name, x in model.state_dict().items() if "to_gate" in name}
    shell = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with FullyShardedDataParallel.summon_full_params(shell):
        if dist.get_rank() == 0:
            fs.save_gates(model, path)
    dist.barrier()
    other = wrapped(False, gates=False)
    fs.wrap(fs.unwrap(other), fs.VSA(top_k=2), tile=(2, 4, 4), gates=True, compile=False)
    assert len(fs.load_gates(other, path)) == 2
    for name, x in expected.items():
        torch.testing.assert_close(other.state_dict()[name], x, rtol=0, atol=0)
    fs.save_gates(model, path)


def same_gate_files(path: str) -> None:
    """Gates that are sharded: one file of whole tensors, and read again."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = wrapped(False)
    whole = {name: x.clone() for name, x in model.named_parameters() if "to_gate" in name}
    fully_shard(model, mesh=mesh)
    fs.save_gates(model, path)
    dist.barrier()
    alone = wrapped(False)
    sharded = fully_shard(wrapped(False), mesh=mesh)
    for other in (alone, sharded):
        for parameter in fs.gate_parameters(other):
            nn.init.zeros_(parameter)
        fs.load_gates(other, path)
        for name, parameter in other.named_parameters():
            if name in whole:
                found = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
                torch.testing.assert_close(found.detach(), whole[name], rtol=0, atol=0)


def per_head_of_others(compile: bool | str) -> None:
    """Three entries for two heads: the rank whose share fits would wait for the other one."""
    builder = fs.PerHead(builders=(fs.VSA(top_k=2), fs.Dense()), heads=(0, 1, 0))
    rules = {"blocks.0": fs.Union(builder, fs.SlidingTile(window=(1, 1, 1))), "*": fs.VSA(top_k=2)}
    model = wrapped(compile, gates=False, model=wan(heads=2), builder=rules)
    fs.distributed.ulysses(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    model(**video(0))


def context_parallel(model: nn.Module) -> None:
    """diffusers' own, which asks for an accelerator."""
    from diffusers import ContextParallelConfig

    count, torch.accelerator.device_count = torch.accelerator.device_count, lambda: 1
    try:
        model.set_attention_backend("native")
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
    finally:
        torch.accelerator.device_count = count


def only_context_parallel(compile: bool | str) -> None:
    """Its backward would be dense."""
    model = wan()
    context_parallel(model)
    wrapped(compile, model=model)(**video(0))


def same_model(compile: bool | str, options: dict[str, Any]) -> list[tuple[str, bool, tuple[int, ...]]]:
    """A sequence parallel model has the output and, averaged over ranks, the gradients of the model in one process.

    Args:
        compile: as `fs.wrap`.
        options: ``checkpointing``; ``diffusers``: by way of its own context parallelism; ``sizes`` of the latents, one after
            the other; ``full``: Dynamo may not break the graph; ``autocast``: to bfloat16; the rest goes to `fs.wrap`.

    Returns:
        Name, whether it is sparse, and shape of every attention call.
    """
    options = dict(options)
    checkpointing, theirs = options.pop("checkpointing", False), options.pop("diffusers", False)
    low = options.pop("autocast", False)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=low)
    sizes, full = options.pop("sizes", [(2, 16, 16)]), {"fullgraph": True} if options.pop("full", False) else {}
    alone = wrapped(False, model=wan(checkpointing), **options)
    model = wan(checkpointing)
    if theirs:
        context_parallel(model)
    wrapped(compile, model=model, **options, **full)
    fs.distributed.ulysses(model, None if theirs else init_device_mesh("cpu", (dist.get_world_size(),)))
    for size in sizes:
        with autocast:
            wanted, got = (one(**video(3, size))[0] for one in (alone, model))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        for one, out in ((alone, wanted), (model, got)):
            one.zero_grad()
            out.square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in alone.named_parameters()}
        for name, parameter in model.named_parameters():
            # bfloat16's parts are rounded before they are summed: that of a bias of keys, a small difference, is off by 2.3 %
            _same_gradient(name, parameter, gradients[name], 4e-2 if low else 1e-4)
    return [(call.name, call.sparse, call.shape) for call in fs.report(model).calls]


def same_dense() -> None:
    """While a wrapped model runs dense, its ranks compute the dense model's output."""
    from flexsparse.wrap import state_of

    wanted = wan()(**video(3))[0]
    model = wrapped(False)
    fs.distributed.ulysses(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    model(**video(3))
    state_of(model).dense = True
    with torch.no_grad():
        torch.testing.assert_close(model(**video(3))[0], wanted)


def same_unwrapped() -> None:
    """unwrap ends sequence parallelism too; a copy made before goes on, by its own state."""
    from flexsparse.wrap import state_of

    wanted = wan()(**video(3))[0]
    model = wrapped(False, gates=False)
    sparse = model(**video(3))[0]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fs.distributed.ulysses(model, mesh)
    model(**video(3))
    copied = copy.deepcopy(model)
    assert torch.equal(fs.unwrap(model)(**video(3))[0], wanted)
    torch.testing.assert_close(copied(**video(3))[0], sparse)
    state_of(copied).dense = True
    with torch.no_grad():
        torch.testing.assert_close(copied(**video(3))[0], wanted)
    fs.distributed.ulysses(wrapped(False, gates=False, model=model), mesh)
    torch.testing.assert_close(model(**video(3))[0], sparse)


def refused(mesh_and_plan_of: str) -> list[str]:
    """What plans say that do not fit; after each the model is as it was, and one that fits works.

    Args:
        mesh_and_plan_of: ``"name"``, ``"entry"`` or ``"heads"``.
    """
    builder = fs.PerHead(builders=(fs.VSA(top_k=2), fs.Dense()), heads=(0, 1, 0))
    model = wrapped(False, gates=False, builder=builder)
    wanted = model(**video(3))[0]
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    first = dict(model._cp_plan)
    plans: dict[str, Any] = {
        "name": [{**first, "proj": Whole(1)}, {**first, "blocks.7": Whole(1)}, {**first, "proj_out.weight": Whole(1)}],
        "entry": [{**first, "blocks.1": 3}, {**first, "blocks.1": {"hidden_states": 1}}],
    }[mesh_and_plan_of]
    said_by = []
    for plan in plans:
        try:
            fs.distributed.ulysses(model, mesh, plan)
        except ValueError as error:
            said_by.append(str(error))
        assert torch.equal(model(**video(3))[0], wanted), "something was changed"
    fs.distributed.ulysses(model, mesh)
    torch.testing.assert_close(model(**video(3))[0], wanted)
    return said_by


def too_many(compile: bool | str, of_config: bool) -> str:
    """Two heads at most on more ranks."""
    model = wan(heads=1)
    if not of_config:
        model.register_to_config(num_attention_heads=8)  # so that the call has to say it
    wrapped(compile, gates=False, model=model)
    try:
        fs.distributed.ulysses(model, init_device_mesh("cpu", (dist.get_world_size(),)))
        model(**video(3))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def same_copies(compile: bool | str) -> None:
    """A copy made before (an EMA) runs by itself, whole; one made after is sequence parallel too, and each can be unwrapped."""
    builder = fs.PerHead(builders=(fs.VSA(top_k=2), fs.Dense()), heads=(0, 1, 0))
    model = wrapped(compile, gates=False, builder=builder)
    with torch.no_grad():
        wanted = model(**video(3))[0]
        before = copy.deepcopy(model)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fs.distributed.ulysses(model, mesh)
        after = copy.deepcopy(model)
        for one in (before, model, after, before):
            torch.testing.assert_close(one(**video(3))[0], wanted)
        heads = [{call.shape[1] for call in fs.report(one).calls if call.sparse} for one in (before, model)]
        assert heads == [{3}, {[2, 1][dist.get_rank()]}], "the copy is not spread"
        fs.distributed.ulysses(before, mesh)
        torch.testing.assert_close(before(**video(3))[0], wanted)


def same_module(mesh: tuple[int, int]) -> None:
    """A model of `fs.nn.VideoSelfAttention` that spreads its own tokens: output, and gradients averaged over ranks."""
    layout = fs.TileLayout(grid=(3, 7, 5), tile=(2, 4, 4), text_first=3)
    torch.manual_seed(0)
    attention = fs.nn.VideoSelfAttention(32, 4, fs.VSA(top_k=3), num_kv_heads=2)
    for parameter in fs.gate_parameters(attention):
        nn.init.normal_(parameter, std=0.1)
    names = init_device_mesh("cpu", mesh, mesh_dim_names=("tiles", "ulysses"))
    tiles, ulysses = (names[name] if names[name].size() > 1 else None for name in ("tiles", "ulysses"))
    parallel = fs.distributed.SequenceParallel(ulysses=ulysses, tiles=tiles)
    x = torch.randn(2, layout.seq_len, 32)
    wanted = attention(x, layout)
    wanted.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in attention.named_parameters()}
    attention.zero_grad()
    got = parallel.unshard(attention(parallel.shard(x, layout), layout, parallel), layout)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    got.square().mean().backward()
    for name, parameter in attention.named_parameters():
        _same_gradient(name, parameter, gradients[name])


def _same_gradient(name: str, parameter: Tensor, wanted: Tensor | None, share: float = 1e-4) -> None:
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    dist.all_reduce(grad)
    wanted = torch.zeros_like(parameter) if wanted is None else wanted
    limit = share * float(wanted.abs().max()) + 1e-8
    error = float((grad / dist.get_world_size() - wanted).abs().max())
    assert error < limit, (
        f"the gradient of {name} is off by {error:.3g}, its largest value is {float(wanted.abs().max()):.3g}"
    )


def given_other_inputs(compile: bool | str, kind: str) -> None:
    """What a sampler that gives each rank a sample of its own leads to."""
    model = wrapped(compile)
    fs.distributed.ulysses(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    rank, inputs = dist.get_rank(), video(0)
    if kind == "values":
        inputs["hidden_states"] = video(rank)["hidden_states"]
    elif kind == "shapes":
        inputs["hidden_states"] = video(0, (2 + rank, 16, 16))["hidden_states"]
    elif kind == "times":
        inputs["timestep"] = torch.tensor([1 + rank])
    with torch.set_grad_enabled(kind != "gradients" or rank == 0):
        model(**inputs)


def given_nearly_the_same() -> None:
    """Each rank may have made its text by itself."""
    model = wrapped(False)
    fs.distributed.ulysses(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    inputs = video(0)
    text = inputs["encoder_hidden_states"]
    inputs["encoder_hidden_states"] = text + dist.get_rank() * 4e-3 * text.abs() * torch.randn_like(text)
    model(**inputs)
    model(**video(1, (3, 16, 16)))
