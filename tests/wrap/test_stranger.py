"""`fs.wrap` on models that know nothing of it, and what it says when it cannot help."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexsparse as fs
from flexsparse.compile_passes import RewriteError
from flexsparse.masks import CoarseInputs, MaskBuilder

from .conftest import Stranger

WAYS: list[Any] = [True, "regional", False]


def clip(T: int = 4, H: int = 16, W: int = 16) -> Tensor:
    return torch.randn(1, 3, T, H, W, generator=torch.Generator().manual_seed(T + H * W))


def inner(way: Any) -> dict[str, Any]:
    return {"compile": way, "inner": "aot_eager"}


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_transformer(stranger: Stranger, way: Any) -> None:
    with torch.no_grad():
        dense = stranger(clip())
    fs.wrap(stranger, fs.VSA(top_k=4), gates=True, **inner(way))
    with torch.no_grad():
        torch.testing.assert_close(stranger(clip()), dense, atol=1e-5, rtol=0)
    stranger(clip()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fs.gate_parameters(stranger))
    calls = fs.report(stranger).calls
    assert [call.name for call in calls] == ["blocks.0", "blocks.1"]
    assert all(call.sparse and call.density == 1.0 for call in calls)


@pytest.mark.parametrize("way", [True, False])
def test_a_grid_given_as_a_function(way: Any) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, tokens: Tensor, frames: int) -> Tensor:
            q, k, v = (m(tokens).unflatten(-1, (2, 16)).transpose(1, 2) for m in (self.q, self.k, self.v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model = Flat()
    x = torch.randn(1, 256, 32)
    with torch.no_grad():
        dense = model(x, 4)
        with pytest.raises(ValueError, match=r"grid is None.*no patch_size.*give grid="):
            fs.wrap(model, fs.VSA(top_k=4))
        fs.wrap(
            model,
            fs.VSA(top_k=4),
            grid=lambda module, args, kwargs: (args[1], 8, args[0].shape[1] // args[1] // 8),
            **inner(way),
        )
        torch.testing.assert_close(model(x, 4), dense, atol=1e-5, rtol=0)


def test_a_shell_around_a_model_is_refused_and_what_is_in_it_wrapped(stranger: Stranger) -> None:
    """As peft's, or data parallelism's: its own forward takes whatever the model's does."""
    shell = nn.DataParallel(stranger)
    with pytest.raises(ValueError, match=r"DataParallel\.forward names no argument.*wrap the model inside of it"):
        fs.wrap(shell, fs.VSA(top_k=1), compile=False)
    fs.wrap(shell.module, fs.VSA(top_k=1), compile=False)
    shell(torch.randn(1, 3, 4, 16, 16))
    assert fs.report(stranger).sparse_calls == 2


@pytest.mark.parametrize("way", [True, False])
def test_torchs_own_multi_head_attention(way: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2))
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.patch(x).flatten(2).transpose(1, 2)
            return h + self.attention(h, h, h, need_weights=False)[0]

    torch.manual_seed(0)
    model = Model()
    dense = model(clip())
    fs.wrap(model, fs.VSA(top_k=2), **inner(way))
    sparse = model(clip())
    assert fs.report(model).sparse_calls == 1
    assert 1e-4 < (sparse - dense).abs().max() < 1
    fs.unwrap(model)
    fs.wrap(model, fs.VSA(top_k=4), **inner(way))
    torch.testing.assert_close(model(clip()), dense, atol=1e-5, rtol=0)


class Diagonal:
    """A builder of a user's own: a query tile keeps itself."""

    def select(self, q: Tensor, k: Tensor, layout: fs.TileLayout, **_: Any) -> fs.TileSelection:
        keep = torch.eye(layout.num_tiles, dtype=torch.bool, device=q.device)
        return fs.TileSelection.from_mask(keep.expand(*q.shape[:2], -1, -1), layout)


class Telling(Diagonal):
    def nominal_density(self, layout: fs.TileLayout, kv_layout: fs.TileLayout) -> float:
        return 1 / layout.num_tiles


class Planned(MaskBuilder):
    """As `Diagonal`, on the base class, which does not know its density."""

    def plan(self, coarse: CoarseInputs, v: Tensor | None = None) -> tuple[fs.TileSelection, Tensor | None]:
        return Diagonal().select(coarse.q, coarse.k, coarse.layout), None


