"""Fine-tuning needs its extra; accelerate keeps state that is global to a process, and every run here is one of its own."""

from collections.abc import Iterator

import pytest

for package in ("accelerate", "av", "diffusers", "tensorboard"):
    pytest.importorskip(package)


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate() -> Iterator[None]:
    from finetune.tiny import forget_accelerate

    forget_accelerate()
    yield
    forget_accelerate()
