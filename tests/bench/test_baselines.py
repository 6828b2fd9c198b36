"""Baselines without their packages and without a GPU: lists, adapters, and what is said where nothing runs.

Shape letters: B batch, H heads, N query tiles, M KV tiles.
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from baseline_problem import PARTIAL, WHOLE, assert_same, problem, uneven
from torch import Tensor
from torch.nn.attention import SDPBackend

import flexsparse as fs
from bench.baselines import (
    BASELINES,
    Unavailable,
    attention_gym,
    cudnn_frontend,
    dense,
    fastvideo_tk,
    fastvideo_triton,
    protocol,
)
from bench.baselines.lists import lists_of


@pytest.mark.parametrize("even", [True, False])
def test_lists_hold_what_the_selection_keeps(even: bool) -> None:
    p = problem()
    if not even:
        p = problem(keep=uneven(p.layout))
    keep, counts = p.selection.keep(), p.layout.tile_counts.tolist()
    found = lists_of(p, "x", columns=True)
    B, H, N, M = keep.shape
    for b in range(B):
        for h in range(H):
            for n in range(N):
                tiles = [m for m in range(M) if keep[b, h, n, m]]
                assert found.q2k[b, h, n][: len(tiles)].tolist() == tiles and found.q2k_counts[b, h, n] == len(tiles)
            for m in range(M):
                tiles = [n for n in range(N) if keep[b, h, n, m]]
                assert found.k2q is not None and found.k2q_counts is not None
                assert found.k2q[b, h, m][: len(tiles)].tolist() == tiles and found.k2q_counts[b, h, m] == len(tiles)
    assert found.q2k.shape == (B, H, N, int(keep.sum(-1).max())) and found.k2q.shape == (B, H, M, N)
    assert found.sizes.tolist() == counts and min(counts) < max(counts)
    assert found.fixed == (int(keep[0, 0, 0].sum()) if even else None)
    for x in (found.q2k, found.q2k_counts, found.k2q, found.k2q_counts, found.sizes):
        assert x.dtype == torch.int32 and x.is_contiguous()
    assert lists_of(p, "x", columns=False).k2q is None


def test_lists_refuse_what_they_cannot_say() -> None:
    p = problem()
    for text in ({"text_last": 3}, {"text_first": 3}):
        layout = fs.TileLayout(grid=PARTIAL, tile=(4, 4, 4), **text)
        selection = dataclasses.replace(p.selection, layout=layout, kv_layout=layout)
        with pytest.raises(Unavailable, match="no extra tokens"):
            lists_of(dataclasses.replace(p, layout=layout, selection=selection), "x", columns=False)
    other = dataclasses.replace(p.selection, kv_layout=fs.TileLayout(grid=(8, 8, 12), tile=(4, 4, 4)))
    with pytest.raises(Unavailable, match="keys on the same grid"):
        lists_of(dataclasses.replace(p, selection=other), "x", columns=False)
    counts = p.layout.tile_counts.expand(2, -1).contiguous()
    ragged = dataclasses.replace(p, selection=dataclasses.replace(p.selection, tile_counts=counts))
    with pytest.raises(Unavailable, match="one count of valid tokens a tile"):
        lists_of(ragged, "x", columns=False)
    q, k = (p.layout.to_raster(x) for x in (p.q_BHPD, p.k_BGPD))
    pruned = fs.BSA(keep_queries=0.5, kv_density=0.5).select(q, k, p.layout)
    with pytest.raises(Unavailable, match="no pruned queries"):
        lists_of(dataclasses.replace(p, selection=pruned), "x", columns=False)


CASES = {
    "tk": (fastvideo_tk.prepare, {"scale": 1.000000000001 / 8}),
    "tk-uneven": (fastvideo_tk.prepare, {"uneven": True, "D": 128}),
    "triton": (fastvideo_triton.prepare, {}),
    "triton-uneven": (fastvideo_triton.prepare, {"uneven": True, "D": 128}),
    "cudnn-64": (cudnn_frontend.prepare, {"D": 128}),
    "cudnn-64-whole": (cudnn_frontend.prepare, {"D": 128, "grid": WHOLE}),
    "cudnn-128": (cudnn_frontend.prepare, {"D": 128, "slots": 128}),
    "cudnn-128-uneven": (cudnn_frontend.prepare, {"D": 128, "slots": 128, "uneven": True, "scale": 0.2}),
    "cudnn-128-whole": (cudnn_frontend.prepare, {"D": 128, "slots": 128, "grid": (4, 16, 8)}),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_adapters_give_the_references_results(fakes: None, name: str, training: bool) -> None:
    prepare, fields = CASES[name]
    fields = dict(fields)
    if fields.pop("uneven", False):
        fields["keep"] = uneven(problem(slots=fields.get("slots", 64)).layout)
    p = problem(**fields)
    attend = prepare(p, training)
    assert_same(p, attend, training)
    assert attend(p.q_BHPD.requires_grad_(), p.k_BGPD, p.v_BGPD).requires_grad == training


def test_cudnn_frontend_without_backward_takes_more(fakes: None) -> None:
    p = problem(D=64, G=1, dtype=torch.float16)
    assert_same(p, cudnn_frontend.prepare(p, False), False)
    with pytest.raises(Unavailable, match="backward takes D 128"):
        cudnn_frontend.prepare(p, True)


def test_cudnn_frontend_is_given_no_more_than_it_needs() -> None:
    for slots, grid, keeps in ((64, WHOLE, True), (128, (4, 16, 8), False)):
        p = problem(grid=grid, slots=slots)
        how = cudnn_frontend.arguments(p, lists_of(p, "x", columns=False))
        assert how["block_sizes"] is None and (how["q2k_block_nums"] is not None) == keeps


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("G", [1, 2])
def test_dense_baselines_give_dense_attention(fakes: None, training: bool, G: int) -> None:
    p = problem(grid=WHOLE, G=G, scale=0.3)
    everything = fs.Dense().select(*(p.layout.to_raster(x) for x in (p.q_BHPD, p.k_BGPD)), p.layout)
    attend = dense.sdpa(p, training, "dense", SDPBackend.MATH)
    assert_same(p, attend, training, everything)
    assert "MATH" in attend.note
    assert_same(p, dense.fa4(p, training), training, everything)


def test_dense_baselines_refuse_padding(fakes: None) -> None:
    for prepare in (dense.cudnn, dense.fa2, dense.fa4):
        with pytest.raises(Unavailable, match="has no padding"):
            prepare(problem(), False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", BASELINES)
def test_without_cuda_every_baseline_says_so(name: str) -> None:
    for training in (False, True):
        with pytest.raises(Unavailable) as said:
            BASELINES[name](problem(slots=128 if name == "flex_128" else 64), training)
        assert str(said.value) == f"{name} runs on CUDA alone, and the tensors are on cpu"


WRONG = [
    ({"slots": 128}, "slots 64, and this problem has slots 128"),
    ({"D": 32}, "D 64 or 128, and this problem has D 32"),
    ({"dtype": torch.float16}, "dtype torch.bfloat16, and this problem has dtype torch.float16"),
    ({"G": 1}, "gqa False, and this problem has gqa True"),
    ({"scale": 0.3}, "scale 0.125, and this problem has scale 0.3"),
]


@pytest.mark.parametrize("fields, sentence", WRONG)
def test_fastvideo_takes_what_its_kernels_are_made_for(fakes: None, fields: Any, sentence: str) -> None:
    for module in (fastvideo_tk, fastvideo_triton):
        with pytest.raises(Unavailable, match=f"fastvideo_.* takes {sentence}"):
            module.prepare(problem(**fields), False)


@pytest.mark.parametrize("error", [ImportError("a\nb"), OSError("libcute"), AttributeError("version")])
def test_a_missing_or_broken_package_is_one_sentence(
    fakes: None, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(name: str) -> Any:
        raise error

    monkeypatch.setattr(protocol.importlib, "import_module", broken)
    cases = [(dense.fa4, {"grid": WHOLE}), (cudnn_frontend.prepare, {"D": 128}), (attention_gym.prepare, {})]
    for prepare, fields in cases:
        with pytest.raises(Unavailable, match=r"needs [\w.]+ \(.*\): get it with `python -m bench") as said:
            prepare(problem(**fields), False)
        assert "\n" not in str(said.value) and type(error).__name__ in str(said.value)


def test_fastvideo_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if importlib.util.find_spec("fastvideo_kernel") is None:
        with pytest.raises(Unavailable, match="needs the package fastvideo-kernel: get it with"):
            fastvideo_triton.root_of("fastvideo_tk")
    (tmp_path / "fastvideo_kernel").mkdir()
    monkeypatch.setattr(fastvideo_triton, "root_of", lambda name: tmp_path)
    with pytest.raises(Unavailable, match=r"fastvideo_triton cannot import .*No such file"):
        fastvideo_triton.load_kernels()
    with pytest.raises(Unavailable, match="finds no fastvideo_kernel_ops"):
        fastvideo_tk.load_ops(tmp_path)
    (tmp_path / "fastvideo_kernel" / "_C").mkdir()
    (tmp_path / "fastvideo_kernel" / "_C" / "fastvideo_kernel_ops.x.so").write_bytes(b"no library")
    fastvideo_tk.load_ops.cache_clear()
    with pytest.raises(Unavailable, match=r"cannot load fastvideo_kernel_ops\.x\.so here"):
        fastvideo_tk.load_ops(tmp_path)


def test_a_call_that_fails_is_a_sentence() -> None:
    def fails(*_: Tensor) -> Tensor:
        raise RuntimeError("out of\nregisters")

    with pytest.raises(Unavailable, match=r"x \(how\) failed at its first call: RuntimeError: out of registers"):
        protocol.first_call("x", fails, "how", problem(), False)
    with pytest.raises(Unavailable, match=r"x .*does not require grad"):
        protocol.first_call("x", lambda q, k, v: q.detach(), "how", problem(), True)
    with pytest.raises(Unavailable, match=r"gave .* for q of"):
        protocol.first_call("x", lambda q, k, v: q[:, :1], "how", problem(), False)
