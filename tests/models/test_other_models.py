"""Models whose input does not say its grid, and such as cannot become sparse: a call is right, or says what to do."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from docs.pages import blocks, read
from torch import Tensor, nn

import flexsparse as fs
from flexsparse.compile_passes import RewriteError

from .entry import Size, kind_of, random
from .zoo import ZOO

GRID = (4, 8, 8)
ALL = 4  # tiles of GRID
TEXT, AUDIO = 6, 7
BLOCKS = ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]


def made(kind: str, **config: Any) -> nn.Module:
    """A model of diffusers, random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return kind_of(kind)(**config).eval()


def minimax() -> nn.Module:
    return made(
        "MiniMaxH3Transformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=2,
        ffn_dim=64,
        in_channels=4,
        audio_in_channels=3,
        text_dim=16,
        freq_dim=32,
        time_embed_hidden_dim=32,
        time_embed_dim=16,
        rope_freq_dim=2,
    )


def rows(grid: Size, frames: int) -> dict[str, Tensor]:
    """A call as MiniMax-H3's pipeline packs it: text, condition frames, audio, and the video that is made."""
    T, H, W = grid
    sound = TEXT + frames * H * W
    start = sound + AUDIO
    packed = torch.arange(start + T * H * W)
    return {
        "hidden_states": random(1, (frames + T) * H * W, 16),
        "audio_hidden_states": random(1, AUDIO, 3),
        "encoder_hidden_states": random(1, TEXT, 16),
        "timestep": torch.tensor([0.5, 0.0]),
        "timestep_indices": (packed < start).long(),
        "token_tags": torch.where(packed < TEXT, 1, torch.where((packed >= sound) & (packed < start), 2, 0)),
        "position_ids": torch.stack([packed // (H * W), packed // W % H, packed % W], 1).double(),
        "video_indices": torch.cat([packed[TEXT:sound], packed[start:]]),
        "audio_indices": packed[sound:start],
        "text_indices": packed[:TEXT],
    }


def of_the_page(name: str) -> Any:
    """A function that the page of models shows."""
    text = next(block.text for block in blocks(read("models.md"), "python") if f"def {name}(" in block.text)
    names: dict[str, Any] = {}
    exec(text, names)
    return names[name]


def gradients(model: nn.Module, frames: int) -> dict[str, Tensor]:
    model.zero_grad()
    model(**rows(GRID, frames), return_dict=False)[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed(top_k: int, way: Any, **options: Any) -> nn.Module:
    """MiniMax-H3 wrapped as the page says."""
    return fs.wrap(minimax(), fs.VSA(top_k=top_k), grid=of_the_page("last_rows")(*GRID), compile=way, **options)


def test_packed_rows_all_tiles_equal_dense() -> None:
    """Outputs of video and audio, and gradients; with another number of condition frames, as the function is asked anew."""
    mine, plain = packed(ALL, False), minimax()
    for frames in (1, 2):
        with torch.no_grad():
            got, wanted = (model(**rows(GRID, frames), return_dict=False) for model in (mine, plain))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(gradients(mine, frames), gradients(plain, frames), atol=2e-6, rtol=1e-3)
    assert [call.name for call in fs.report(mine).calls if call.sparse] == BLOCKS


@pytest.mark.parametrize("way", [False, *(pytest.param(way, marks=pytest.mark.slow) for way in ("regional", True))])
def test_packed_rows_select_and_train(way: Any) -> None:
    """With gates, however it runs, as the oracle; another number of rows is the second graph."""
    mine = packed(2, way, gates=True, **({"inner": "aot_eager"} if way else {}))
    oracle = packed(2, False, gates=True, attention="reference")
    assert {name.rpartition(".to_gate")[0] for name in mine.state_dict() if "to_gate" in name} == set(BLOCKS)
    for frames in (1, 2):
        found, wanted = gradients(mine, frames), gradients(oracle, frames)
        for name, grad in found.items():
            expected = wanted.get(name, torch.zeros_like(grad))
            torch.testing.assert_close(grad, expected, atol=2e-6, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}")
        assert wanted.keys() <= found.keys()


def test_packed_rows_without_a_grid_say_so() -> None:
    model = fs.wrap(minimax(), fs.VSA(top_k=2), compile=False)
    with pytest.raises(ValueError, match=r"hidden_states is .*grid=function\(module, args, kwargs\)"):
        model(**rows(GRID, 1))
    with pytest.raises(ValueError, match="its audio attends to the video's, of which a rank would"):
        fs.distributed.ulysses(model)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Cosmos3OmniTransformer": (
        {
            "head_dim": 16,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "vocab_size": 10,
            "rope_axes_dim": [4, 2, 2],
        },
        "text that does not attend back.*kv_layout= with text_first=",
    ),
    "WanAnimate2Transformer3DModel": (
        {"dim": 32, "ffn_dim": 32, "text_dim": 8, "num_heads": 2, "num_layers": 1, "use_img_emb": False},
        "through FlexAttention with a mask of its own.*sparse_attention in an attention processor",
    ),
    "AnyFlowFARTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "text_dim": 8, "num_layers": 1},
        "through FlexAttention",
    ),
    "Kandinsky6SRTransformer3DModel": (
        {"time_dim": 16, "model_dim": 32, "ff_dim": 32, "num_visual_blocks": 1, "axes_dims": (4, 6, 6)},
        "through FlexAttention",
    ),
    "SanaVideoTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 16,
        },
        "linear attention, which selects nothing: leave it unwrapped",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("options", [{}, {"grid": GRID, "compile": "regional"}, {"gates": True, "compile": False}])
