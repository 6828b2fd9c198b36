"""`fs.nn.VideoSelfAttention`."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

import flexsparse as fs

LAYOUT = fs.TileLayout(grid=(3, 6, 7), text_last=3)


@pytest.mark.parametrize("builder", [fs.VSA(sparsity=0.5), fs.BSA(kv_density=0.4), fs.TopP(mass=0.6)])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"qk_norm": False, "rope": False, "head_dim": 16}])
def test_backends_agree_and_everything_trains(builder: Any, options: dict[str, Any]) -> None:
    attention = fs.nn.VideoSelfAttention(48, 4, builder, **options)
    for name, parameter in attention.named_parameters():
        if "gate" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, LAYOUT.seq_len, 48)
    outs, grads = [], []
    for backend in ("reference", "gather"):
        attention.backend = backend
        attention.zero_grad()
        out = attention(x, LAYOUT)
        out.square().mean().backward()
        outs.append(out.detach())
        grads.append({name: p.grad.clone() for name, p in attention.named_parameters()})
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-4)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-5, rtol=1e-3)
        assert grad.abs().sum() > 0, name


def test_the_gate_starts_at_zero() -> None:
    torch.manual_seed(0)
    gated = fs.nn.VideoSelfAttention(32, 2, fs.VSA(top_k=2))
    plain = fs.nn.VideoSelfAttention(32, 2, fs.VSA(top_k=2), gate=False)
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if "gate" not in k})
    x = torch.randn(1, LAYOUT.seq_len, 32)
    assert torch.equal(gated(x, LAYOUT), plain(x, LAYOUT))
    assert set(gated.state_dict()) - set(plain.state_dict()) == {"to_gate_compress.weight", "to_gate_compress.bias"}
    assert len(fs.gate_parameters(gated)) == 2


def test_rope_makes_logits_depend_on_distance_only() -> None:
    """A query and a key moved by the same step give the same logit; extra tokens are not rotated."""
    layout = fs.TileLayout(grid=(4, 5, 6), text_first=2)
    cos, sin = fs.nn.rope_frequencies(layout, 24)
    x, y = torch.randn(24), torch.randn(24)

    def at(vector: torch.Tensor, t: int, h: int, w: int) -> torch.Tensor:
        place = 2 + (t * 5 + h) * 6 + w
        return fs.nn.rotate(vector.view(1, 1, 1, -1), cos[place], sin[place]).flatten()

    step = at(x, 0, 1, 2) @ at(y, 1, 2, 3)
    torch.testing.assert_close(at(x, 2, 2, 1) @ at(y, 3, 3, 2), step)
    assert (at(x, 0, 1, 2) @ at(y, 1, 2, 4) - step).abs() > 1e-4
    assert torch.equal(cos[:2], torch.ones(2, 12))


def test_a_gate_whose_memory_comes_later_starts_at_zero() -> None:
    """FSDP and trainers make modules on meta, then memory, then call `reset_parameters`."""
    with torch.device("meta"):
        attention = fs.nn.VideoSelfAttention(32, 2, fs.VSA(top_k=2))
    attention.to_empty(device="cpu")
    for parameter in attention.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    for module in attention.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not any(bool(p.any()) for p in fs.gate_parameters(attention))
    assert bool(attention.to_q.weight.any())


def test_rope_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever comes first, in inference mode too; compiled, in the graph."""
    made: list[str] = []
    make = fs.nn.rope_frequencies
    monkeypatch.setattr(fs.nn, "rope_frequencies", lambda at, *a, **k: (made.append(at.order), make(at, *a, **k))[1])
    layouts = [fs.TileLayout(grid=(2, 8, 9), tile=(2, 8, 1), order=order) for order in ("raster", "tiles")]
    layers = [fs.nn.VideoSelfAttention(32, 2, fs.VSA(top_k=2)) for _ in range(2)]
    x = torch.randn(1, 144, 32)
    with torch.inference_mode():
        expected = [layers[0](x, layout) for layout in layouts]
    for layer in layers:
        for layout in layouts:
            layer(x, layout).sum().backward()
    assert made == ["raster", "tiles"]
    compiled = torch.compile(layers[0], backend="aot_eager", fullgraph=True)
    for layout, out in zip(layouts, expected):
        torch.testing.assert_close(compiled(x, layout), out, atol=1e-5, rtol=1e-4)
    assert len(made) > 2


