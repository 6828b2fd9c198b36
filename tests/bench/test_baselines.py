"""Baselines without their packages and without a GPU: fakes take their places, in the formats that the real ones document.

Shape letters: B batch, H query heads, G KV heads, P padded tokens, D head dim, N query tiles, M KV tiles.
"""

import dataclasses
import importlib.util
import math
import shutil
import subprocess
import sys
import sysconfig
import time
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask

import flexsparse as fs
from bench import baselines
from bench.baselines import (
    BASELINES,
    Problem,
    Unavailable,
    __main__,
    attention_gym,
    cudnn_frontend,
    dense,
    fastvideo_tk,
    fastvideo_triton,
    flex,
    gather,
    protocol,
)
from bench.baselines.lists import lists_of

WHOLE, PARTIAL = (4, 8, 12), (5, 8, 9)
TILES = {64: (4, 4, 4), 128: (4, 8, 4)}


def problem(
    grid: tuple[int, int, int] = PARTIAL, slots: int = 64, D: int = 64, G: int = 2, B: int = 2, **fields: Any
) -> Problem:
    """A problem of two heads at half of the tiles; ``fields`` replace what it would have, ``dtype`` and ``keep`` too."""
    layout = fs.TileLayout(grid=grid, tile=TILES[slots])
    dtype, keep = fields.pop("dtype", torch.bfloat16), fields.pop("keep", None)
    q, k, v = (torch.randn(B, heads, layout.seq_len, D).to(dtype) for heads in (2, G, G))
    selection = fs.VSA(sparsity=0.5).select(q, k, layout)
    if keep is not None:
        selection = fs.TileSelection.from_mask(keep.expand(B, 2, -1, -1), layout)
    tiles = [layout.to_tiles(x).contiguous() for x in (q, k, v)]
    names = ("q_BHPD", "k_BGPD", "v_BGPD")
    given = {**dict(zip(names, tiles)), "layout": layout, "selection": selection, "scale": D**-0.5}
    return Problem(**{**given, **fields})


def uneven(layout: fs.TileLayout) -> Tensor:
    """Rows that keep one tile, two, ... of them: ``[N, M]``."""
    M = layout.num_tiles
    return torch.arange(M) <= torch.arange(M)[:, None]


def results(attend: Any, p: Problem, training: bool) -> list[Tensor]:
    """Output and, for training, gradients of a baseline, in raster order."""
    inputs = [x.detach().requires_grad_(training) for x in (p.q_BHPD, p.k_BGPD, p.v_BGPD)]
    out = attend(*inputs)
    merged = out.transpose(1, 2).flatten(2) * 1.0  # as models do, so that the gradient comes in strides of its own
    out = p.layout.to_raster(merged.unflatten(2, (-1, out.shape[-1])).transpose(1, 2))
    if not training:
        return [out]
    grads = torch.autograd.grad(out, inputs, weights(out))
    return [out.detach(), *(p.layout.to_raster(grad) for grad in grads)]


def weights(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)


def expected(p: Problem, training: bool, selection: Any = None) -> list[Tensor]:
    """The same from the reference backend."""
    inputs = [p.layout.to_raster(x).detach().requires_grad_(training) for x in (p.q_BHPD, p.k_BGPD, p.v_BGPD)]
    out = fs.sparse_attention(*inputs, p.layout, selection or p.selection, scale=p.scale, backend="reference")
    return [out.detach(), *(torch.autograd.grad(out, inputs, weights(out)) if training else ())]


def assert_same(p: Problem, attend: Any, training: bool, selection: Any = None) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), results(attend, p, training), expected(p, training, selection)):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert a.dtype == b.dtype and error < 0.01, f"{name} is off by {float(error):.2e}"


# ---- fakes: attention over lists, in float32


