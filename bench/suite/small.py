"""A few tiny cases of every template, for compute-sanitizer: `python -m bench.suite.small`."""

from __future__ import annotations

import torch

import flexsparse as fs
from bench.suite import tuning

LAYOUTS = (
    fs.TileLayout(grid=(4, 8, 8), tile=(4, 4, 4)),
    fs.TileLayout(grid=(5, 6, 9), tile=(4, 4, 4), text_first=3, text_last=70),
    fs.TileLayout(grid=(4, 8, 8), tile=(4, 8, 4)),
)
DIMS = (64, 128)


def attention(device: torch.device, layout: fs.TileLayout, D: int, dtype: torch.dtype) -> None:
    """Forward and backward of one attention, coarse output and gate included."""
    q, k, v = (torch.randn(1, 2, layout.seq_len, D, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    gate = torch.randn_like(q)
    out = fs.sparse_attention(q, k, v, layout, fs.VSA(sparsity=0.5), gate=gate)
    out.square().mean().backward()


def main() -> int:
    """Run them; the last line says that all of them ran."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tuned = tuning.table()
    for layout in LAYOUTS:
        for D in DIMS:
            attention(device, layout, D, torch.bfloat16)
            if tuned is None or device.type != "cuda":
                continue
            major, minor = torch.cuda.get_device_capability()
            arch = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
            for op in tuned.OPS:
                for choice in tuned.candidates(arch, torch.bfloat16, D, layout.slots, layout.slots, op):
                    with tuned.using(choice):
                        attention(device, layout, D, torch.bfloat16)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("small: done")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
