"""Weights that are stored in few bits: torchao, bitsandbytes, GGUF, quanto, and diffusers' layerwise casting.

The libraries are no dependency of the tests: `make test-full` installs them for this file, elsewhere their cases are skipped.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexsparse as fs
from flexsparse.gates import Gate, gate_dtype

from .zoo import WAN

SIZES = {"num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 64, "freq_dim": 64, "ffn_dim": 128}
"""Multiples of 32, of which GGUF makes blocks."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def wan(dtype: torch.dtype = torch.float32) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import WanTransformer3DModel

        torch.manual_seed(0)
        model = WanTransformer3DModel(**{**WAN, **SIZES})
    for block in model.blocks:  # attention that tells tokens apart, or it would not show what is sparse
        nn.init.constant_(block.attn1.norm_q.weight, 4.0)
        nn.init.normal_(block.attn1.to_out[0].weight, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def run(model: nn.Module, T: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(T)
    dtype = next(p.dtype for name, p in model.named_parameters() if name.endswith("norm_q.weight"))
    video, text = torch.randn(1, 4, T, 16, 16, generator=g), torch.randn(1, 8, SIZES["text_dim"], generator=g)
    out = model(video.to(dtype), torch.tensor([500]), text.to(dtype), return_dict=False)[0]
    return torch.Tensor._make_subclass(Tensor, out)  # a compiled graph of GGUF layers returns their class of parameter


def wrap(model: nn.Module, compile: bool | str = False) -> nn.Module:
    """Sparse, with gates that are open by the same random numbers."""
    how = {} if compile is False else {"inner": "aot_eager"}
    fs.wrap(model, fs.VSA(top_k=2), gates=True, compile=compile, **how)
    with torch.no_grad():
        for index, parameter in enumerate(fs.gate_parameters(model)):
            g = torch.Generator().manual_seed(index)
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    return model


def replace(model: nn.Module, change: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Change every linear map of the blocks."""
    for block in model.blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, change(child))
    return model


def twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same model with ordinary linear maps, of the weights that the stored ones stand for."""
    plain = wan(dtype)
    for (_, stored), (_, own) in zip(linears(model), linears(plain), strict=True):
        own.bias.copy_(stored.bias)
        own.weight.copy_((stored(torch.eye(own.in_features, dtype=dtype)) - stored.bias).T)
    return plain


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.blocks.named_modules() if isinstance(module, nn.Linear)]


class Int8(nn.Linear):
    """Rows of int8 with a scale each, computed in the dtype of its bias whatever dtype hidden states have."""

    def __init__(self, stored: nn.Linear) -> None:
        super().__init__(stored.in_features, stored.out_features, device="meta")
        scale = stored.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((stored.weight / scale).round().to(torch.int8), requires_grad=False)
        self.bias = stored.bias
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.bias.dtype), self.weight.to(self.bias.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("compile", [False, True, pytest.param("regional", marks=pytest.mark.slow)])
@torch.no_grad()
def test_gates_beside_projections_in_int8(compile: bool | str) -> None:
    """wrap refused gates there: a model that was quantised as it was loaded could have none."""
    model = replace(wan(), Int8)
    plain = wrap(twin(model, torch.float32))
    wrap(model, compile)
    assert all(p.dtype is torch.float32 for p in fs.gate_parameters(model))
    for T in (4,) if compile is True else (4, 8):
        torch.testing.assert_close(run(model, T), run(plain, T), atol=1e-4, rtol=0)
    without = twin(fs.unwrap(model), torch.float32)
    fs.wrap(without, fs.VSA(top_k=2), compile=False)
    assert not torch.allclose(run(without), run(plain), atol=1e-2), "the gates do something"


@pytest.mark.parametrize("wrapped_first", [True, False])
@torch.no_grad()
def test_layerwise_casting(wrapped_first: bool) -> None:
    """diffusers stores weights in float8 and brings them back for each forward of their layer; norms stay as they are."""

    def cast(model: nn.Module) -> nn.Module:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        return model

    model = cast(wrap(wan(torch.bfloat16))) if wrapped_first else wrap(cast(wan(torch.bfloat16)))
    assert model.blocks[0].attn1.to_q.weight.dtype is torch.float8_e4m3fn
    stored = torch.float8_e4m3fn if wrapped_first else torch.bfloat16
    assert {p.dtype for p in fs.gate_parameters(model)} == {stored}
    plain = wan(torch.bfloat16)
    for name, parameter in plain.named_parameters():
        if model.get_parameter(name).dtype is torch.float8_e4m3fn:
            parameter.copy_(parameter.to(torch.float8_e4m3fn))
    wrap(plain)
    for parameter in fs.gate_parameters(plain):
        parameter.copy_(parameter.to(stored))
    for T in (4, 8):
        torch.testing.assert_close(run(model, T), run(plain, T), atol=1e-2, rtol=0)


def test_the_dtype_of_a_gate() -> None:
    """Its projection's; what that computes in; its bias's; the module's; the model's."""
    module = nn.Module()
    module.to_q = nn.Linear(4, 4, dtype=torch.float16)
    module.norm = nn.LayerNorm(8, dtype=torch.float32)
    model = nn.ModuleList([module, nn.Linear(64, 64, dtype=torch.float64)])

    def found() -> torch.dtype | None:
        return gate_dtype(model, module, module.to_q)

    assert found() is torch.float16
    module.to_q.weight = nn.Parameter(torch.zeros(2, 4, dtype=torch.uint8), requires_grad=False)
    assert found() is torch.float16, "its bias's"
    module.to_q.compute_dtype = torch.bfloat16
    assert found() is torch.bfloat16
    module.to_q.compute_dtype, module.to_q.bias = None, None
    assert found() is torch.float32, "its norm's"
    module.norm = nn.Identity()
    assert found() is torch.float64
    model[1] = nn.Identity()
    assert found() is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_gate_takes_hidden_states_of_any_dtype(device: str) -> None:
    """And under autocast is computed in what autocast says."""
    gate = Gate(8, 4, 1.0, torch.bfloat16, torch.device(device))
    assert gate(torch.ones(1, 2, 8, device=device)).dtype is torch.bfloat16
    assert gate(torch.ones(1, 2, 8, device=device, dtype=torch.float16)).dtype is torch.bfloat16
    if device == "cpu":
        with torch.autocast("cpu", torch.float16):
            assert gate(torch.ones(1, 2, 8)).dtype is torch.float16


def torchao(config: str) -> Callable[[nn.Module], nn.Module]:
    def store(model: nn.Module) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model.blocks, getattr(quantization, config)())
        return model

    return store


def quanto(model: nn.Module) -> nn.Module:
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model.blocks, weights=library.qint8)
    library.freeze(model.blocks)
    return model


