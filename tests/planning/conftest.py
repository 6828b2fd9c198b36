"""Tiny models of diffusers, as folders that `flexsparse plan` reads."""

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from tests.models.zoo import ZOO


@pytest.fixture
def folder(tmp_path):
    """Writes a model's config.json; returns its folder."""

    def write(name: str, **changes) -> Path:
        kind, config = ZOO[name].make
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps({"_class_name": kind, **config, **changes}))
        return place

    return write
