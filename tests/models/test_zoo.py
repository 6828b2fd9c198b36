"""`fs.wrap` on models that people use: the right calls become sparse, and however they run, the numbers are the oracle's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from as_on_gpu import run_templates
from torch import Tensor, nn

import flexsparse as fs
from flexsparse.compile_passes import RewriteError

from .zoo import ZOO, Entry, Size

GRID, OTHER = (4, 8, 8), (3, 8, 12)
ALL = 4  # tiles of GRID
COMPILED = [(name, way) for name, e in ZOO.items() for way, can in ((True, e.whole), ("regional", e.regional)) if can]
QUICK = {("hunyuan", True), ("cogvideox", True), ("hunyuan15", "regional")}  # the others' compiled forms are slow tests


def cases(quick: set[tuple[str, Any]]) -> list[Any]:
    """Every model and way; those that are not quick are marked slow."""
    return [pytest.param(*c, marks=() if c in quick else pytest.mark.slow, id=f"{c[0]}-{c[1]}") for c in COMPILED]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(model: nn.Module, entry: Entry, grid: Size = GRID, batch: int = 2) -> Tensor:
    """The model's sample."""
    return model(**entry.inputs(grid, batch), return_dict=False)[0]


def gradients(model: nn.Module, entry: Entry, *grids: Size) -> dict[str, Tensor]:
    """Gradients of every parameter after one backward on each grid."""
    model.zero_grad()
    for grid in grids:
        run(model, entry, grid).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def wrapped(entry: Entry, builder: Any, way: Any, gates: bool = False, **options: Any) -> nn.Module:
    """The model wrapped; its gates, if any, are not zero."""
    model = fs.wrap(entry.model(), builder, compile=way, gates=gates, **{"inner": "aot_eager", **options})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in fs.gate_parameters(model):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def sparse_names(model: nn.Module) -> list[str]:
    """Modules whose attention became sparse (a model that runs samples one by one has several calls in each)."""
    return sorted({call.name.split(" ")[0] for call in fs.report(model).calls if call.sparse})


@pytest.mark.parametrize("name", ZOO)
def test_uncompiled_all_tiles_equal_dense_and_fewer_do_not(name: str) -> None:
    """Two samples with text of different lengths: masks are honoured exactly, text attends to all and is attended by all."""
    entry = ZOO[name]
    with torch.no_grad():
        dense = run(entry.model(), entry)
        everything = wrapped(entry, fs.VSA(top_k=ALL), False)
        torch.testing.assert_close(run(everything, entry), dense, atol=1e-5, rtol=0)
        assert (run(wrapped(entry, fs.VSA(top_k=1), False), entry) - dense).abs().max() > 1e-3
    assert sparse_names(everything) == sorted(entry.sparse)


class Watching:
    """A builder that notes the layouts and the queries it is asked about."""

    def __init__(self) -> None:
        self.layouts: list[fs.TileLayout] = []
        self.queries: list[Tensor] = []

    def select(self, q: Tensor, k: Tensor, layout: fs.TileLayout, **options: Any) -> fs.TileSelection:
        self.layouts.append(layout)
        self.queries.append(q)
        return fs.VSA(top_k=2).select(q, k, layout, **options)


@pytest.mark.parametrize("name", ZOO)
def test_the_layout_says_where_video_and_text_are(name: str) -> None:
    """In the first block, other text or history changes the queries of its places, and of no other."""
    entry, watching = ZOO[name], Watching()
    model = wrapped(entry, watching, False)
    inputs = entry.inputs(GRID, 1)
    with torch.no_grad():
        model(**inputs, return_dict=False)
        other = {name: value + 1 for name, value in inputs.items() if name.startswith(("encoder_hidden", "latents_"))}
        model(**{**inputs, **other}, return_dict=False)
    assert {(one.grid, one.text_first, one.text_last) for one in watching.layouts} == {(GRID, *entry.extra(GRID))}
    before, after = watching.queries[0], watching.queries[len(watching.queries) // 2]
    changed = (before != after).any(-1).any(1)[0]
    first, last = entry.extra(GRID)
    video = changed[first : changed.shape[0] - last]
    if name != "mochi":  # its time embedding reads the text
        assert not video.any()
    assert changed[:first].all() if first else True
    assert changed[changed.shape[0] - last :].any() if last else True


@pytest.mark.parametrize("name", ZOO)
def test_uncompiled_training_with_gates_equals_the_oracle(name: str) -> None:
    """A gate on every attention that sees the video, and on no other; two resolutions."""
    entry = ZOO[name]
    mine = wrapped(entry, fs.VSA(top_k=2), False, gates=True)
    added = {key.rpartition(".to_gate_compress")[0] for key in mine.state_dict() if "to_gate_compress" in key}
    assert added == set(entry.sparse)
    assert_same(gradients(mine, entry, GRID, OTHER), reference_gradients(entry, fs.VSA(top_k=2)))


def reference_gradients(entry: Entry, builder: Any) -> dict[str, Tensor]:
    """Of the uncompiled model whose sparse attention the oracle computes."""
    return gradients(wrapped(entry, builder, False, gates=True, attention="reference"), entry, GRID, OTHER)


def assert_same(mine: dict[str, Tensor], other: dict[str, Tensor], gated: bool = True) -> None:
    """Every gradient is there in both, and equal; those of gates among them are not zero.

    A compiled block gives zeros to parameters whose results the model drops, where an uncompiled one gives nothing.
    """
    assert mine and other.keys() <= mine.keys()
    for name, grad in mine.items():
        expected = other.get(name, torch.zeros_like(grad))
        torch.testing.assert_close(grad, expected, atol=2e-6, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}")
    gates = [grad for name, grad in mine.items() if "to_gate_compress" in name]
    assert bool(gates) == gated and all(grad.abs().sum() > 0 for grad in gates)


@pytest.mark.parametrize(("name", "way"), cases({("hunyuan", True)}))
def test_compiled_training_with_gates_equals_the_oracle(name: str, way: Any) -> None:
    """One resolution; the next test takes two."""
    check_training(ZOO[name], way, GRID)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), cases(set()))