def bitsandbytes(kind: str, **options: object) -> Callable[[nn.Module], nn.Module]:
    def store(model: nn.Module) -> nn.Module:
        layer = getattr(pytest.importorskip("bitsandbytes").nn, kind)

        def change(linear: nn.Linear) -> nn.Module:
            stored = layer(linear.in_features, linear.out_features, True, **options)
            stored.load_state_dict(linear.state_dict())
            return stored.to("cpu").requires_grad_(False)

        replace(model, change)
        run(model)  # on CPU it packs weights in its first forward, which no graph can hold
        return model

    return store


def gguf(kind: str) -> Callable[[nn.Module], nn.Module]:
    def store(model: nn.Module) -> nn.Module:
        library = pytest.importorskip("gguf")
        utils = importlib.import_module("diffusers.quantizers.gguf.utils")

        def change(linear: nn.Linear) -> nn.Module:
            stored = utils.GGUFLinear(linear.in_features, linear.out_features, True, compute_dtype=torch.bfloat16)
            data = library.quants.quantize(linear.weight.float().numpy(), library.GGMLQuantizationType[kind])
            stored.weight = utils.GGUFParameter(torch.from_numpy(data), quant_type=library.GGMLQuantizationType[kind])
            stored.bias = linear.bias
            return stored

        return replace(model, change)

    return store


STORES = {
    "torchao, int8": torchao("Int8WeightOnlyConfig"),
    "torchao, float8": torchao("Float8WeightOnlyConfig"),
    "torchao, int8, activations too": torchao("Int8DynamicActivationInt8WeightConfig"),
    "quanto, int8": quanto,
    "bitsandbytes, 8 bits": bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes, 4 bits": bitsandbytes("Linear4bit", compute_dtype=torch.bfloat16, quant_type="nf4"),
    "gguf, Q8_0": gguf("Q8_0"),
    "gguf, Q4_0": gguf("Q4_0"),
}


BOUND = 0.1
"""Relative difference of what is computed in bfloat16, whose sums each library orders in its own way, so that a tile may be
chosen that scores the same as another: 0.06 was seen; dense, or without gates, it is 0.3 and more."""


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True, "regional"])
@pytest.mark.parametrize("name", STORES)
@torch.no_grad()
def test_libraries(name: str, compile: bool | str) -> None:
    if name.startswith("gguf") and compile == "regional":
        pytest.skip(
            "torch does not compile diffusers' GGUF layers as regions: model.compile_repeated_blocks() fails too"
        )
    model = STORES[name](wan(torch.bfloat16))
    plain = wrap(twin(model, torch.bfloat16))
    wrap(model, compile)
    assert {p.dtype for p in fs.gate_parameters(model)} == {torch.bfloat16}
    for T in (4, 8):
        assert difference(run(model, T), run(plain, T)) < BOUND
    assert fs.report(model).sparse_calls == (1 if compile == "regional" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", [name for name in STORES if "float8" not in name and "activations" not in name])
def test_adapters_and_gates_are_trained(name: str, compile: bool) -> None:
    """Of a frozen model that is stored in few bits (QLoRA): as of one of ordinary linear maps with the same weights."""
    peft = pytest.importorskip("peft")
    if name.startswith("gguf") and compile:
        pytest.skip("a compiled graph of diffusers' GGUF layers returns their class of parameter, which has no loss")
    with torch.no_grad():
        model = STORES[name](wan(torch.bfloat16))
        plain = twin(model, torch.bfloat16)
    found = []
    for one, how in ((model, compile), (plain, False)):
        config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        one.add_adapter(copy.deepcopy(config))
        wrap(one, how)
        for index, (key, parameter) in enumerate(one.named_parameters()):
            if "lora" in key:
                g = torch.Generator().manual_seed(index)
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=g))
        one.train()
        video = torch.randn(1, 4, 4, 16, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
        text = torch.randn(1, 8, SIZES["text_dim"], generator=torch.Generator().manual_seed(2)).bfloat16()
        one(video, torch.tensor([500]), text, return_dict=False)[0].float().square().mean().backward()
        found.append({key: p.grad for key, p in one.named_parameters() if p.requires_grad})
    ours, theirs = found
    assert set(ours) == set(theirs) and any("to_gate" in key for key in ours) and any("lora" in key for key in ours)
    for key, gradient in theirs.items():
        assert gradient is not None and ours[key] is not None and gradient.norm() > 0, key
        assert difference(ours[key], gradient) < BOUND, key