def listed(index: Tensor, counts: Tensor, width: int) -> Tensor:
    """Bool ``[B, H, rows, width]`` of lists, entry by entry; entries past a count are not looked at."""
    assert index.dtype == counts.dtype == torch.int32 and index.is_contiguous() and counts.is_contiguous()
    assert index.shape[:3] == counts.shape
    keep = torch.zeros(*counts.shape, width, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        for entry in index[tuple(place)][: int(counts[tuple(place)])]:
            assert not keep[(*place, int(entry))], "a tile is listed twice"
            keep[(*place, int(entry))] = True
    return keep


def naive(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, sizes: Tensor, slots: int, scale: float) -> Any:
    """Output in q's dtype and log-sum-exp ``[B, H, P]``."""
    assert sizes.dtype == torch.int32 and sizes.shape == (k.shape[2] // slots,)
    valid = (torch.arange(slots) < sizes[:, None]).flatten()
    seen = keep.repeat_interleave(slots, 2).repeat_interleave(slots, 3) & valid
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q.float() @ k.mT * scale).masked_fill(~seen, -math.inf)
    return (logits.softmax(-1) @ v).to(q.dtype), logits.logsumexp(-1)


def naive_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *what: Any) -> list[Tensor]:
    """Float32 gradients of `naive`, of which the last arguments are."""
    inputs = [x.float().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        return list(torch.autograd.grad(naive(*inputs, *what)[0], inputs, grad.float()))


class FakeThunderKittens:
    """`fastvideo_kernel_ops`, argument for argument: 6 tensors forward, 9 backward."""

    @staticmethod
    def block_sparse_fwd(q: Tensor, k: Tensor, v: Tensor, q2k: Tensor, counts: Tensor, sizes: Tensor) -> list[Tensor]:
        for x in (q, k, v):
            assert x.dtype == torch.bfloat16 and x.is_contiguous()
        out, lse = naive(q, k, v, listed(q2k, counts, len(sizes)), sizes, 64, q.shape[-1] ** -0.5)
        return [out, lse[..., None]]

    @staticmethod
    def block_sparse_bwd(
        q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, k2q: Tensor, counts: Tensor, sizes: Tensor
    ) -> list[Tensor]:
        assert lse.shape == (*q.shape[:3], 1) and lse.dtype == torch.float32 and do.is_contiguous()
        assert k2q.shape[2] == len(sizes)
        keep = listed(k2q, counts, q.shape[2] // 64).mT
        again, _ = naive(q, k, v, keep, sizes, 64, q.shape[-1] ** -0.5)
        assert torch.equal(again, o), "the columns are not the rows' transpose"
        return naive_backward(do, q, k, v, keep, sizes, 64, q.shape[-1] ** -0.5)


class FakeFastVideoTriton:
    """`block_sparse_attn_triton`: arguments of backward begin with the output's gradient; both sets of lists."""

    @staticmethod
    def triton_block_sparse_attn_forward(
        q: Tensor, k: Tensor, v: Tensor, q2k_index: Tensor, q2k_num: Tensor, variable_block_sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        keep = listed(q2k_index, q2k_num, len(variable_block_sizes))
        out, lse = naive(q, k, v, keep, variable_block_sizes, 64, q.shape[-1] ** -0.5)
        return out, lse / math.log(2)

    @staticmethod
    def triton_block_sparse_attn_backward(
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        M: Tensor,
        q2k_index: Tensor,
        q2k_num: Tensor,
        k2q_index: Tensor,
        k2q_num: Tensor,
        variable_block_sizes: Tensor,
    ) -> tuple[Tensor, ...]:
        assert do.is_contiguous() and M.shape == q.shape[:3]
        keep = listed(q2k_index, q2k_num, len(variable_block_sizes))
        assert torch.equal(keep.mT, listed(k2q_index, k2q_num, q2k_index.shape[2]))
        assert torch.equal(naive(q, k, v, keep, variable_block_sizes, 64, q.shape[-1] ** -0.5)[0], o)
        found = naive_backward(do, q, k, v, keep, variable_block_sizes, 64, q.shape[-1] ** -0.5)
        return tuple(x.to(q.dtype) for x in found)


def cudnn_keep(
    q: Tensor,
    k: Tensor,
    index: Tensor,
    block_sparse_num: int,
    block_sizes: Tensor | None,
    q2k_block_nums: Tensor | None,
    sparse_block_size: int,
) -> tuple[Tensor, Tensor, int]:
    M = k.shape[2] // sparse_block_size
    assert 1 <= block_sparse_num <= index.shape[-1] and index.shape[2] == q.shape[2] // sparse_block_size
    if q2k_block_nums is None:
        q2k_block_nums = torch.full(index.shape[:3], block_sparse_num, dtype=torch.int32)
    sizes = torch.full((M,), sparse_block_size, dtype=torch.int32) if block_sizes is None else block_sizes
    return listed(index, q2k_block_nums, M), sizes, sparse_block_size


def cudnn_forward(
    q_tensor: Tensor,
    k_tensor: Tensor,
    v_tensor: Tensor,
    q2k_block_index: Tensor,
    block_sparse_num: int | None = None,
    block_sizes: Tensor | None = None,
    q2k_block_nums: Tensor | None = None,
    *,
    sparse_block_size: int | None = None,
    softmax_scale: float | None = None,
    layout: str = "bhsd",
) -> dict[str, Tensor]:
    assert layout == "bhsd" and sparse_block_size and softmax_scale and block_sparse_num
    how = (q2k_block_index, block_sparse_num, block_sizes, q2k_block_nums, sparse_block_size)
    out, lse = naive(q_tensor, k_tensor, v_tensor, *cudnn_keep(q_tensor, k_tensor, *how), softmax_scale)
    return {"o_tensor": out, "lse_tensor": lse}


def cudnn_backward(
    do_tensor: Tensor,
    q_tensor: Tensor,
    k_tensor: Tensor,
    v_tensor: Tensor,
    o_tensor: Tensor,
    lse_tensor: Tensor,
    *lists: Any,
    softmax_scale: float | None = None,
    **how: Any,
) -> dict[str, Tensor]:
    again = cudnn_forward(q_tensor, k_tensor, v_tensor, *lists, softmax_scale=softmax_scale, **how)
    assert torch.equal(again["o_tensor"], o_tensor) and torch.equal(again["lse_tensor"], lse_tensor)
    assert softmax_scale and how.pop("layout") == "bhsd"
    keep = cudnn_keep(q_tensor, k_tensor, *lists, **how)
    found = naive_backward(do_tensor, q_tensor, k_tensor, v_tensor, *keep, softmax_scale)
    return {f"{name}_tensor": x.to(q_tensor.dtype) for name, x in zip(("dq", "dk", "dv"), found)}


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> tuple[Tensor, None]:
    """`flash_attn.cute.flash_attn_func`: ``[B, P, H, D]``, the output and a log-sum-exp that may be None."""
    assert softmax_scale is not None and all(x.stride(-1) == 1 for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=softmax_scale, enable_gqa=gqa)
    return out.transpose(1, 2), None


def create_vsa_block_mask(
    topk_indices: Tensor, tile_numel: int, num_kv_tiles: int, variable_block_sizes: Tensor | None = None
) -> BlockMask:
    """`attn_gym.masks.vsa`'s: lists of whole tiles, or with sizes of partial ones and a mask function for their padding."""
    assert topk_indices.dim() == 4
    rows, K = topk_indices.shape[:3], topk_indices.shape[-1]
    lists = torch.zeros(*rows, num_kv_tiles, dtype=torch.int32)
    lists[..., :K] = topk_indices
    counts, none = torch.full(rows, K, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    shape = {"BLOCK_SIZE": tile_numel, "seq_lengths": (rows[2] * tile_numel, num_kv_tiles * tile_numel)}
    if variable_block_sizes is None:
        return BlockMask.from_kv_blocks(none, torch.zeros_like(lists), counts, lists, mask_mod=None, **shape)

    def padding(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv % tile_numel < variable_block_sizes[kv // tile_numel]

    return BlockMask.from_kv_blocks(counts, lists, none, torch.zeros_like(lists), mask_mod=padding, **shape)


FAKES: dict[str, dict[str, Any]] = {
    "flash_attn.cute": {"flash_attn_func": flash_attn_func},
    "cudnn.block_sparse_attention.api": {
        "block_sparse_attention_forward": cudnn_forward,
        "block_sparse_attention_backward": cudnn_backward,
    },
    "attn_gym.masks.vsa": {"create_vsa_block_mask": create_vsa_block_mask},
}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages' places taken, and no GPU asked for."""
    for full, contents in FAKES.items():
        for depth in range(1, full.count(".") + 2):
            monkeypatch.setitem(
                sys.modules, (name := ".".join(full.split(".")[:depth])), fake := types.ModuleType(name)
            )
            fake.__path__ = []
        fake.__dict__.update(contents)
    monkeypatch.setattr(fastvideo_tk, "root_of", Path)
    monkeypatch.setattr(fastvideo_tk, "load_ops", lambda root: FakeThunderKittens)
    monkeypatch.setattr(fastvideo_triton, "load_kernels", lambda: FakeFastVideoTriton)
    for module in (attention_gym, cudnn_frontend, dense, fastvideo_tk, fastvideo_triton, flex):
        monkeypatch.setattr(module, "need_cuda", lambda *_: None)
    flex._won.cache_clear()


# ---- lists


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


# ---- adapters


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


# ---- FlexAttention


@pytest.mark.parametrize("grid", [WHOLE, PARTIAL])
def test_flex_and_attention_gym_compiled_for_the_cpu(
    fakes: None, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int, int]
) -> None:
    p = problem(grid=grid, B=1, dtype=torch.float32, scale=0.3)
    for prepare in (flex.flex_64, attention_gym.prepare):
        with pytest.raises(Unavailable, match="no option that works here"):
            prepare(p, True)  # there is no backward for the CPU
        monkeypatch.setattr(flex, "options", lambda slots, training: [flex.Option(name="plain")])
        attend = prepare(p, False)
        assert attend.note.startswith("plain; tried: plain ")
        assert_same(p, attend, False)


def test_attention_gym_refuses_rows_of_different_lengths(fakes: None) -> None:
    with pytest.raises(Unavailable, match="as many tiles for every row"):
        attention_gym.prepare(problem(keep=uneven(problem().layout)), False)


def test_the_fastest_option_that_works_is_taken_and_kept(fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    took = {"first": None, "second": 0.02, "third": 0.001}

    def compiled(p: Problem, mask: BlockMask, option: flex.Option) -> Any:
        tried.append(option.name)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seconds = took[option.name]
            if seconds is None:
                raise RuntimeError("no kernel")
            time.sleep(seconds)
            return q + k + v

        return attend

    monkeypatch.setattr(flex, "compiled", compiled)
    monkeypatch.setattr(flex, "options", lambda slots, training: [flex.Option(name=name) for name in took])
    note = flex.flex_64(problem(), True).note
    assert note.startswith("third; tried: second 2") and "third 1." in note and "RuntimeError: no kernel" in note
    took["second"] = 0.0001
    assert flex.flex_64(problem(B=1), True).note.startswith("third; the fastest on the first")
    assert tried == ["first", "second", "third", "third"]
    assert flex.flex_64(problem(D=32), True).note.startswith("second; tried")
    with pytest.raises(Unavailable, match="flex_128 takes slots 128"):
        flex.flex_128(problem(), False)


def test_options_divide_their_tiles() -> None:
    for slots in (64, 128):
        for training in (False, True):
            names: set[str] = set()
            for option in flex.options(slots, training):
                assert option.name not in names
                names.add(option.name)
                blocks = [size for key, size in option.kernel.items() if "BLOCK" in key]
                assert all(slots % size == 0 for size in blocks)
                # on Hopper stock refuses the backward's default of 128 keys before it looks at kernel options
                assert option.max_autotune or slots == 128 or not training
                assert slots == 128 or len(blocks) >= 2


# ---- what is said where nothing runs


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


# ---- packages and where they lie


SOURCE = """
#include <Python.h>
int answer(void);
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastvideo_kernel_ops", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_fastvideo_kernel_ops(void) {
    PyObject *made = PyModule_Create(&module);
    PyModule_AddIntConstant(made, "answer", answer());
    return made;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_an_extension_finds_the_drivers_library_by_its_copys_name(tmp_path: Path) -> None:
    def build(source: str, out: Path, *flags: str) -> None:
        (tmp_path / "source.c").write_text(source)
        command = ["cc", "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", "-o", str(out)]
        done = subprocess.run([*command, str(tmp_path / "source.c"), *flags], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no extension can be built here: {done.stderr[-200:]}")

    root, driver, copy = tmp_path / "site", tmp_path / "libcuda.so.580.1", "libcuda-0a1b2c3d.so.580.2"
    code, libs = root / "fastvideo_kernel" / "_C", root / "fastvideo_kernel.libs"
    code.mkdir(parents=True)
    libs.mkdir()
    build("int answer(void) { return 42; }", driver, "-Wl,-soname,libcuda.so.1")
    build("int answer(void) { return 13; }", libs / copy, f"-Wl,-soname,{copy}")
    extension = code / "fastvideo_kernel_ops.x.so"
    where = "-Wl,--disable-new-dtags,-rpath,$ORIGIN/../../fastvideo_kernel.libs"
    build(SOURCE, extension, str(libs / copy), where)
    module = fastvideo_tk.load_extension(extension, libs, lambda: driver)
    assert module.answer == 42, "the wheel's own copy was loaded"
    assert [path.name for path in libs.iterdir()] == [copy]


def fake_fetch(wheels: Any, folder: Path, python: str) -> None:
    for wheel in wheels:
        name = wheel.partition("==")[0].replace("-", "_")
        with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}-1.dist-info/METADATA", "Name: x")
            archive.writestr("fastvideo_kernel/_C/fastvideo_kernel_ops.cpython-312-x86_64-linux-gnu.so", "code" * 999)
            archive.writestr("fastvideo_kernel.libs/libcuda-266916da.so.580.173.02", "driver")
            archive.writestr("fastvideo_kernel.libs/libcudart-96c42e41.so.13.0.96", "runtime")
            archive.writestr("fastvideo_kernel/ops.py", "raise ImportError")


def test_download_packs_what_is_needed_and_unpack_brings_it_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gather, "fetch", fake_fetch)
    assert __main__.main(["--download", str(tmp_path / "packed"), "fastvideo_tk", "fastvideo_triton"]) == 0
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["fastvideo.tar.xz"]
    assert "fastvideo_tk: fastvideo, 0.0 MiB, fits one load" in capsys.readouterr().out
    target = tmp_path / "site"
    assert __main__.main(["--unpack", str(tmp_path / "packed"), "--baseline-dir", str(target)]) == 0
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {
        "fastvideo_kernel-1.dist-info/METADATA",
        "fastvideo_kernel/_C/fastvideo_kernel_ops.cpython-312-x86_64-linux-gnu.so",
        "fastvideo_kernel.libs/libcudart-96c42e41.so.13.0.96",
    }
    assert (target / "fastvideo_kernel.libs/libcudart-96c42e41.so.13.0.96").read_text() == "runtime"


def test_what_is_packed_of_large_wheels() -> None:
    def kept(group: str, path: str) -> bool:
        return gather.wanted(gather.GROUPS[group], path)

    compiler = (
        "nvidia_cutlass_dsl/dsl_packages/cutlass/_mlir/_mlir_libs/_cutlass_ir.cu13.cpython-312-x86_64-linux-gnu.so"
    )
    assert kept("cutlass_compiler", compiler) and not kept("cutlass", compiler)
    runtime = "nvidia_cutlass_dsl/cu13/lib/libcute_dsl_runtime.so"
    assert kept("cutlass", runtime) and not kept("cutlass_compiler", runtime)
    assert kept("cutlass", "nvidia_cutlass_dsl_packages.pth") and kept("cutlass", "tvm_ffi/lib/libtvm_ffi.so")
    assert not kept("cutlass", "tvm_ffi/3rdparty/x.c")
    assert kept("cudnn_frontend", "cudnn/__init__.py") and kept("cudnn_frontend", "cudnn/engines/base.py")
    assert not kept("cudnn_frontend", "cudnn/sdpa/fwd/api_dsl.py")
    assert kept("cudnn_frontend", "nvidia_cudnn_frontend-1.32.0.dist-info/licenses/LICENSE")


def test_groups_and_loads() -> None:
    assert set(gather.NEEDS) < set(BASELINES) and {g for gs in gather.NEEDS.values() for g in gs} == set(gather.GROUPS)
    assert set(gather.groups_of([])) == set(gather.GROUPS)
    assert gather.groups_of(["fastvideo_tk", "fastvideo_triton", "fastvideo"]) == ["fastvideo"]
    with pytest.raises(ValueError, match="dense_cudnn needs no package"):
        gather.groups_of(["dense_cudnn"])
    assert gather.loads({"a": 2, "b": 50, "c": 9, "d": 12}, 60) == [["b", "c"], ["d", "a"]]
    lines: list[str] = []
    sizes = {"cutlass_compiler": 61 << 20, "cutlass": 1 << 20, "flash_attn_4": 1 << 20}
    gather.report(sizes, 60 << 20, lines.append)
    assert lines[3] == "dense_fa4: cutlass_compiler + cutlass + flash_attn_4, 63.0 MiB, needs more than one load"
    assert lines[4] == "load 1: cutlass_compiler, 61.0 MiB of 60, over the limit"
    assert lines[5] == "load 2: cutlass flash_attn_4, 2.0 MiB of 60" and len(lines) == 6


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "of_a_baseline.py").write_text("here = True")
    (tmp_path / "packages.pth").write_text("more\n")
    assert __main__.main(["--check", "--baseline-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(BASELINES)
    assert lines[list(BASELINES).index("flex_128")].startswith("flex_128: 128 slots: ")
    if not torch.cuda.is_available():
        assert all("runs on CUDA alone" in line for line in lines)
    assert importlib.util.find_spec("of_a_baseline") is not None, "a .pth file was not followed"
    monkeypatch.setitem(BASELINES, "flex_64", lambda p, training: baselines.Attend(function=torch.add, note="fine"))
    assert __main__.main(["--check"]) == 0
    assert "\nflex_64: 64 slots: available, fine\n" in capsys.readouterr().out
    for wrong, said in (
        (["--check", "--baseline-dir", str(tmp_path / "none")], "is no folder"),
        (["--unpack", str(tmp_path)], "--unpack needs --baseline-dir"),
        (["--unpack", str(tmp_path), "--baseline-dir", str(tmp_path)], r"holds no *.tar.xz"),
        (["--download", str(tmp_path), "flex_64"], "flex_64 needs no package"),
    ):
        assert __main__.main(wrong) == 2
        assert said in capsys.readouterr().err