def test_compiled_training_on_two_resolutions(name: str, way: Any) -> None:
    check_training(ZOO[name], way, GRID, OTHER)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the templates on the GPU")
@pytest.mark.parametrize(("name", "way"), cases(set()))
def test_the_templates_train_it(name: str, way: Any) -> None:
    """Ops do what they do on a GPU, in Triton's interpreter; the first grid's graph, and the one for all others."""
    check_training(ZOO[name], way, GRID, OTHER, templates=True)


def check_training(entry: Entry, way: Any, *grids: Size, templates: bool = False) -> None:
    """Gradients of the compiled model, gates included, are the oracle's, and its calls are the fused ones."""
    with pytest.MonkeyPatch.context() as patch:
        if templates:
            run_templates(patch)
        model = wrapped(entry, fs.VSA(top_k=2), way, gates=True)
        mine = gradients(model, entry, *grids)
    oracle = wrapped(entry, fs.VSA(top_k=2), False, gates=True, attention="reference")
    assert_same(mine, gradients(oracle, entry, *grids))
    assert sparse_names(model) == sorted(entry.sparse)
    calls = [call for call in fs.report(model).calls if call.sparse]
    assert all(call.fused and call.lowered for call in calls)


@pytest.mark.parametrize(("name", "way"), cases(QUICK))
def test_compiled_inference_all_tiles_equal_dense(name: str, way: Any) -> None:
    entry = ZOO[name]
    with torch.no_grad():
        model = wrapped(entry, fs.VSA(top_k=ALL), way)
        torch.testing.assert_close(run(model, entry), run(entry.model(), entry), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hunyuan", "cogvideox"])
def test_inductor_equals_the_oracle(name: str) -> None:
    """Text before and after the video, through generated code, with and without gradients."""
    entry = ZOO[name]
    model = wrapped(entry, fs.VSA(top_k=2), True, gates=True, inner="inductor")
    assert_same(gradients(model, entry, GRID, OTHER), reference_gradients(entry, fs.VSA(top_k=2)))
    with torch.no_grad():
        expected = run(wrapped(entry, fs.VSA(top_k=2), False, gates=True, attention="reference"), entry)
        torch.testing.assert_close(run(model, entry), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["hunyuan", "cogvideox", "mochi"])
@pytest.mark.parametrize(
    "builder", [fs.BSA(keep_queries=0.5, kv_density=0.4), fs.TopP(mass=0.6), fs.SlidingTile(window=(1, 1, 1))]
)
def test_other_builders_with_text(name: str, builder: Any) -> None:
    entry = ZOO[name]
    with torch.no_grad():
        expected = run(wrapped(entry, builder, False, attention="reference"), entry)
        torch.testing.assert_close(run(wrapped(entry, builder, False), entry), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", [True, False])
def test_text_that_the_mask_hides_changes_nothing(way: Any) -> None:
    """Compiled inference takes FlexAttention, uncompiled the gather backend."""
    entry = ZOO["hunyuan"]
    model = wrapped(entry, fs.VSA(top_k=2), way)
    inputs = entry.inputs(GRID, 2)
    hidden = inputs["encoder_attention_mask"] == 0
    assert hidden.any()
    with torch.no_grad():
        before = model(**inputs, return_dict=False)[0]
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].masked_fill(hidden[..., None], 7.0)
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], before, atol=1e-6, rtol=0)
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].masked_fill(~hidden[..., None], 7.0)
        assert (model(**inputs, return_dict=False)[0] - before).abs().max() > 1e-3


