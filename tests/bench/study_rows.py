"""Made-up rows of a study."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
LEVELS = ("0.4828", "0.5918", "0.6682", "0.7394", "0.8198")
HEADER = {
    "suite": "study",
    "preset": "cpu",
    "date": "2030-01-01",
    "git_revision": "abcdef",
    "git_dirty": False,
    "torch": "9.9",
    "cpu": "Made-up CPU",
    "gpu": None,
    "threads": 1,
    "compiled": False,
    "data": "clips",
}


def evaluation(
    size: str, method: str, seed: int, step: int, loss: float | None, flops: float, question: str = "main", **more: Any
) -> Row:
    """One row; levels and windows scatter around the loss."""
    shown = 0.0 if loss is None else loss
    return {
        "kind": "evaluation",
        "run": f"{size}/{method}/s{seed}",
        "size": size,
        "method": method,
        "seed": seed,
        "question": question,
        "step": step,
        "flops": flops,
        "attention_flops": flops / 2,
        "loss": loss,
        "levels": {level: shown * (0.8 + 0.1 * i) for i, level in enumerate(LEVELS)},
        "windows": [shown * (0.9 + 0.05 * i) for i in range(5)],
        "density": 1.0 if method == "dense" else 0.125,
        **more,
    }


def finished(size: str, method: str, seed: int, steps: int, share: float = 1.0, question: str = "main") -> Row:
    """A run's row: attention costs `share` of dense's 6 of 10 FLOPs."""
    attention, selection = 6.0 * share, 0.0 if share == 1 else 0.06
    return {
        "kind": "run",
        "run": f"{size}/{method}/s{seed}",
        "size": size,
        "method": method,
        "seed": seed,
        "question": question,
        "steps": steps,
        "start": None,
        "parameters": 1_500_000,
        "grid": [16, 16, 16],
        "tile": [4, 4, 4],
        "builder": "",
        "flops_per_step": {
            "attention": attention,
            "selection": selection,
            "other": 4.0,
            "total": 4 + attention + selection,
        },
        "dense_flops_per_step": {"attention": 6.0, "selection": 0.0, "other": 4.0, "total": 10.0},
        "train_loss": [],
        "finished": True,
    }


def training(
    size: str,
    method: str,
    seeds: Iterable[int],
    gap: float = 0.0,
    noise: float = 0.001,
    steps: int = 240,
    share: float = 0.15,
    question: str = "main",
    low: float = 0.12,
) -> list[Row]:
    """Runs whose loss is dense's times 1 + gap, up to noise of the seed; dense's own depends on the seed much more."""
    rows = []
    share = 1.0 if method.startswith("dense") else share
    for seed in seeds:
        level = 1 + 0.05 * random.Random(seed).uniform(-1, 1)
        own = gap + noise * random.Random(f"{method}{seed}").gauss(0, 1) if method != "dense" else 0.0
        for step in range(0, steps + 1, steps // 12):
            loss = level * (low + 0.5 * math.exp(-step / 60)) * (1 + own * step / steps)
            flops = step * finished(size, method, seed, steps, share)["flops_per_step"]["total"]
            rows.append(evaluation(size, method, seed, step, loss, 1e12 * flops, question))
        rows.append(finished(size, method, seed, steps, share, question))
    return rows


def probed(size: str, models: Sequence[str]) -> list[Row]:
    """All kinds of probes of some models."""
    rows: list[Row] = []
    draw = random.Random(0)
    for model in models:
        whose = {"size": size, "model": model}
        for layer in range(4):
            for level in LEVELS[::2]:
                where = {**whose, "layer": layer, "level": float(level)}
                for i, method in enumerate(("vsa", "bsa", "bsa_kv", "random", "best", "top_p", "sliding_tile")):
                    for option in (0.5, 0.25, 0.125, 0.0625):
                        error = (0.1 + 0.1 * i) * (1 - option) * (1 + 0.3 * draw.random())
                        found = {"density": option, "error": error, "recall": 1 - error / 2}
                        rows.append({"kind": "training_free", "method": method, "option": option, **found, **where})
                for i, rule in enumerate(("default", "fill=nearest", "fill=zero", "window=1x2x2", "kv_density=1")):
                    error = (0.2, 0.3, 0.7, 0.25, 0.15)[i] * (1 + 0.2 * draw.random())
                    found = {"keep_queries": 0.5, "kv_density": 1.0 if i == 4 else 0.125, "density": 0.07}
                    found |= {"error": error, "pruned_error": 1.3 * error}
                    rows.append({"kind": "bsa_rule", "rule": rule, **found, **where})
                for i, axis in enumerate("thw"):
                    for method in ("vsa", "bsa"):
                        shared = 0.4 + 0.1 * i + 0.05 * layer + 0.02 * draw.random()
                        rows.append(
                            {
                                "kind": "overlap",
                                "method": method,
                                "axis": axis,
                                "overlap": shared,
                                "random": 0.125,
                                **where,
                            }
                        )
        for method, option, loss in (
            ("dense", 1.0, 0.12),
            ("vsa", 0.125, 0.15),
            ("bsa", 0.125, 0.16),
            ("top_p", 0.7, 0.13),
        ):
            found = {"density": option, "loss": loss * (1 + 0.01 * draw.random()), "levels": {}}
            rows.append({"kind": "training_free_loss", "method": method, "option": option, **found, **whose})
    return rows


def timed(size: str, method: str, ratio: float) -> Row:
    """Seconds of steps whose median ratio is `ratio`; the machine slows down on the way."""
    dense = [1.0, 1.1, 2.0]
    return {
        "kind": "timing",
        "size": size,
        "method": method,
        "seconds": [ratio * x for x in dense],
        "dense_seconds": dense,
    }


def everything() -> list[Row]:
    """A study that is done."""
    seeds = (0, 1, 2)
    rows = training("base", "dense", seeds)
    rows += training("base", "vsa", seeds, 0.001, steps=960) + training("base", "bsa", seeds, 0.02)
    for i, method in enumerate(
        ("fine_only", "sliding_tile", "top_p", "spatial_temporal", "spatial_full", "compressed_kv")
    ):
        rows += training(
            "base", method, seeds, (-0.01, 0.015, 0.003, 0.05, 0.045, 0.03)[i], share=(0.15, 0.2, 0.3)[i % 3]
        )
        rows.append(timed("base", method, 0.5 + 0.1 * i))
    rows += [timed("base", "vsa", 0.6), timed("base", "bsa", 0.5)]
    for i, method in enumerate(("vsa_tile16", "vsa_tile128", "vsa_tile256", "vsa_max")):
        rows += training("base", method, seeds[: 1 + i % 3], 0.004 * i, question="parts")
    for method in ("bsa_zero", "bsa_nearest"):
        rows += training("base", method, (0,), 0.05, question="bsa")
    for method in ("dense", "vsa", "vsa_auto"):
        rows += training("odd", method, seeds, 0.004, question="grid")
    for i, method in enumerate(("dense_more", "vsa_abrupt", "vsa_annealed", "bsa_abrupt", "bsa_annealed")):
        rows += training("base", method, seeds, 0.006 * i, steps=96, question="schedule", low=0.11)
    rows += training("small", "dense", (0,)) + training("small", "vsa", (0,), 0.01)
    return rows + probed("base", ("base/dense/s0", "base/dense/s1", "base/vsa/s0"))
