"""Every backend against the float64 oracle, given the same selection: output, log-sum-exp, every gradient."""

import pytest
import torch
from comparison import compare
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LOW, Case, cases

import flexsparse as fs

pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = ("reference", "gather")
SHARES = st.sampled_from((0.1, 0.4, 0.8))


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(dtypes=(torch.float64,), scales=(1.0, 4.0, 8.0, 16.0), cross=True), share=SHARES)
def test_float64_is_exact(backend: str, case: Case, share: float) -> None:
    compare(case, case.selection(share), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(dtypes=(torch.float32,), scales=(1.0, 4.0, 8.0, 16.0), cross=True), share=SHARES)
def test_float32_is_as_good_as_dense_attention(backend: str, case: Case, share: float) -> None:
    compare(case, case.selection(share), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(dtypes=LOW, scales=(1.0, 4.0, 8.0, 16.0), cross=True), share=SHARES)
def test_low_precision_accumulates_in_float32(backend: str, case: Case, share: float) -> None:
    compare(case, case.selection(share), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(dtypes=(torch.float32, torch.bfloat16), scales=(1.0, 8.0)), share=SHARES)
def test_pruned_queries_too(backend: str, case: Case, share: float) -> None:
    q, k, _ = case.qkv()
    compare(case, fs.BSA(keep_queries=0.5, kv_density=share).select(q, k, case.layout), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", (1.0, 4.0, 8.0, 16.0))
@pytest.mark.parametrize("dtype", (torch.float32, *LOW))
def test_a_video_of_many_whole_and_partial_tiles(backend: str, scale: float, dtype: torch.dtype) -> None:
    layout = fs.TileLayout(grid=(5, 9, 10), tile=(4, 4, 4), text_last=30)
    case = Case(layout, layout, B=1, H=2, G=1, D=32, dtype=dtype, scale=scale, seed=5)
    compare(case, case.selection(0.3), backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the templates on the GPU")
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1.0),
        (torch.float16, 16.0),
        pytest.param(torch.float32, 16.0, marks=pytest.mark.slow),
        pytest.param(torch.float16, 1.0, marks=pytest.mark.slow),
    ],
)
def test_the_templates_in_the_interpreter(dtype: torch.dtype, scale: float) -> None:
    layout = fs.TileLayout(grid=(3, 6, 7), tile=(2, 4, 4), text_first=3, text_last=20)
    case = Case(layout, layout, B=1, H=2, G=1, D=32, dtype=dtype, scale=scale, seed=5)
    compare(case, case.selection(0.4), "triton")
    q, k, _ = case.qkv()
    compare(case, fs.BSA(keep_queries=0.5, kv_density=0.5).select(q, k, layout), "triton")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150)
@given(
    case=cases(dtypes=(torch.float32, *LOW), scales=(1.0, 4.0, 8.0, 16.0), cross=True),
    share=st.floats(0.01, 1),
)
def test_many_more_cases(backend: str, case: Case, share: float) -> None:
    compare(case, case.selection(share), backend)