@pytest.mark.parametrize("way", [True, False])
def test_a_mask_with_a_hole_is_never_taken_for_a_prefix(way: Any) -> None:
    """The model itself makes a prefix of its text mask, so the mask is changed where the attention reads it."""

    class Holed(nn.Module):
        def __init__(self, hides: int) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.hides = hides

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 1, 8)).permute(2, 0, 3, 1, 4)
            mask = torch.arange(x.shape[1]) != self.hides
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None, None])

    x = torch.randn(1, 70, 8)
    for hides, what in ((65, "no prefix"), (3, "hides video tokens")):
        plain = Holed(hides)
        model = fs.wrap(
            nn.Sequential(plain), fs.VSA(top_k=1), grid=(4, 4, 4), text_last=6, compile=way, inner="aot_eager"
        )
        if way is True:  # what it hides is known when it runs
            with pytest.raises(ValueError, match=rf"(?s)attention mask of a sparse call .*{what}.*dense_layers"):
                model(x)
        else:
            with pytest.raises(RewriteError, match=what):  # its only attention stayed dense
                model(x)


@pytest.mark.parametrize(
    ("name", "way", "says"),
    [
        ("hunyuan15", True, r"(?s)breaks the graph.*compile='regional'.*data-dependent"),
        ("mochi", True, r"(?s)depends on data.*use compile=False"),
        ("mochi", "regional", r"(?s)depends on data.*use compile=False"),
    ],
)
def test_what_cannot_be_compiled_says_what_can(name: str, way: Any, says: str) -> None:
    with pytest.raises(RewriteError, match=says), torch.no_grad():
        run(wrapped(ZOO[name], fs.VSA(top_k=2), way), ZOO[name])


@pytest.mark.parametrize(
    ("name", "way"), [("wan", True), ("hunyuan", False), pytest.param("cogvideox", True, marks=pytest.mark.slow)]
)
def test_lora(name: str, way: Any) -> None:
    """peft's layers around the projections: they are found, gates too, and only they and the gates get gradients."""
    peft = pytest.importorskip("peft")
    entry = ZOO[name]

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            targets = ["to_q", "to_k", "to_v"]
            model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))  # type: ignore[operator]
        return model

    mine = fs.wrap(adapted(entry.model()), fs.VSA(top_k=2), gates=True, compile=way, inner="aot_eager")
    other = fs.wrap(adapted(entry.model()), fs.VSA(top_k=2), gates=True, compile=False, attention="reference")
    found = gradients(mine, entry, GRID)
    assert_same(found, gradients(other, entry, GRID))
    assert all("lora" in key or "to_gate_compress" in key for key in found)
    assert {key.split(".to_")[0] for key in found if "to_gate_compress" in key} == set(entry.sparse)


@pytest.mark.parametrize(
    "way", [pytest.param(True, marks=pytest.mark.slow), pytest.param("regional", marks=pytest.mark.slow), False]
)
def test_checkpointed_joint_blocks(way: Any) -> None:
    entry = ZOO["hunyuan"]
    model = entry.model().train()
    model.enable_gradient_checkpointing()  # type: ignore[operator]
    model = fs.wrap(model, fs.VSA(top_k=2), compile=way, inner="aot_eager")
    expected = gradients(wrapped(entry, fs.VSA(top_k=2), False, attention="reference").train(), entry, GRID, OTHER)
    assert_same(gradients(model, entry, GRID, OTHER), expected, gated=False)


@pytest.mark.parametrize("way", [True, False])
def test_autocast(way: Any) -> None:
    entry = ZOO["cogvideox"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dense = run(entry.model(), entry)
        everything = run(wrapped(entry, fs.VSA(top_k=ALL), way), entry)
    with torch.no_grad():
        exact = run(entry.model(), entry)
    assert (everything - exact).abs().mean() < 2 * (dense - exact).abs().mean()


def test_compile_repeated_blocks_of_diffusers() -> None:
    entry = ZOO["hunyuan"]
    model = wrapped(entry, fs.VSA(top_k=2), False)
    model.compile_repeated_blocks()  # type: ignore[operator]
    with torch.no_grad():
        expected = run(wrapped(entry, fs.VSA(top_k=2), False, attention="reference"), entry)
        torch.testing.assert_close(run(model, entry), expected, atol=1e-5, rtol=0)
    assert sparse_names(model) == sorted(entry.sparse)
