"""The interpreter as tests run it replaces `triton.language` once a launch, and gives it back."""

import pytest
import quick_interpreter
import torch
import triton
from triton import language as tl
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")


@triton.jit
def _double(x):
    return x + x


@triton.jit
def _largest_times_1024(x_ptr, out_ptr):
    x = tl.load(x_ptr + tl.arange(0, 8))
    for _ in range(10):
        x = _double(x)
    tl.store(out_ptr, tl.max(x))


def launched() -> float:
    out = torch.empty(1)
    _largest_times_1024[(1,)](torch.arange(8.0), out)
    return out.item()


def test_replaced_once_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    replace = quick_interpreter._replace
    monkeypatch.setattr(quick_interpreter, "_replace", lambda function: calls.append(function) or replace(function))
    assert launched() == launched() == 7 * 1024
    # the launch itself, and the function of triton's own for maxima, which sees another module of the language
    assert 2 <= len(calls) <= 4
    assert tl.core.is_builtin(tl.load) and tl.core.is_builtin(tl.tensor.to)


def test_as_the_interpreter_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_patch_lang", quick_interpreter._replace)
    monkeypatch.setattr(interpreter, "_get_np_dtype", quick_interpreter._np_dtype)
    assert launched() == 7 * 1024


@pytest.mark.parametrize("dtype", [tl.float32, tl.bfloat16, tl.int1, tl.pointer_type(tl.float32)])
def test_types_of_numpy(dtype: tl.dtype) -> None:
    for asked in (dtype, tl.block_type(dtype, [4])):
        for _ in range(2):
            assert quick_interpreter._known_np_dtype(asked) == quick_interpreter._np_dtype(asked)


@triton.jit
def _first(x_ptr, out_ptr, n, M: tl.constexpr):
    column, tile = tl.arange(0, 8), tl.program_id(0) - n // 9
    video = (tl.program_id(0) >= n // 9) & (tile < n)
    tl.store(
        out_ptr + column, tl.load(x_ptr + column, mask=video & (column < M), other=-1.0), mask=video & (column < 7)
    )


def test_a_mask_of_scalars() -> None:
    out = torch.zeros(8)
    _first[(1,)](torch.arange(8.0), out, 5, M=6)
    assert out.tolist() == [0, 1, 2, 3, 4, 5, -1, 0]


@triton.jit
def _combined(x_ptr, y_ptr, out_ptr, how: tl.constexpr):
    x, y = tl.load(x_ptr + tl.arange(0, 8)), tl.load(y_ptr)
    if how == "sum":
        out = x + y
    elif how == "difference":
        out = y - x
    else:
        out = x * y
    tl.store(out_ptr + tl.arange(0, 8), out)


@pytest.mark.parametrize(
    ("how", "fits", "too_large"),
    [("sum", 2**31 - 8, 2**31 - 7), ("difference", 7 - 2**31, 6 - 2**31), ("product", 2**31 // 7, 2**31 // 7 + 1)],
)
def test_whole_numbers_that_overflow_are_refused(how: str, fits: int, too_large: int) -> None:
    x, out = torch.arange(8, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
    y = torch.tensor(fits, dtype=torch.int32)
    _combined[(1,)](x, y, out, how=how)
    expected = {"sum": x + y, "difference": y - x, "product": x * y}[how]
    assert torch.equal(out, expected)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="int32 overflow detected"):
        _combined[(1,)](x, torch.tensor(too_large, dtype=torch.int32), out, how=how)
    _combined[(1,)](x.long(), torch.tensor(too_large), torch.empty(8, dtype=torch.int64), how=how)


@triton.jit
def _outer(x_ptr, out_ptr):
    rows, columns = tl.arange(0, 4), tl.arange(0, 8)
    x = tl.load(x_ptr + columns).to(tl.float32)
    wide = tl.broadcast_to(x[None, :], (4, 8))
    tl.static_assert(wide.shape[0] == 4 and wide.shape[1] == 8 and wide.numel == 32 and wide.T.shape[0] == 8)
    tl.store(out_ptr + rows[:, None] * 8 + columns, wide * rows[:, None] + tl.sum(wide, 1)[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_shapes_are_those_of_each_type(dtype: torch.dtype) -> None:
    x, out = torch.arange(8), torch.empty(4, 8)
    for _ in range(2):
        _outer[(1,)](x.to(dtype), out)
        assert torch.equal(out, x * torch.arange(4.0)[:, None] + 28)
