"""Probes of a dense model, on a tiny one with random weights."""

import json
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flexsparse as fs
from bench.study import bsa_rules, capture, overlaps, probes
from bench.study.batch import Batch
from bench.study.settings import Size
from flexsparse.demo.model import VideoDiT
from flexsparse.layout import TileLayout
from flexsparse.selection import TileSelection

SIZE = Size(name="tiny", dim=32, depth=2, heads=2, patch=4, frames=4, height=32, width=32)
TILE = (2, 4, 4)
LAYOUT = TileLayout(grid=SIZE.grid, tile=TILE)
WHOSE = {"size", "model", "layer", "level"}
KEYS = {
    "training_free": {"kind", "method", "option", "density", "error", "recall"} | WHOSE,
    "training_free_loss": {"kind", "size", "model", "method", "option", "density", "loss", "levels"},
    "bsa_rule": {"kind", "rule", "keep_queries", "kv_density", "density", "error", "pruned_error"} | WHOSE,
    "overlap": {"kind", "method", "axis", "overlap", "random"} | WHOSE,
}
MAY_BE_NONE = {"pruned_error", "kv_density"}


@pytest.fixture
def model() -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(dim=SIZE.dim, depth=SIZE.depth, heads=SIZE.heads, patch=SIZE.patch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # as made, nothing depends on attention
            if parameter.dim() > 1:
                parameter.normal_(std=0.02 if "modulation" in name else 0.3)
            elif "modulation" in name:
                parameter.view(6, -1)[2] = 3.0  # the gate of attention, which else is a small part of what is written
            elif "norm_q" in name or "norm_k" in name:
                parameter.fill_(2.0)
    return model


def held_out(windows: int = 2, levels: tuple[float, ...] = (0.25, 0.75)) -> list[Batch]:
    draws = torch.Generator().manual_seed(1)
    shape = (1, 3, SIZE.frames, SIZE.height, SIZE.width)
    return [
        Batch(
            clean=torch.randn(shape, generator=draws),
            noise=torch.randn(shape, generator=draws),
            t=torch.tensor([level]),
        )
        for _ in range(windows)
        for level in levels
    ]


def attention(tile: tuple[int, int, int] = (2, 2, 2), sharp: float = 3.0, spread: float = 0.3) -> capture.Attention:
    """Queries and keys that are like those of their own tile of 2x2x2, and of a few others."""
    draws = torch.Generator().manual_seed(2)
    layout = TileLayout(grid=SIZE.grid, tile=tile)
    fine = TileLayout(grid=SIZE.grid, tile=(2, 2, 2))
    centres = torch.randn(1, 2, fine.num_tiles, 1, 16, generator=draws).expand(-1, -1, -1, fine.slots, -1).flatten(2, 3)
    base = fine.to_raster(centres)
    q, k = (sharp * base + spread * torch.randn(base.shape, generator=draws) for _ in range(2))
    v = torch.randn(base.shape, generator=draws)
    return capture.Attention(layer=0, level=0.5, window=0, layout=layout, q=q, k=k, v=v)


def by(rows: Iterable[dict[str, Any]], *keys: str) -> dict[Any, dict[str, Any]]:
    found = {tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]]: row for row in rows}
    return found


def probabilities(one: capture.Attention) -> Tensor:
    """Dense attention ``[H, S, S]``."""
    return ((one.q[0] @ one.k[0].mT) / math.sqrt(one.q.shape[-1])).softmax(-1)


def token_mask(selection: TileSelection) -> Tensor:
    """Pairs of tokens whose tiles are kept, bool ``[H, S, S]``; whether a query is computed aside."""
    T, H, W = selection.layout.tiles
    t, h, w = selection.layout.sides
    index = torch.arange(T * H * W).view(T, H, W)
    tile = index.repeat_interleave(t, 0).repeat_interleave(h, 1).repeat_interleave(w, 2).flatten()
    return selection.keep()[0][:, tile][:, :, tile]


def test_captured_is_what_attention_is_called_with(model: VideoDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, seen = held_out()[0], []
    dense = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: (seen.append((q, k, v)), dense(q, k, v))[1])
    layers = capture.captured(model, batch)
    assert len(layers) == len(seen) == SIZE.depth
    for found, given in zip(layers, seen):
        for x, y in zip(found, given):
            assert x.shape == (1, SIZE.heads, SIZE.tokens, SIZE.head_dim)
            assert torch.equal(x, y) and not x.requires_grad
    assert not torch.equal(layers[0][0], layers[1][0])


