"""The fusion that is refused, and what enters the key of Inductor's cache beside the graph."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import output_code
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._library.custom_ops import OPDEFS
from torch.fx import Graph
from torch.nn import functional as F

import flexsparse.compiler  # noqa: F401  (defines every op)
from flexsparse.compile_passes import fusion_guard
from flexsparse.compile_passes.fusion_guard import CacheTag, compile_guarded, source_files, sources_hash


def four_maps(x: Tensor, shift: Tensor, scale: Tensor, *weights: Tensor) -> Tensor:
    """Of normalised, modulated tokens that lie channel by channel, as a patch convolution leaves them."""
    h = F.layer_norm(x.mT, (x.shape[1],)) * (1 + scale) + shift
    return sum(((h @ w) * (i + 1)).sin() for i, w in enumerate(weights))  # type: ignore[return-value]


def gradients(function: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    C = 32
    inputs = [x.requires_grad_() for x in (torch.randn(1, C, 250), *torch.randn(2, C), *torch.randn(4, C, C))]
    return torch.autograd.grad(function(*inputs).square().mean(), inputs)


def largest_error(found: tuple[Tensor, ...]) -> float:
    """Against eager, of the largest gradient of each input."""
    exact = gradients(four_maps)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, exact, strict=True))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="Inductor vectorises otherwise here"
)
def test_a_miscompiled_fusion_is_refused() -> None:
    """pytorch issue 185702: a LayerNorm's gradient comes out wrong by more than its size, without a word."""
    assert largest_error(gradients(torch.compile(four_maps, backend=partial(compile_guarded, config={})))) < 1e-4
    torch._dynamo.reset()
    wrong = largest_error(gradients(torch.compile(four_maps))) > 0.1
    assert wrong == (torch.__version__ < "2.14"), "no longer: `GuardedChoices` may go, or is wanted again"


@pytest.mark.usefixtures("fresh_dynamo")
def test_strides_of_what_forward_saves_stay_symbolic(monkeypatch: pytest.MonkeyPatch) -> None:
    """As numbers of the first input, backward takes them for its own where they differ from the traced ones."""
    told: list[Any] = []
    tell = output_code.set_tracing_context_output_strides

    def listen(*arguments: Any) -> None:
        tell(*arguments)
        told.extend(torch._guards.TracingContext.get().output_strides or ())

    monkeypatch.setattr(output_code, "set_tracing_context_output_strides", listen)
    monkeypatch.setattr(
        torch._functorch.config, "enable_autograd_cache", False
    )  # what comes out of it was traced before
    compiled = torch.compile(
        lambda x: x.sin().cumsum(1).sin(), backend=partial(compile_guarded, config={}), dynamic=True
    )
    compiled(torch.randn(3, 5, requires_grad=True)).sum().backward()
    rows = [strides[0] for strides in told if strides is not None and len(strides) == 2]
    assert rows and all(isinstance(stride, torch.SymInt) for stride in rows), told


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("by_user", (None, True))
def test_reductions_are_not_mixed_where_sizes_are_symbolic(
    by_user: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At some millions of numbers, on a GPU, torch stops at the gradients of a norm of text and video together."""
    key, seen = "triton.mix_order_reduction", []

    def compiles(gm: torch.fx.GraphModule, *_: Any, config_patches: dict[str, Any], **__: Any) -> Any:
        seen.append(config_patches.get(key))
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compiles)
    given = {} if by_user is None else {key: by_user}
    double = torch.compile(lambda x: x * 2, backend=lambda gm, inputs: compile_guarded(gm, inputs, given))
    for size in (5, 7):
        double(torch.zeros(size))
    assert hasattr(torch._inductor.config.triton, "mix_order_reduction"), "what is set is a setting"
    assert seen == ([None, False] if by_user is None else [True, True])


def test_every_op_is_defined_in_a_hashed_file() -> None:
    ops = [op for name, op in OPDEFS.items() if name.startswith("flexsparse::")]
    assert len(ops) > 10
    for op in ops:
        assert Path(inspect.getfile(op._init_fn)).resolve() in {path.resolve() for path in source_files()}


def test_a_changed_source_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "op.py"
    monkeypatch.setattr(fusion_guard, "source_files", lambda: [source])
    found = []
    for text in ("words = 1", "words = 2"):
        source.write_text(text)
        sources_hash.cache_clear()
        found.append(CacheTag().uuid())
    sources_hash.cache_clear()
    assert found[0] != found[1]


def test_a_users_pass_keeps_its_say() -> None:
    class Pass(CustomGraphPass):
        def __init__(self, name: str | None) -> None:
            self.name, self.ran = name, 0

        def __call__(self, graph: Graph) -> None:
            self.ran += 1

        def uuid(self) -> str | None:
            return self.name

    named, nameless = Pass("a"), Pass(None)
    tag = CacheTag(named)
    tag(torch.fx.symbolic_trace(torch.nn.Identity()).graph)
    assert named.ran == 1
    assert tag.uuid() not in (CacheTag().uuid(), CacheTag(Pass("b")).uuid())
    assert CacheTag(nameless).uuid() is None, "a pass without an identity forbids caching"
    assert CacheTag(lambda graph: None).uuid() is None