@pytest.mark.parametrize("way", [True, False])
@pytest.mark.parametrize(
    ("builder", "density"), [(Diagonal(), "?"), (Telling(), "0.250"), (Planned(), "?")], ids=["none", "own", "base"]
)
def test_the_report_of_a_builder_of_ones_own(stranger: Stranger, way: Any, builder: Any, density: str) -> None:
    fs.wrap(stranger, builder, **inner(way))
    stranger(clip())
    lines = str(fs.report(stranger)).splitlines()
    assert [line.split()[4] for line in lines[2:]] == [density, density]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_to_make_sparse_is_an_error_that_says_what_was_seen(stranger: Stranger, way: Any) -> None:
    class Masked(Stranger):
        pass

    for block in stranger.blocks:
        block.forward = lambda x, b=block: (
            x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]
        )
    fs.wrap(stranger, fs.VSA(top_k=2), **inner(way))
    with pytest.raises(RewriteError, match=r"(?s)no attention in .* to make sparse.*it is causal"):
        stranger(clip())


@pytest.mark.parametrize("way", [True, False])
def test_no_attention_at_all_is_an_error(way: Any) -> None:
    model = nn.Sequential(nn.Conv3d(3, 8, (1, 2, 2), (1, 2, 2)), nn.GELU())
    fs.wrap(model, fs.VSA(top_k=2), **inner(way))
    with pytest.raises(RewriteError, match="no scaled_dot_product_attention call at all"):
        model(clip())
    compiled = torch.compile(nn.Linear(4, 4), backend=fs.backend(fs.VSA(top_k=2), grid=(4, 8, 8)))
    with pytest.raises(Exception, match="no scaled_dot_product_attention call at all"):
        compiled(torch.randn(2, 4))


def test_another_number_of_sparse_calls_than_expected_is_an_error(stranger: Stranger) -> None:
    model = torch.compile(stranger, backend=fs.backend(fs.VSA(top_k=2), grid=(4, 8, 8), expect=3))
    with pytest.raises(Exception, match=r"expect is 3 sparse attention calls, but this graph has 2"):
        model(clip())


def test_a_given_grid_that_is_not_the_inputs_raises(stranger: Stranger) -> None:
    """Equal token counts: only the input tells that the permutation would be another's."""
    fs.wrap(stranger, fs.VSA(top_k=2), grid=(4, 8, 8), compile=False)
    stranger(clip())
    with pytest.raises(ValueError, match=r"grid is \(4, 8, 8\), but the input's grid is \(4, 4, 16\)"):
        stranger(clip(4, 8, 32))
    model = torch.compile(fs.unwrap(stranger), backend=fs.backend(fs.VSA(top_k=2), grid=(4, 8, 8)))
    with pytest.raises(Exception, match=r"(?s)256 tokens of grid \(4, 8, 8\).*192 queries and 192 keys are not"):
        model(clip(3, 16, 16))


def test_another_compiler_cannot_run_a_wrapped_model_densely(stranger: Stranger) -> None:
    fs.wrap(stranger, fs.VSA(top_k=2), compile=False)
    with pytest.raises(RuntimeError, match="compiled by another backend, which would leave its attention dense"):
        torch.compile(stranger, backend="aot_eager")(clip())


def test_too_large_a_top_k_is_one_line_before_compiling(stranger: Stranger) -> None:
    fs.wrap(stranger, fs.VSA(top_k=5))
    with pytest.raises(ValueError, match=r"^VSA top_k is 5, but grid \(4, 8, 8\) has 4 tiles .*give at most 4[^\n]*$"):
        stranger(clip())