def test_model_is_as_it_was_even_after_an_error(model: VideoDiT) -> None:
    bad = Batch(clean=torch.zeros(1, 5, 4, 32, 32), noise=torch.zeros(1, 5, 4, 32, 32), t=torch.tensor([0.5]))
    with pytest.raises(RuntimeError):
        capture.captured(model, bad)
    assert all("project" not in vars(block.attn) for block in model.blocks)
    with pytest.raises(RuntimeError):
        list(probes.training_free_losses(model, [held_out()[0], bad], SIZE, "x", tile=TILE))
    with pytest.raises(ValueError, match="not wrapped"):
        fs.unwrap(model)


def test_probes_have_the_contract_s_rows_and_leave_the_model(model: VideoDiT) -> None:
    batches, told = held_out(), []
    model.train()
    model.blocks[0].eval()
    weights = {key: value.clone() for key, value in model.state_dict().items()}

    def modules() -> list[tuple[str, bool, set[str]]]:
        known = {"_compiled_call_impl"}  # every module has it from its class, as None
        return [(name, module.training, set(vars(module)) - known) for name, module in model.named_modules()]

    were = modules()
    with torch.no_grad():
        before = model(batches[0].noisy, batches[0].t)
    rows = list(probes.probes(model, batches, SIZE, "tiny/dense/s0", tile=TILE, progress=told.append))
    assert modules() == were
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(batches[0].noisy, batches[0].t), before)

    assert {row["kind"] for row in rows} == KEYS.keys() and told
    for row in rows:
        assert row.keys() == KEYS[row["kind"]]
        json.dumps(row, allow_nan=False)
        for key, value in row.items():
            assert value is not None or key in MAY_BE_NONE, (key, row)
            assert isinstance(value, (str, int, float, dict, type(None)))
        assert (row["size"], row["model"]) == ("tiny", "tiny/dense/s0")
    cases = {kind: [row for row in rows if row["kind"] == kind] for kind in KEYS}
    one_each = SIZE.depth * 2  # layers, levels
    assert len(cases["training_free"]) == one_each * len(probes.methods(LAYOUT))
    assert len(cases["bsa_rule"]) == one_each * len(bsa_rules.CHANGES)
    assert len(cases["overlap"]) == one_each * 2 * 3
    for kind in ("training_free", "bsa_rule", "overlap"):
        assert {(row["layer"], row["level"]) for row in cases[kind]} == {(i, t) for i in (0, 1) for t in (0.25, 0.75)}
    rules = by(cases["bsa_rule"], "rule", "layer", "level")
    assert {rule for (rule, _, _), row in rules.items() if row["pruned_error"] is None} == {"keep_queries=1"}
    assert {rule for (rule, _, _), row in rules.items() if row["kv_density"] is None} == {
        "threshold=mass, mass=0.5",
        "threshold=mass, mass=0.9",
    }


def alone(part: Any, model: VideoDiT, batches: Any, tile: Any = TILE) -> list[dict[str, Any]]:
    """Rows of one measure."""
    return list(capture.measured([part], model, batches, SIZE, "x", windows=2, tile=tile, progress=None))


def test_each_part_alone_yields_the_same_rows(model: VideoDiT) -> None:
    batches, how = held_out(), {"tile": TILE}
    together = list(probes.probes(model, batches, SIZE, "x", **how))
    apart = [
        *probes.training_free_losses(model, batches, SIZE, "x", **how),
        *alone(probes.training_free_rows, model, batches),
        *alone(bsa_rules.rule_rows, model, batches),
        *alone(overlaps.overlap_rows, model, batches),
    ]
    assert sorted(map(str, together)) == sorted(map(str, apart))