def test_what_cannot_become_sparse_is_refused_in_a_sentence(kind: str, options: dict[str, Any]) -> None:
    config, why = REFUSED[kind]
    model = made(kind, **config)
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=f"^{kind} cannot be made sparse: it .*{why}") as said:
        fs.wrap(model, fs.VSA(top_k=2), **options)
    assert "\n" not in str(said.value)
    assert set(model.state_dict()) == names and all("forward" not in module.__dict__ for module in model.modules())


def test_history_that_is_not_given_is_not_counted() -> None:
    """A first clip of Helios has none."""
    entry = ZOO["helios"]
    inputs = {name: x for name, x in entry.inputs(GRID, 1).items() if "history" not in name}
    model = fs.wrap(entry.model(), fs.VSA(top_k=ALL), compile=False)
    with torch.no_grad():
        got, wanted = (one(**inputs, return_dict=False)[0] for one in (model, entry.model()))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    assert [call.name for call in fs.report(model).calls if call.sparse] == list(entry.sparse)


@pytest.mark.parametrize("way", [False, pytest.param("regional", marks=pytest.mark.slow)])
def test_one_sample_of_framepack_leaves_its_hidden_text_out(way: Any) -> None:
    """As its pipeline calls it: text padded to one length, one sample, of which the model cuts the padding."""
    entry = ZOO["framepack"]
    for hidden in (3, 5):
        inputs = entry.inputs(GRID, 1)
        inputs["encoder_attention_mask"][:, -hidden:] = 0
        model = fs.wrap(
            entry.model(), fs.VSA(top_k=2), compile=way, gates=True, **({"inner": "aot_eager"} if way else {})
        )
        oracle = fs.wrap(entry.model(), fs.VSA(top_k=2), compile=False, gates=True, attention="reference")
        with torch.no_grad():
            got, wanted = (one(**inputs, return_dict=False)[0] for one in (model, oracle))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
        tokens = {call.shape[2] for call in fs.report(oracle).calls if call.sparse}
        assert tokens == {4 * 8 * 8 + sum(entry.extra(GRID)) - hidden}


def test_one_sample_of_framepack_is_no_graph_of_the_whole_model() -> None:
    model = fs.wrap(ZOO["framepack"].model(), fs.VSA(top_k=2))
    with pytest.raises(RewriteError, match=r"encoder_attention_mask hides .*depends on data: use .*compile='regional'"):
        model(**ZOO["framepack"].inputs(GRID, 1))


def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)


class Calls(nn.Module):
    """Attention through a function that has a default, as diffusers' is called by Kandinsky 6."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, video: Tensor) -> Tensor:  # [B, T, H, W, C]
        q, k, v = self.qkv(video.flatten(1, 3)).unflatten(-1, (3, 1, 8)).permute(2, 0, 3, 1, 4)
        return attend(q, k, v)


def test_a_dropout_that_is_a_default_is_no_dropout_in_a_dynamic_graph() -> None:
    """There the default is a symbol."""
    torch._dynamo.reset()
    torch.manual_seed(0)

    def grid(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        return args[0].shape[1:4]

    plain = Calls()
    model = fs.wrap(copy.deepcopy(plain), fs.VSA(top_k=1), grid=grid, inner="aot_eager")
    oracle = fs.wrap(plain, fs.VSA(top_k=1), grid=grid, compile=False, attention="reference")
    for sizes in ((4, 4, 8), (4, 8, 4), (2, 8, 12)):
        video = random(1, *sizes, 8)
        with torch.no_grad():
            torch.testing.assert_close(model(video), oracle(video), atol=1e-5, rtol=0)