def breaking(block: nn.Module) -> type[nn.Module]:
    class Breaking(type(block)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    return Breaking


def test_a_graph_break_is_an_error_and_the_region_a_remedy(stranger: Stranger) -> None:
    stranger.blocks[1].__class__ = breaking(stranger.blocks[1])
    fs.wrap(stranger, fs.VSA(top_k=4), **inner(True))
    with pytest.raises(
        RewriteError, match=r"(?s)breaks the graph.*compile='regional'.*compile=False.*torch says:.*graph_break"
    ):
        stranger(clip())
    fs.unwrap(stranger)
    fs.wrap(stranger, fs.VSA(top_k=4), **inner(False))
    stranger(clip())
    assert fs.report(stranger).sparse_calls == 2


@pytest.mark.parametrize("way", [True, "regional"])
@pytest.mark.parametrize("dense", ["min_tokens", "DenseSteps"])
def test_a_graph_break_of_what_runs_dense_says_the_same(stranger: Stranger, dense: str, way: Any) -> None:
    stranger.blocks[1].__class__ = breaking(stranger.blocks[1])
    stranger._repeated_blocks = ["Breaking"]
    least = {"min_tokens": 10**6} if dense == "min_tokens" else {}
    fs.wrap(stranger, fs.VSA(top_k=4), **least, **inner(way))
    if dense == "DenseSteps":
        fs.DenseSteps(stranger, 0.5, 2)
    with torch.no_grad(), pytest.raises(RewriteError, match=r"(?s)breaks the graph.*compile=False.*torch says:"):
        stranger(clip())


def test_wrapping_twice_and_unwrapping_nothing_are_errors(stranger: Stranger) -> None:
    with pytest.raises(ValueError, match="not wrapped"):
        fs.unwrap(stranger)
    with pytest.raises(ValueError, match="not wrapped"):
        fs.report(stranger)
    fs.wrap(stranger, fs.VSA(top_k=2))
    with pytest.raises(ValueError, match=r"wrapped already.*unwrap"):
        fs.wrap(stranger, fs.VSA(top_k=2))


def test_a_backend_around_a_wrapped_model_does_not_take_its_place(stranger: Stranger) -> None:
    """Its own builder was used in place of the wrapped model's, as an error of ours had advised."""
    fs.wrap(stranger, {"blocks.0": fs.VSA(top_k=1), "*": None}, compile=False)
    step = torch.compile(lambda x: stranger(x), backend=fs.backend(fs.VSA(top_k=4), grid=(4, 8, 8), inner="aot_eager"))
    with pytest.raises(Exception, match=r"wrapped by flexsparse, and was compiled by a flexsparse\.backend.*unwrap it"):
        step(clip())


def test_a_module_that_a_dense_model_has_too(stranger: Stranger) -> None:
    """Uncompiled, what two models share ran outside of the wrapped one's forward: an error about checkpoints."""
    other = Stranger()
    other.blocks[0].mlp = stranger.blocks[0].mlp
    expected, alone = other(clip()), stranger.blocks[0].mlp(torch.ones(1, 3, 32))
    fs.wrap(stranger, fs.VSA(top_k=2), compile=False)
    torch.testing.assert_close(other(clip()), expected, atol=0, rtol=0)
    torch.testing.assert_close(stranger.blocks[0].mlp(torch.ones(1, 3, 32)), alone, atol=0, rtol=0)
    with pytest.raises(RuntimeError, match="part of a wrapped model runs outside of the model's forward"):
        stranger.blocks[0](torch.ones(1, 256, 32))
    with pytest.raises(
        ValueError, match=r"^blocks\.0\.mlp \(Sequential\) is blocks\.0\.mlp of a wrapped model, too.*copy"
    ):
        fs.wrap(other, fs.VSA(top_k=2), compile=False)
    fs.unwrap(stranger)
    for model in (stranger, other):
        fs.wrap(model, fs.VSA(top_k=2), **inner(True))
    assert other(clip()).isfinite().all() and stranger(clip()).isfinite().all()


def test_a_module_of_a_wrapped_model_is_not_wrapped_by_itself(stranger: Stranger) -> None:
    """Compiled, the model is one graph, which knows nothing of it: it was accepted and had no effect."""
    block = stranger.blocks[1]
    fs.wrap(stranger, fs.VSA(top_k=2))
    with pytest.raises(ValueError, match=r'model is blocks\.1 of a wrapped Stranger.*unwrap.*\{"blocks\.1\*": builder'):
        fs.wrap(block, fs.VSA(top_k=4), grid=(4, 8, 8))
    fs.unwrap(stranger)
    fs.wrap(block, fs.VSA(top_k=4), grid=(4, 8, 8))
    with pytest.raises(ValueError, match=r"^blocks\.1 \(Block\) is wrapped already"):
        fs.wrap(stranger, fs.VSA(top_k=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"builder": "vsa"}, "builder is 'vsa'.*give a mask builder"),
        ({"builder": fs.VSA}, r"builder is <class .*VSA'>: give a mask builder, such as .*VSA\(sparsity=0.9\)"),
        ({"compile": "blocks"}, "compile is 'blocks'.*True, False or 'regional'"),
        ({"grid": (4, 0, 8)}, r"grid is \(4, 0, 8\).*at least 1"),
        ({"grid": 64}, "grid is 64: give three ints"),
        ({"grid": "4,8,8"}, "grid is '4,8,8': give three ints"),
        ({"tile": (4, 4)}, r"tile is \(4, 4\).*three ints"),
        ({"tile": 4}, "tile is 4: give three ints"),
        ({"query_tile": (4, 4)}, r"query_tile is \(4, 4\): give three ints"),
        ({"min_tokens": "4096"}, "min_tokens is '4096': give a number of tokens"),
        ({"attention": "sage"}, "attention is 'sage': give one of auto, reference, gather"),
        ({"min_token": 4096}, r"options has min_token: give arguments of wrap \(.*min_tokens.*torch.compile \(dynamic"),
        ({"min_token": 4096, "compile": False}, "options has min_token: give arguments of wrap"),
        ({"backend": "triton"}, r"options has backend: give arguments of wrap \(.*attention"),
        ({"disable": True}, "options has disable"),
        ({"gates": ["nothing.*"]}, "gates has 'nothing.*', which matches no module"),
        ({"gates": True, "builder": fs.BSA()}, "gates are on, but BSA has no coarse output"),
        ({"compile": False, "fullgraph": True}, "go to torch.compile, but compile is False"),
        ({"inner": "eager"}, "inner is 'eager'"),
    ],
)
def test_bad_arguments(stranger: Stranger, arguments: dict[str, Any], message: str) -> None:
    names = list(stranger.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        fs.wrap(stranger, **{"builder": fs.VSA(top_k=2), **arguments})
    assert list(stranger.state_dict()) == names
    assert not any("flexsparse" in key for module in stranger.modules() for key in vars(module))


@pytest.mark.parametrize("option", ["min_token", "gates", "wrapped", "dynamic", "foo"])
def test_an_option_that_a_backend_does_not_have(option: str) -> None:
    with pytest.raises(
        TypeError, match=rf"options has {option}: give builder, tile, grid, .*min_tokens.*torch.compile"
    ):
        fs.backend(fs.VSA(top_k=2), grid=(4, 8, 8), **{option: True})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"the grid function returned None: return \(T, H, W\)"),
        ((4, 8), r"the grid function returned \(4, 8\): return \(T, H, W\)"),
        ((4, 16 / 2, 8), r"the grid function returned \(4, 8\.0, 8, 0, 0\): return ints \(divide sizes by //\)"),
        ((4, 0, 8), r"grid is \(4, 0, 8\)"),
    ],
)
@pytest.mark.parametrize("way", [True, False])
def test_bad_grid_functions(stranger: Stranger, way: Any, returned: Any, message: str) -> None:
    fs.wrap(stranger, fs.VSA(top_k=2), grid=lambda module, args, kwargs: returned, **inner(way))
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        stranger(clip())