def test_at_density_one_nothing_is_lost(model: VideoDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "DENSITIES", (1.0,))
    monkeypatch.setattr(probes, "MASSES", (1.0,))
    monkeypatch.setattr(probes, "SIDES", (1.0,))
    monkeypatch.setattr(probes, "LOSSES", {(name, 1.0) for name in ("vsa", "bsa_kv", "random", "best", "top_p")})
    rows = list(probes.training_free_losses(model, held_out(), SIZE, "x", tile=TILE))
    rows += alone(probes.training_free_rows, model, held_out())
    for row in rows:
        if row["kind"] == "training_free":
            assert row["recall"] == pytest.approx(1, abs=1e-5)
            if row["method"] == "bsa":  # half of the queries take another's output
                assert row["density"] == 0.5 and row["error"] > 0.01
            else:
                assert row["density"] == 1 and row["error"] < 1e-5
    losses = by((row for row in rows if row["kind"] == "training_free_loss"), "method")
    assert losses.keys() == {"dense", "vsa", "bsa_kv", "random", "best", "top_p", "sliding_tile"}
    for row in losses.values():
        assert row["density"] == 1 and row["loss"] == pytest.approx(losses["dense"]["loss"], rel=1e-5)


def test_error_and_recall_are_those_of_dense_attention_written_out() -> None:
    one = attention((2, 4, 4), sharp=1.0)
    rows = by(probes.training_free_rows(one), "method", "option")
    p = probabilities(one)
    dense = p @ one.v[0]
    for key in (("vsa", 0.25), ("bsa", 0.25), ("bsa_kv", 0.25), ("top_p", 0.7)):
        selection = probes.methods(one.layout)[key].select(one.q, one.k, one.layout)
        keep = token_mask(selection)
        out = (p * keep / (p * keep).sum(-1, keepdim=True)) @ one.v[0]
        kept, computed = (p * keep).sum(-1), torch.ones(p.shape[:2], dtype=torch.bool)
        if selection.queries is not None:
            source = selection.queries.source[0].long()
            computed = source == torch.arange(SIZE.tokens)
            assert computed.float().mean() == 0.5
            out = out.gather(1, source[..., None].expand_as(out))
        heads = [
            (out[h] - dense[h]).square().mean().sqrt() / dense[h].square().mean().sqrt() for h in range(SIZE.heads)
        ]
        assert rows[key]["error"] == pytest.approx(float(sum(heads) / len(heads)), rel=1e-4)
        assert rows[key]["recall"] == pytest.approx(float(kept[computed].mean()), rel=1e-4)
        pairs = (keep & computed[..., None]).double().mean()
        assert rows[key]["density"] == pytest.approx(float(pairs))


def test_recall_lies_between_floor_and_ceiling() -> None:
    rows = by(probes.training_free_rows(attention()), "method", "option")
    for density in probes.DENSITIES:
        best, vsa, random = (rows[method, density]["recall"] for method in ("best", "vsa", "random"))
        assert rows["best", density]["density"] == rows["vsa", density]["density"] == density
        assert best >= vsa - 1e-6 and vsa > random + 0.2
        assert random == pytest.approx(density, abs=0.1)
    assert rows["vsa", 0.5]["error"] < rows["vsa", 0.125]["error"] < rows["random", 0.125]["error"]


def test_bsa_s_density_is_that_of_queries_times_tiles() -> None:
    one = attention(sharp=0.0, spread=1.0)  # scores near normal, at which BSA's threshold aims
    rows = by(probes.training_free_rows(one), "method", "option")
    for option in probes.DENSITIES:
        assert rows["bsa", option]["density"] == pytest.approx(option, rel=0.15)
        assert rows["bsa_kv", option]["density"] == pytest.approx(option, rel=0.15)


def test_best_is_best_where_pooling_is_blind() -> None:
    """Tiles that hold both signs pool to nothing: VSA guesses, the ceiling does not."""
    one = attention()
    sign = torch.where(torch.arange(SIZE.tokens) % 2 == 0, 1.0, -1.0)[:, None]
    blind = capture.Attention(layer=0, level=0.5, window=0, layout=one.layout, q=one.q * sign, k=one.k * sign, v=one.v)
    rows = by(probes.training_free_rows(blind), "method", "option")
    assert rows["best", 0.125]["recall"] > rows["vsa", 0.125]["recall"] + 0.2
    selection = probes.Best(0.125).select(blind.q, blind.k, blind.layout)
    assert torch.equal(selection.bits, probes.Best(0.125).of(blind.mass, blind.layout).bits)


def test_random_tiles_are_equal_for_equal_seeds_only() -> None:
    one = attention()
    a, b, c = (probes.Random(0.25, seed) for seed in (3, 3, 4))
    first, again, other = (builder.select(one.q, one.k, one.layout).bits for builder in (a, b, c))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, a.select(one.q, one.k, one.layout).bits), "a second layer has tiles of its own"


