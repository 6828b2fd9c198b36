"""Wrapped models that are copied, and taken apart; and function modes that their own code enters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import flexsparse as fs

from .conftest import Stranger, reference

ONE = fs.VSA(top_k=1)


def clip() -> Tensor:
    return torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def wrapped(model: nn.Module, way: Any) -> nn.Module:
    return fs.wrap(model, ONE, compile=way, **({"inner": "aot_eager"} if way else {}))


def traces(model: nn.Module) -> list[str]:
    return [name for module in model.modules() for name in vars(module) if "flexsparse" in name or name == "forward"]


@pytest.mark.parametrize("way", [False, "regional"])
def test_a_block_that_was_taken_out_is_unwrapped_too(stranger: Stranger, way: Any) -> None:
    """The first: its name is now that of the block after it."""
    model = wrapped(stranger, way)
    model(clip())
    block = model.blocks.pop(0)  # type: ignore[operator,union-attr]
    model(clip())
    fs.unwrap(model)
    assert not traces(model) and not traces(block)
    fs.wrap(block, ONE, grid=(4, 8, 8), compile=False)
    block(torch.randn(1, 256, 32))
    assert fs.report(block).sparse_calls == 1


def test_a_block_that_another_model_has_stays_as_that_wants_it(stranger: Stranger) -> None:
    fs.wrap(stranger, ONE, compile=False)
    block = stranger.blocks.pop(0)
    fs.unwrap(stranger)
    fs.wrap(block, ONE, grid=(4, 8, 8), compile=False)
    fs.unwrap(fs.wrap(stranger, ONE, compile=False))
    assert traces(block)


def test_a_part_of_a_copy_is_not_wrapped_by_itself(stranger: Stranger) -> None:
    """Compiled as a whole, its modules do not know that it is wrapped: the builder was ignored."""
    model = copy.deepcopy(wrapped(stranger, True))
    fs.wrap(model.blocks[0], fs.VSA(top_k=4), grid=(4, 8, 8), compile=False)  # type: ignore[index]
    with pytest.raises(RuntimeError, match=r"blocks\.0 is wrapped, and part of a copy of a wrapped Stranger"):
        model(clip())
    fs.unwrap(model.blocks[0])  # type: ignore[index]
    torch.testing.assert_close(model(clip()), stranger(clip()), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"blocks\.0 of a wrapped Stranger"):
        fs.wrap(model.blocks[0], fs.VSA(top_k=4), grid=(4, 8, 8), compile=False)  # type: ignore[index]


class Seen(TorchFunctionMode):
    """Of somebody else's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _of_a_cpu() -> Any:
    return torch.device("cpu")


@pytest.mark.parametrize("mode", [Seen, _of_a_cpu])
@pytest.mark.parametrize("way", [False, "regional"])
def test_a_mode_around_the_blocks(way: Any, mode: Callable[[], Any]) -> None:
    """It was put aside in place of ours, which cannot be traced."""

    class Under(Stranger):
        def forward(self, x: Tensor) -> Tensor:
            h = self.patch(x).flatten(2).transpose(1, 2)
            with mode():
                for block in self.blocks:
                    h = block(h)
                    assert len(torch.overrides._get_current_function_mode_stack()) == 2
            return self.head(h)

    torch.manual_seed(0)
    model = Under()
    plain = reference(copy.deepcopy(model), ONE)
    wrapped(model, way)
    for _ in range(2):
        torch.testing.assert_close(model(clip()), plain(clip()), atol=1e-5, rtol=0)
    assert not torch.overrides._get_current_function_mode_stack()


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize("checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", [False, "regional", True])
def test_compiled_autograd(way: Any, checkpointed: bool) -> None:
    """It knows no graph task, of which blocks that backward redoes are told their forward."""

    class Checkpointed(Stranger):
        def forward(self, x: Tensor) -> Tensor:
            h = self.patch(x).flatten(2).transpose(1, 2)
            for block in self.blocks[:1]:
                h = torch.utils.checkpoint.checkpoint(block, h, use_reentrant=False)
            return self.head(h)

    torch.manual_seed(0)
    model = (Checkpointed if checkpointed else Stranger)()
    plain = reference(copy.deepcopy(model), ONE)
    wrapped(model, way)
    loss = model(clip()).square().mean()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    plain(clip()).square().mean().backward()
    pairs = list(zip(_gradients(model.parameters()), _gradients(plain.parameters()), strict=True))
    assert pairs
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
