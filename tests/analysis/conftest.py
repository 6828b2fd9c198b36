"""A page that holds a look at a tiny model, made once, and a browser that opens it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

BROWSERS = ("chromium", "chromium-browser")


@pytest.fixture(scope="session")
def looked() -> tuple[Any, dict[str, Any]]:
    """(what `inspect` found, the page's data): HunyuanVideo with text, BSA, tiles cut by the border."""
    pytest.importorskip("diffusers")
    from models.zoo import ZOO

    import flexsparse as fs
    from flexsparse.analysis import inspect, page
    from flexsparse.analysis.inputs import model_inputs

    model = ZOO["hunyuan"].model()
    latents = torch.randn(1, 4, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    fs.wrap(model, fs.BSA(keep_queries=0.5, kv_density=0.4), tile=(2, 4, 4), compile=False)
    found = inspect(model, model_inputs(model, latents, 0.5, 6), sample=4)
    header = {
        "title": "</script><b>a title</b>",
        "model": "Model",
        "builder": "BSA()",
        "clip": "clip & co",
        "credit": None,
        "time": 0.5,
        "notes": ["A note."],
    }
    pixel = bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8ffff3f0005fe02fe"
        "0def46b80000000049454e44ae426082"
    )
    return found, page.describe(found, header, [pixel] * 3)


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[str, str], str]:
    """Opens a page, given as HTML and what follows its address, in headless Chromium; gives the DOM after its scripts ran."""
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH (Debian's package chromium has it)")

    def open_page(html: str, address: str = "") -> str:
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom"]
        done = subprocess.run(
            [program, *options, file.as_uri() + address], capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout

    return open_page
