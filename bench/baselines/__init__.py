"""Other implementations on our inputs: dense attention, and block-sparse attention over the same lists.

None of them is a dependency, and none is here: `README.md` says how each is obtained. `python -m bench.baselines --check`
says which run on this machine.
"""

from __future__ import annotations

import site
from pathlib import Path

from bench.baselines import attention_gym, cudnn_frontend, dense, fastvideo_tk, fastvideo_triton, flex
from bench.baselines.protocol import Attend, Prepare, Problem, Unavailable

BASELINES: dict[str, Prepare] = {
    "dense_cudnn": dense.cudnn,
    "dense_fa2": dense.fa2,
    "dense_fa4": dense.fa4,
    "flex_64": flex.flex_64,
    "flex_128": flex.flex_128,
    "attention_gym": attention_gym.prepare,
    "fastvideo_tk": fastvideo_tk.prepare,
    "fastvideo_triton": fastvideo_triton.prepare,
    "cudnn_frontend": cudnn_frontend.prepare,
}


def use_directory(folder: Path | str) -> None:
    """Make the packages unpacked in a folder importable, after whatever is installed.

    Raises:
        ValueError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"--baseline-dir {folder} is no folder: make it with `python -m bench.baselines --unpack`")
    site.addsitedir(str(Path(folder).resolve()))


__all__ = ["BASELINES", "Attend", "Prepare", "Problem", "Unavailable", "use_directory"]