@pytest.mark.parametrize("way", WAYS)
def test_a_backend_that_cannot_is_called_as_the_argument(stranger: Stranger, way: Any) -> None:
    """Compiled, torch's `BackendCompilerFailed` stood around it."""
    fs.wrap(stranger, fs.VSA(top_k=2), attention="flex", **inner(way))
    with pytest.raises(ValueError, match=r"^attention is 'flex', which cannot do this case: .*no backward on CPU"):
        stranger(clip())


def test_one_pattern_of_gates_is_a_name(stranger: Stranger) -> None:
    fs.wrap(stranger, fs.VSA(top_k=2), gates="blocks.0", compile=False)
    assert [name for name in stranger.state_dict() if "gate" in name] == [
        "blocks.0.to_gate_compress.weight",
        "blocks.0.to_gate_compress.bias",
    ]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_compiled_already_is_refused(stranger: Stranger, way: Any) -> None:
    with pytest.raises(ValueError, match=r"made by torch\.compile: wrap the module that was given to it"):
        fs.wrap(torch.compile(stranger), fs.VSA(top_k=2), compile=way)
    stranger.blocks[1].compile()
    with pytest.raises(ValueError, match=r"^blocks\.1 is compiled already, by its compile\(\): leave that out"):
        fs.wrap(stranger, fs.VSA(top_k=2), compile=way)
    assert not any("flexsparse" in key for module in stranger.modules() for key in vars(module))