def test_rows_are_means_over_the_chosen_windows(model: VideoDiT) -> None:
    batches = held_out(windows=3, levels=(0.5,))
    assert list(capture.by_level(batches, 2)[0.5]) == [batches[0], batches[2]]
    assert capture.by_level(batches, None)[0.5] == batches
    both = by(alone(bsa_rules.rule_rows, model, batches), "rule", "layer")
    single = [by(alone(bsa_rules.rule_rows, model, [batches[i]]), "rule", "layer") for i in (0, 2)]
    assert single[0] != single[1]
    for key, row in both.items():
        for field in ("density", "error"):
            assert row[field] == pytest.approx(sum(s[key][field] for s in single) / 2)
    pair = Batch(clean=batches[0].clean.repeat(2, 1, 1, 1, 1), noise=batches[0].noise, t=torch.tensor([0.2, 0.4]))
    with pytest.raises(ValueError, match="2 windows"):
        capture.by_level([pair], None)
    with pytest.raises(ValueError, match="None in some"):
        capture.means([{"kind": "x", "error": None}, {"kind": "x", "error": 1.0}])


def test_dense_loss_is_the_model_s_and_sparse_ones_are_not(model: VideoDiT) -> None:
    batches = held_out()
    rows = by(probes.training_free_losses(model, batches, SIZE, "x", tile=TILE), "method", "option")
    with torch.no_grad():
        losses = [float((model(b.noisy, b.t) - (b.noise - b.clean)).square().mean()) for b in batches]
    dense = rows["dense", 1.0]
    assert dense["loss"] == pytest.approx(sum(losses) / 4)
    assert dense["levels"] == {
        "0.25": pytest.approx((losses[0] + losses[2]) / 2),
        "0.75": pytest.approx((losses[1] + losses[3]) / 2),
    }
    for (method, option), row in rows.items():
        if row["density"] < 1:
            assert abs(row["loss"] / dense["loss"] - 1) > 1e-3
        if method in ("vsa", "random", "best", "sliding_tile"):
            assert row["density"] == max(option, 1 / 8)  # of 8 tiles
    assert {row["method"] for row in rows.values() if row["density"] == 1} == {"dense", "sliding_tile"}
    repeated = by(probes.training_free_losses(model, batches, SIZE, "x", tile=TILE), "method", "option")
    assert repeated == rows


def test_pruned_error_is_of_pruned_tokens_only() -> None:
    one = attention((2, 4, 4), sharp=1.0)
    rows = by(bsa_rules.rule_rows(one), "rule")
    assert rows["kv_density=1, fill=zero"]["pruned_error"] == 1.0
    assert rows["fill=zero"]["pruned_error"] == 1.0  # whatever the KV tiles
    assert rows["kv_density=1, fill=zero"]["error"] == pytest.approx(math.sqrt(0.5), rel=0.1)
    for fill in ("kv_density=1", "kv_density=1, fill=nearest"):  # half of the tokens carry all of the error
        assert 0 < rows[fill]["error"] < rows[fill]["pruned_error"]
    assert rows["kv_density=1"]["density"] == 0.5
    assert rows["keep_queries=1"]["pruned_error"] is None and rows["keep_queries=1"]["error"] > 0
    assert rows["default"]["keep_queries"] == 0.5 and rows["default"]["kv_density"] == 0.125


def test_every_rule_has_its_name_and_changes_the_outcome() -> None:
    one = attention((2, 2, 2), sharp=1.0, spread=1.5)
    names = [bsa_rules.rule_name(change) for change in bsa_rules.CHANGES]
    assert len(set(names)) == len(names) and {"default", "fill=zero", "window=1x2x2", "window=tile"} <= set(names)
    for change in bsa_rules.CHANGES:
        differs = [key for key, value in change.items() if bsa_rules.DEFAULT.get(key) != value]
        assert differs == list(change)
    rows = by(bsa_rules.rule_rows(one), "rule")
    same = [name for name in names[1:] if rows[name]["error"] == rows["default"]["error"]]
    assert same == ["window=tile"]  # in tiles of one window


