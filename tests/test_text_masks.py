"""Text that key masks leave, and masks that layers share: looked at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import flexsparse as fs
from flexsparse import text_masks
from flexsparse.text_masks import SeenMasks, TextMask

LAYOUT = fs.TileLayout(grid=(2, 4, 6), tile=(2, 4, 4), text_first=3, text_last=70)
N, D = LAYOUT.num_tokens, 4


def test_masks_hide_text_of_each_sample() -> None:
    """Counts of the text tiles, one partly and one wholly hidden, and what is hidden is zero, NaN or not."""
    lengths = [(3, 70), (1, 64), (0, 5), (2, 0)]
    position = torch.arange(LAYOUT.seq_len)
    rows = [(position < a) | ((position >= 3) & (position < 3 + N + b)) for a, b in lengths]
    mask = torch.stack(rows)[:, None, None]
    slots, full = LAYOUT.slots, LAYOUT.tile_counts.tolist()
    text = TextMask.of(mask, LAYOUT)
    assert torch.equal(text.keys, mask)
    for found, (a, b) in zip(text.counts.tolist(), lengths):
        last = [min(max(b - i * slots, 0), slots) for i in range(LAYOUT.tiles_last)]
        assert found == [a, *full[1 : -LAYOUT.tiles_last], *last]
    k = torch.randn(4, 1, LAYOUT.seq_len, D).masked_fill(~mask.transpose(2, 3), torch.nan)
    hidden, same = text.hide(k, k)
    assert torch.equal(hidden, same) and torch.equal(hidden, k.nan_to_num(0))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The key masks that were looked at."""
    seen: list[Tensor] = []
    look = text_masks.found_in
    monkeypatch.setattr(text_masks, "found_in", lambda mask, *extra: (seen.append(mask), look(mask, *extra))[1])
    return seen


def padding(left: int, samples: int = 1) -> Tensor:
    """Leaves so many of the last tokens."""
    return (torch.arange(LAYOUT.seq_len) < LAYOUT.seq_len - LAYOUT.text_last + left).expand(samples, 1, 1, -1).clone()


def test_a_mask_is_looked_at_once_until_somebody_writes_to_it(looks: list[Tensor]) -> None:
    masks, mask, other = SeenMasks(), padding(9), padding(5)
    for _ in range(3):
        text = masks.of(mask).text(LAYOUT)
        assert masks.of(mask).stays_dense(LAYOUT) is None and text.lengths.tolist() == [[3, 9]]
        assert masks.of(mask).text(LAYOUT) is text and masks.of(other).text(LAYOUT).lengths.tolist() == [[3, 5]]
    assert len(looks) == 2
    mask[..., -LAYOUT.text_last + 4 :] = False
    assert masks.of(mask).text(LAYOUT).lengths.tolist() == [[3, 4]] and len(looks) == 3
    masks.forget()
    assert masks.of(mask).text(LAYOUT).lengths.tolist() == [[3, 4]] and len(looks) == 4


def test_layouts_with_other_text_look_for_themselves(looks: list[Tensor]) -> None:
    masks, mask = SeenMasks(), padding(9)
    shifted = fs.TileLayout(grid=LAYOUT.grid, tile=LAYOUT.tile, text_first=0, text_last=73)
    tiles = fs.TileLayout(grid=LAYOUT.grid, tile=(1, 4, 4), text_first=3, text_last=70)
    assert masks.of(mask).stays_dense(LAYOUT) is None and len(looks) == 1
    assert masks.of(mask).text(tiles).counts.shape[1] == tiles.total_tiles and len(looks) == 1
    assert masks.of(mask).stays_dense(shifted) is None and len(looks) == 2
    assert masks.of(mask).text(shifted).lengths.tolist() == [[0, 12]]


def test_inference_tensors_are_looked_at_each_time(looks: list[Tensor]) -> None:
    """They do not count who writes to them."""
    masks = SeenMasks()
    with torch.inference_mode():
        mask = padding(9)
        assert masks.of(mask).text(LAYOUT).lengths.tolist() == [[3, 9]]
        mask[..., -LAYOUT.text_last + 4 :] = False
        assert masks.of(mask).text(LAYOUT).lengths.tolist() == [[3, 4]] and len(looks) == 2


def test_a_mask_of_all_pairs_is_not_kept() -> None:
    masks, keys = SeenMasks(), padding(9)
    pairs = keys & keys.transpose(2, 3)
    found = masks.of(pairs).keys
    assert found is not None and torch.equal(found, keys) and masks.of(pairs).keys is found
    gone = weakref.ref(pairs)
    del pairs
    gc.collect()
    assert gone() is None


class Layers(nn.Module):
    """Attention layers that share a mask."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(count))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.nn.functional.scaled_dot_product_attention(layer(x), x, x, attn_mask=mask)
        return x


@contextmanager
def counted(of: Any) -> Iterator[list[Any]]:
    """Calls of a function that a mode sees."""
    calls: list[Any] = []

    class Count(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is of:
                calls.append(args)
            return func(*args, **(kwargs or {}))

    with Count():
        yield calls


@pytest.mark.parametrize("pairs", [False, True], ids=["keys", "all pairs"])
def test_layers_share_what_a_forward_found(pairs: bool, looks: list[Tensor]) -> None:
    """Once a forward, which leaves nothing behind."""
    model = Layers(4)
    fs.wrap(
        model,
        fs.VSA(top_k=LAYOUT.num_tiles),
        grid=LAYOUT.grid,
        tile=LAYOUT.tile,
        text_first=LAYOUT.text_first,
        text_last=LAYOUT.text_last,
        compile=False,
        min_tokens=0,
    )
    x = torch.randn(2, 2, LAYOUT.seq_len, D)
    for left in (9, 30, 30):
        keys = padding(left, 2)
        mask = keys & keys.transpose(2, 3) if pairs else keys
        with counted(Tensor.diagonal) as compared:
            found = model(x, mask)
        assert len(looks) == 1 and len(compared) == pairs
        expected = x
        for layer in model.layers:
            expected = expected + torch.nn.functional.scaled_dot_product_attention(
                layer(expected), expected, expected, attn_mask=keys
            )
        seen = keys[0, 0, 0]
        torch.testing.assert_close(found[..., seen, :], expected[..., seen, :], atol=1e-4, rtol=1e-4)
        gone = weakref.ref(mask)
        looks.clear(), compared.clear()
        del mask, keys, seen
        assert gone() is None