@pytest.mark.parametrize("text", [{}, {"text_first": 16, "text_last": 32}])
def test_tile_order_computes_the_numbers_of_raster_order(text: dict[str, int]) -> None:
    raster = fs.TileLayout(grid=(4, 4, 6), tile=(2, 4, 2), **text)
    tiles = dataclasses.replace(raster, order="tiles")
    attention = fs.nn.VideoSelfAttention(48, 2, fs.VSA(top_k=2)).double()
    x = torch.randn(2, raster.seq_len, 48, dtype=torch.float64)
    expected = attention(x, raster)
    torch.testing.assert_close(raster.to_raster(attention(raster.to_tiles(x), tiles)), expected)
    unrotated = fs.nn.VideoSelfAttention(48, 2, fs.VSA(top_k=2), rope=False).double()
    unrotated.load_state_dict(attention.state_dict())
    assert (unrotated(x, raster) - expected).abs().max() > 1e-3
    for order, other in zip(fs.nn.rope_frequencies(tiles, 24), fs.nn.rope_frequencies(raster, 24)):
        assert torch.equal(order, raster.to_tiles(other))


@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    attention = fs.nn.VideoSelfAttention(32, 2, fs.VSA(sparsity=0.5))
    x = torch.randn(1, LAYOUT.seq_len, 32)
    compiled = torch.compile(attention, fullgraph=True)
    torch.testing.assert_close(compiled(x, LAYOUT), attention(x, LAYOUT), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 50, "num_heads": 4}, "dim is 50 and num_heads is 4"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3: give a divisor of num_heads=4"),
        ({"num_heads": 0}, "VideoSelfAttention num_heads is 0: give an int of at least 1"),
        ({"dim": 0}, "VideoSelfAttention dim is 0: give an int of at least 1"),
        ({"dim": 48.0}, r"VideoSelfAttention dim is 48\.0: give an int"),
        ({"num_kv_heads": 0}, "VideoSelfAttention num_kv_heads is 0: give an int of at least 1"),
        ({"head_dim": 0}, "VideoSelfAttention head_dim is 0: give an int of at least 1"),
        ({"backend": "foo"}, "backend is 'foo': give one of auto, reference, gather, flex, triton"),
        ({"head_dim": 7}, "head_dim is 7: rope=True needs an even one"),
        ({"builder": fs.BSA(), "gate": True}, "BSA has no coarse output"),
        ({"builder": "vsa"}, "builder is 'vsa': give a mask builder"),
        ({"builder": fs.VSA}, "builder is <class .*VSA'>: give a mask builder"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        fs.nn.VideoSelfAttention(**{"dim": 48, "num_heads": 4, "builder": fs.VSA(top_k=2), **arguments})


def test_a_copy_follows_the_schedule_and_has_weights_of_its_own() -> None:
    """An average of the weights (an EMA) would have stayed at the sparsity of the step at which it was made."""
    schedule = fs.SparsitySchedule(target=0.75, step=0.75, every=1)
    layout = fs.TileLayout(grid=(4, 8, 8), tile=(2, 4, 4))
    model = torch.nn.Sequential(fs.nn.VideoSelfAttention(32, 2, fs.VSA(sparsity=schedule)))
    own, average = model[0], copy.deepcopy(model)[0]
    x = torch.randn(1, layout.seq_len, 32)
    dense = average(x, layout)
    schedule.advance()
    assert torch.equal(own(x, layout), average(x, layout)) and not torch.equal(dense, own(x, layout))
    with torch.no_grad():
        own.to_q.weight.zero_()  # type: ignore[operator,union-attr]
    assert average.to_q.weight.any()  # type: ignore[operator,union-attr]


def test_a_copy_of_a_compiled_module_computes_with_its_own_weights() -> None:
    """What `compile()` makes holds the module that it was called on."""
    layout = fs.TileLayout(grid=(4, 8, 8), tile=(2, 4, 4))
    own = fs.nn.VideoSelfAttention(32, 2, fs.VSA(top_k=2))
    own.compile(backend="eager")
    other, x = copy.deepcopy(own), torch.randn(1, layout.seq_len, 32)
    expected = own(x, layout)
    with torch.no_grad():
        own.to_out.weight.zero_()
    assert not torch.equal(own(x, layout), expected)
    torch.testing.assert_close(other(x, layout), expected, atol=1e-6, rtol=0)


def test_exported() -> None:
    layout = fs.TileLayout(grid=(4, 8, 8), tile=(2, 4, 4), text_last=3)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = fs.nn.VideoSelfAttention(32, 2, fs.VSA(top_k=2))
            torch.nn.init.normal_(self.attention.to_gate_compress.weight)  # type: ignore[arg-type,union-attr]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, layout)

    model, x = Model(), torch.randn(2, layout.seq_len, 32)
    samples = torch.export.Dim("samples", min=1, max=8)
    exported = torch.export.export(model, (x,), strict=True, dynamic_shapes=({0: samples},)).module()
    for given in (x, torch.randn(3, layout.seq_len, 32)):
        torch.testing.assert_close(exported(given), model(given), atol=1e-6, rtol=0)


def test_a_grid_is_no_layout() -> None:
    with pytest.raises(TypeError, match=r"layout is \(4, 8, 8\): give a TileLayout\(grid="):
        fs.nn.VideoSelfAttention(32, 2, fs.VSA(top_k=2))(torch.zeros(1, 256, 32), (4, 8, 8))  # type: ignore[arg-type]