def selection_of(keep: Tensor) -> TileSelection:
    return TileSelection.from_mask(keep, TileLayout(grid=(8, 8, 8), tile=(4, 4, 4)))


def test_overlap_of_equal_and_of_disjoint_lists() -> None:
    keep = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    keep[..., :3] = True
    rows = by(overlaps.axis_rows(selection_of(keep), "vsa"), "axis")
    assert rows.keys() == {"t", "h", "w"}
    assert all(row["overlap"] == 1 and row["random"] == pytest.approx(3 / 8) for row in rows.values())
    parity = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])  # of t + h + w: neighbours differ
    keep = (torch.arange(8) % 2 == parity[:, None]).expand(1, 2, 8, 8)
    rows = by(overlaps.axis_rows(selection_of(keep), "vsa"), "axis")
    assert all(row["overlap"] == 0 and row["random"] == pytest.approx(0.5) for row in rows.values())


def test_overlap_is_the_mean_over_heads() -> None:
    keep = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    keep[0, 0, :, :4] = True
    keep[0, 1] = torch.eye(8, dtype=torch.bool)
    for row in overlaps.axis_rows(selection_of(keep), "vsa"):
        assert row["overlap"] == pytest.approx((1 + 0) / 2) and row["random"] == pytest.approx((4 / 8 + 1 / 8) / 2)


def test_random_overlap_agrees_with_a_simulation() -> None:
    draws = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[1, 5, 2, 8, 3, 3, 7, 1], [4, 4, 4, 4, 1, 8, 1, 8]])[None, ..., None]
    layout = TileLayout(grid=(8, 8, 8), tile=(4, 4, 4))
    found = []
    for _ in range(400):
        rank = torch.rand(1, 2, 8, 8, generator=draws).argsort(-1).argsort(-1)
        selection = TileSelection.from_mask(rank < lengths, layout)
        found.append(torch.stack(list(fs.analysis.measures.overlap(selection).values())))
    expected = torch.stack(list(overlaps.random_overlap(selection).values()))
    assert torch.allclose(torch.stack(found).mean(0), expected, atol=0.015)
    assert expected.std() > 0.05, "axes and heads that differ"


def test_an_axis_of_one_tile_has_no_rows(model: VideoDiT) -> None:
    rows = alone(overlaps.overlap_rows, model, held_out(), tile=(4, 4, 4))
    assert {row["axis"] for row in rows} == {"h", "w"} and {row["method"] for row in rows} == {"vsa", "bsa"}
    assert all(math.isfinite(row["overlap"]) and math.isfinite(row["random"]) for row in rows)


@pytest.mark.parametrize("builder", [fs.VSA(sparsity=0.75), fs.BSA(kv_density=0.25)], ids=["vsa", "bsa"])
def test_lists_of_a_sparse_model_are_its_own(model: VideoDiT, builder: Any) -> None:
    batches = held_out()
    layers = [capture.captured(model, batch)[0] for batch in batches if float(batch.t) == 0.25]
    first = [list(overlaps.axis_rows(builder.select(q, k, LAYOUT), "mine")) for q, k, _ in layers]
    dense = [capture.captured(model, batch)[1] for batch in batches if float(batch.t) == 0.25]
    fs.wrap(model, builder, tile=TILE, grid=SIZE.grid, compile=False)
    rows = by(overlaps.overlaps_of(model, batches, SIZE, "tiny/mine/s0", "mine"), "axis", "layer", "level")
    assert {key[1:] for key in rows} == {(layer, level) for layer in (0, 1) for level in (0.25, 0.75)}
    for row in rows.values():
        assert row.keys() == KEYS["overlap"] and (row["method"], row["model"]) == ("mine", "tiny/mine/s0")
    for mean in (by([row], "axis") for row in first[0]):
        (axis,) = mean
        others = by(first[1], "axis")
        for field in ("overlap", "random"):
            assert rows[axis, 0, 0.25][field] == pytest.approx((mean[axis][field] + others[axis][field]) / 2)
    second = [by(overlaps.axis_rows(builder.select(q, k, LAYOUT), "mine"), "axis") for q, k, _ in dense]
    assert any(
        rows[axis, 1, 0.25]["overlap"] != pytest.approx(sum(s[axis]["overlap"] for s in second) / 2) for axis in "thw"
    ), "the second layer reads what the sparse first one wrote"
    fs.unwrap(model)