def test_a_part_of_a_wrapped_model(stranger: Stranger) -> None:
    fs.wrap(stranger.blocks[1], fs.VSA(top_k=2), grid=(4, 8, 8), compile=False)
    with pytest.raises(ValueError, match=r"^blocks\.1 \(Block\) is wrapped already: call flexsparse\.unwrap"):
        fs.wrap(stranger, fs.VSA(top_k=2), compile=False)
    fs.unwrap(stranger.blocks[1])
    fs.wrap(stranger, fs.VSA(top_k=2), compile=False)
    with pytest.raises(ValueError, match=r"Block is blocks\.1 of a wrapped model: unwrap the model itself"):
        fs.unwrap(stranger.blocks[1])
    stranger(clip())
    assert fs.report(stranger).sparse_calls == 2


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 checks a masked index in C++ that does not compile (AVX-512)"
)
def test_inductor_equals_eager_in_outputs_and_gradients() -> None:
    """Whole models, diffusers' and without gradients are slow tests: two small blocks here."""
    torch.manual_seed(1)
    eager = Stranger()
    model = fs.wrap(copy.deepcopy(eager), fs.VSA(top_k=2), gates=True, compile="regional")
    fs.wrap(eager, fs.VSA(top_k=2), gates=True, compile=False, attention="reference")
    for each in (model, eager):
        for parameter in fs.gate_parameters(each):
            nn.init.constant_(parameter, 0.1)
        each(clip()).square().mean().backward()
    for (name, mine), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert [call.backend for call in fs.report(model).calls if call.sparse] == ["gather"] * 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("strict", [True, False])
def test_a_wrapped_model_is_not_exported(stranger: Stranger, strict: bool) -> None:
    """The exported graph would have been dense."""
    fs.wrap(stranger, fs.VSA(top_k=2), compile=False)
    with pytest.raises(Exception, match=r"a wrapped model is not exported.*unwrap it to export it dense"):
        torch.export.export(stranger, (clip(),), strict=strict)
    with pytest.raises(NotImplementedError, match="a wrapped model is not exported"):
        torch.jit.trace(stranger, (clip(),))
    exported = torch.export.export(fs.unwrap(stranger), (clip(),), strict=strict)
    torch.testing.assert_close(exported.module()(clip()), stranger(clip()))


def test_a_wrapped_model_is_not_pickled(stranger: Stranger) -> None:
    fs.wrap(stranger, fs.VSA(top_k=2), compile=False)
    with pytest.raises(TypeError, match=r"a wrapped model is not pickled: save its state_dict\(\), or unwrap it"):
        torch.save(stranger, io.BytesIO())
    torch.save(fs.unwrap(stranger), io.BytesIO())


class Unfinished:
    def select(self, q: Tensor, k: Tensor, layout: fs.TileLayout, **_: Any) -> Tensor:
        return torch.ones(*q.shape[:2], layout.num_tiles, layout.num_tiles)


def test_a_builder_of_ones_own_that_returns_something_else(stranger: Stranger) -> None:
    fs.wrap(stranger, Unfinished(), compile=False)
    with pytest.raises(TypeError, match=r"^Unfinished\.select returned Tensor: return a TileSelection \(.*from_mask"):
        stranger(clip())
    layout = fs.TileLayout(grid=(4, 8, 8))
    with pytest.raises(TypeError, match=r"keep is torch\.float32: give bool"):
        fs.TileSelection.from_mask(Unfinished().select(*torch.zeros(2, 1, 2, 256, 8), layout), layout)


def test_min_tokens_and_extra_tokens() -> None:
    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, tokens: Tensor) -> Tensor:
            q, k, v = self.qkv(tokens).chunk(3, -1)
            return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]

    torch.manual_seed(0)
    model = Joint()
    x = torch.randn(2, 256 + 7, 16)
    dense = model(x)
    fs.wrap(model, fs.VSA(top_k=4), grid=(4, 8, 8), text_last=7, compile=False)
    torch.testing.assert_close(model(x), dense, atol=1e-5, rtol=0)
    fs.unwrap(model)
    fs.wrap(model, fs.VSA(top_k=4), grid=(4, 8, 8), text_last=7, compile=False, min_tokens=1000)
    assert torch.equal(model(x), dense)  # too short a video is no mistake
    assert "below min_tokens=1000" in str(fs.report(model))


@pytest.mark.parametrize("way", WAYS)
def test_a_wrapped_forward_shows_its_arguments(stranger: Stranger, way: Any) -> None:
    """Pipelines, peft and hooks look at signatures."""
    before = [inspect.signature(module.forward) for module in (stranger, stranger.blocks[0])]
    fs.wrap(stranger, fs.VSA(top_k=2), compile=way)
    assert [inspect.signature(module.forward) for module in (stranger, stranger.blocks[0])] == before
