"""Settings: every bad value is one error that names argument, value and remedy."""

import pytest

from flexsparse.demo.settings import Settings
from flexsparse.training.environment import check_device
from flexsparse.training.errors import RunError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, r"--steps 0 is too small: pass at least 1"),
        ({"frames": 1}, r"--frames 1 is no video: pass at least 2"),
        ({"height": 100}, r"--height 100 is not a multiple of the patch: pass a multiple of 8"),
        ({"width": -8}, r"--width -8 is too small"),
        ({"sparsity": 1.0}, r"--sparsity 1\.0 is outside \[0, 1\)"),
        ({"sparsity": float("nan")}, r"--sparsity nan is outside"),
        ({"top_k": 0}, r"--top-k 0 is outside \[1, 112\]"),
        ({"top_k": 113}, r"--top-k 113 is outside \[1, 112\], the number of tiles"),
        ({"keep_queries": 0.0}, r"--keep-queries 0\.0 is outside \(0, 1\]"),
        ({"learning_rate": 0.0}, r"--lr 0\.0"),
        (
            {"methods": ("dense", "sparse")},
            r"--methods 'dense,sparse' is not understood: list some of dense,vsa,bsa",
        ),
        ({"methods": ("vsa", "vsa")}, r"each once"),
        ({"device": "tpu"}, r"--device 'tpu' is unknown: pass cpu or cuda"),
        ({"heads": 3}, r"--heads 3"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(RunError, match=message):
        Settings(**values)


def test_default_has_enough_tokens_and_partial_tiles():
    settings = Settings()
    assert settings.tokens >= 4000
    assert any(size % side for size, side in zip(settings.grid, settings.tile))


def test_differences_and_digest():
    one, two = Settings(), Settings(seed=1, top_k=5)
    assert one.digest() == Settings().digest() != two.digest()
    assert two.differences(one.as_dict()) == ["--top-k is 5, the run has None", "--seed is 1, the run has 0"]
    assert one.differences(Settings().as_dict()) == []


def test_cuda_without_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RunError, match=r"--device cuda: torch .* sees no CUDA device: use --device cpu"):
        check_device("cuda")
