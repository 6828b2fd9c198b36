"""The factor of a sum in which a Python float is a graph's input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed

import flexsparse as fs
from flexsparse.compile_passes.plain_alpha import plain_alpha

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SUMS = {
    "add": lambda eps, x: torch.add(eps, x, alpha=0.25 * x.shape[1]),
    "sub": lambda eps, x: torch.sub(x, eps, alpha=x.shape[1]),
    "method": lambda eps, x: x.add(eps, alpha=3.0),
    "in place": lambda eps, x: x.clone().sub_(eps, alpha=3.0),
    "of tensors": lambda eps, x: torch.add(x * eps, x, alpha=2.0),
}


class Sum(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.eps, self.kind = 0.7, kind

    def forward(self, x: Tensor) -> Tensor:
        return SUMS[self.kind](self.eps, x)


def compiled(module: nn.Module, rewrite: bool, seen: list[int]) -> Any:
    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        if rewrite:
            seen.append(plain_alpha(gm))
        return aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward))(gm, inputs)

    return torch.compile(module, backend=backend, dynamic=True)


@pytest.mark.parametrize("kind", SUMS)
def test_nothing_is_forgotten(kind: str) -> None:
    module, seen = Sum(kind), []
    model = compiled(module, True, seen)
    for size in (5, 7):
        x = torch.randn(3, size, requires_grad=True)
        torch.testing.assert_close(model(x), module(x))
        (mine,) = torch.autograd.grad(model(x).square().sum(), x)
        (right,) = torch.autograd.grad(module(x).square().sum(), x)
        torch.testing.assert_close(mine, right)
    assert max(seen) == int(kind != "of tensors")


class Attends(Sum):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        q = x.unflatten(-1, (2, 16)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


def test_the_backend_rewrites_them() -> None:
    model, x = Attends("method"), torch.randn(1, 64, 32)
    backend = fs.backend(fs.VSA(sparsity=0.0), grid=(4, 4, 4), tile=(2, 2, 2), inner="aot_eager")
    torch.testing.assert_close(torch.compile(model, backend=backend, dynamic=True)(x), model(x), atol=1e-5, rtol=1e-4)


def test_torch_still_forgets_it() -> None:
    """Once it does not, the pass may go."""
    module, x = Sum("add"), torch.randn(3, 5)
    if torch.__version__ < "2.14":
        assert (compiled(module, False, [])(x) - module(x)).abs().max() > 1e-2
    else:
        with pytest.raises(BackendCompilerFailed, match="NotImplementedError"):
            compiled(module, False, [])(x)
