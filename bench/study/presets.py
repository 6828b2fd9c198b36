"""What a study trains and probes, most informative first. A run that stands twice is trained further the second time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import flexsparse as fs
from bench.study.max_pooling import MaxPooledVSA
from bench.study.settings import ANCHOR, Method, Run, Size
from flexsparse.masks import SlidingTile, TopP

SMOKE = Size(name="smoke", dim=32, depth=2, heads=1, patch=8, frames=8, height=64, width=64)
BASE = Size(name="base", dim=128, depth=4, heads=2, patch=8, frames=16, height=128, width=128)
SMALL = dataclasses.replace(BASE, name="small", dim=64, depth=3, heads=1)
ODD = dataclasses.replace(SMALL, name="odd", frames=13, height=120, width=144)
"""13 x 15 x 18 tokens: 4 divides no axis."""
M60 = Size(
    name="60m", dim=512, depth=12, heads=8, patch=8, frames=16, height=256, width=256, batch=4, learning_rate=5e-4
)
M120 = dataclasses.replace(M60, name="120m", dim=768, heads=12, learning_rate=4e-4)

DENSE = Method(name=ANCHOR, attention="dense")


def methods(top_k: int) -> dict[str, Method]:
    """All methods, by name.

    Args:
        top_k: tiles of 4x4x4 that VSA keeps: an eighth of them (the paper: 32 of 256, 87.5 % sparsity). Tiles of other sizes
            keep as many tokens.
    """
    vsa = Method(name="vsa", builder=fs.VSA(top_k=top_k), gates=True)
    bsa = Method(name="bsa", builder=fs.BSA(keep_queries=0.5, kv_density=0.125))

    def other(base: Method, name: str, **fields: object) -> Method:
        return dataclasses.replace(base, name=name, **fields)  # type: ignore[arg-type]

    def bsa_with(name: str, **options: object) -> Method:
        return other(bsa, name, builder=dataclasses.replace(bsa.builder, **options))

    found = [
        DENSE,
        vsa,
        bsa,
        other(vsa, "fine_only", gates=False),
        Method(name="top_p", builder=TopP(mass=0.5), gates=True),
        Method(name="sliding_tile", builder=SlidingTile(window=(2, 2, 2))),
        Method(name="own_tile", builder=SlidingTile(window=(1, 1, 1))),
        Method(name="spatial_temporal", attention="spatial_temporal"),
        Method(name="spatial_full", attention="spatial_full"),
        Method(name="compressed_kv", attention="compressed_kv"),
        other(vsa, "vsa_tile16", tile=(2, 4, 2), builder=fs.VSA(top_k=4 * top_k)),
        other(vsa, "vsa_tile128", tile=(4, 8, 4), builder=fs.VSA(top_k=max(1, top_k // 2))),
        other(vsa, "vsa_tile256", tile=(4, 8, 8), builder=fs.VSA(top_k=max(1, top_k // 4))),
        other(vsa, "vsa_max", builder=MaxPooledVSA(top_k=top_k)),
        other(vsa, "vsa_half_k", builder=fs.VSA(top_k=max(1, top_k // 2))),
        other(vsa, "vsa_double_k", builder=fs.VSA(top_k=2 * top_k)),
        bsa_with("bsa_nearest", fill="nearest"),
        bsa_with("bsa_zero", fill="zero"),
        bsa_with("bsa_tile_window", window=None),
        bsa_with("bsa_mass", threshold="mass", mass=0.5),
        bsa_with("bsa_medoid", representative="medoid"),
        other(DENSE, "dense_more"),
        *(
            Method(name=f"{name}_{how}", builder=builder, gates=gates, anneal=share)
            for name, builder, gates in (("vsa", fs.VSA(sparsity=0.875), True), ("bsa", bsa.builder, False))
            for how, share in (("abrupt", 0.0), ("annealed", 0.5))
        ),
    ]
    return {method.name: method for method in found}


def odd_methods() -> dict[str, Method]:
    """For a grid that 4 does not divide: the fixed tile, the tile that fits best, and partial tiles weighed by their tokens."""
    vsa = Method(name="vsa", builder=fs.VSA(sparsity=0.875), gates=True)
    found = [
        DENSE,
        vsa,
        dataclasses.replace(vsa, name="vsa_auto", tile="auto"),
        dataclasses.replace(vsa, name="vsa_bias", builder=fs.VSA(sparsity=0.875, count_bias=True)),
    ]
    return {method.name: method for method in found}


COMPARED = ("fine_only", "own_tile", "sliding_tile", "spatial_temporal", "top_p", "spatial_full", "compressed_kv")
"""Of these `own_tile`, in which no tile sees another, is the floor: where it does as well as dense, attention does not matter
there, and no other comparison says anything."""
PARTS = ("vsa_tile16", "vsa_tile256", "vsa_max", "vsa_tile128", "vsa_half_k", "vsa_double_k")
RULES = ("bsa_zero", "bsa_tile_window", "bsa_nearest", "bsa_mass", "bsa_medoid")
SCHEDULES = ("dense_more", "vsa_abrupt", "vsa_annealed", "bsa_abrupt", "bsa_annealed")
MAIN = (ANCHOR, "vsa", "bsa")
LONGER = {"vsa": 4.25, "bsa": 5.5}
"""Times the steps of dense training: somewhat more than its FLOPs pay for, at the sizes here."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What is measured on a trained model: see `probes`."""

    run: Run

    @property
    def name(self) -> str:
        """For --only and --list."""
        return f"probe/{self.run.name}@{self.run.steps}"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Training steps of all methods of a size, in turn."""

    size: Size
    methods: tuple[Method, ...]
    repeats: int = 7

    @property
    def name(self) -> str:
        """For --only and --list."""
        return f"timing/{self.size.name}"


Item = Run | Probe | Timing


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A study.

    Attributes:
        name: of it.
        items: in the order of work.
        windows: held-out windows, at most.
    """

    name: str
    items: tuple[Item, ...]
    windows: int = 6

    @property
    def sizes(self) -> list[Size]:
        """Sizes that occur, each once."""
        found = (item.run.size if isinstance(item, Probe) else item.size for item in self.items)
        return list({size.name: size for size in found}.values())


@dataclass(frozen=True, kw_only=True)
class Maker:
    """Makes the runs of one size.

    Attributes:
        size: of them.
        steps: of a training.
        every: steps between evaluations.
        known: methods by name.
    """

    size: Size
    steps: int
    every: int
    known: dict[str, Method]

    def runs(self, names: Sequence[str], seeds: Sequence[int], question: str, steps: int = 0) -> Iterator[Run]:
        """Trainings from random weights, seed by seed."""
        for seed in seeds:
            for name in names:
                yield Run(
                    size=self.size,
                    method=self.known[name],
                    seed=seed,
                    steps=steps or self.steps,
                    question=question,
                    evaluate_every=self.every,
                )

    def longer(self, seeds: Sequence[int]) -> Iterator[Run]:
        """The same trainings, to as many FLOPs as dense training took."""
        for seed in seeds:
            for name, factor in LONGER.items():
                yield from self.runs((name,), (seed,), "main", round(factor * self.steps / self.every) * self.every)

    def schedules(self, seeds: Sequence[int], steps: int) -> Iterator[Run]:
        """Trainings from the dense ones' weights, at a fifth of the learning rate."""
        for seed in seeds:
            for name in SCHEDULES:
                yield Run(
                    size=self.size,
                    method=self.known[name],
                    seed=seed,
                    steps=steps,
                    question="schedule",
                    start=f"{self.size.name}/{ANCHOR}/s{seed}@{self.steps}",
                    evaluate_every=max(1, steps // 5),
                    learning_rate=self.size.learning_rate / 5,
                )

    def probes(self, names: Sequence[str], seeds: Sequence[int], steps: int = 0) -> Iterator[Probe]:
        """Probes of trained models; of one that was probed after fewer steps, the rows are replaced."""
        for run in self.runs(names, seeds, "main", steps):
            yield Probe(run=run)

    def timing(self, names: Sequence[str], repeats: int = 7) -> Timing:
        """Step times of methods against dense."""
        return Timing(size=self.size, methods=tuple(self.known[name] for name in names), repeats=repeats)


def smoke() -> Preset:
    """Everything once, in two minutes: for tests. It says nothing about quality."""
    make = Maker(size=SMOKE, steps=6, every=3, known=methods(2))
    items = [
        *make.runs(MAIN, (0, 1), "main"),
        *make.runs(COMPARED, (0,), "main"),
        *make.schedules((0,), 10),
        *make.probes(MAIN, (0,)),
        *make.runs(("vsa",), (0,), "main", 9),
        make.timing(MAIN, 2),
    ]
    return Preset(name="smoke", items=tuple(items), windows=1)


def cpu() -> Preset:
    """4,096 tokens (16 x 16 x 16), hours on two cores: everything on the small model, the main methods on a larger one.

    The main methods are trained on to 2,880 steps: on the first runs, dense models of different seeds began to use attention at
    very different steps, so that their gaps were wide apart when the shorter runs ended. That is also what tells equal FLOPs
    there: dense's curve is read at the FLOPs of a sparse run's last step. The larger size trains sparse ones for longer, for
    equal FLOPs, and then dense ones and the floor as long, for equal steps. Three seeds left wide intervals, so the small size
    has three more. At the larger one, too, one VSA model was late, so all go on to 1,920 steps.
    """
    small = Maker(size=SMALL, steps=960, every=120, known=methods(8))
    base = Maker(size=BASE, steps=240, every=80, known=methods(8))
    odd = Maker(size=ODD, steps=480, every=120, known=odd_methods())
    all_seeds = (0, 1, 2)
    items = [
        *small.runs(MAIN, (0,), "main"),
        *small.probes(MAIN, (0,)),
        *small.runs(MAIN, (1, 2), "main"),
        *small.schedules(all_seeds, 200),
        *small.runs(("own_tile",), all_seeds, "main"),
        *small.probes(MAIN, (1, 2)),
        *small.runs(COMPARED[:1] + COMPARED[2:], all_seeds, "main"),
        *small.runs((*MAIN, "own_tile"), all_seeds, "main", 2880),
        small.timing((*MAIN, *COMPARED, *PARTS)),
        *base.runs(MAIN, all_seeds, "main"),
        base.timing(MAIN),
        *small.runs(PARTS, all_seeds, "parts"),
        *small.runs(RULES, all_seeds, "bsa"),
        *odd.runs(tuple(odd.known), all_seeds, "grid"),
        *base.runs(("own_tile",), all_seeds, "main"),
        *base.longer(all_seeds),
        *base.runs((ANCHOR, "own_tile"), all_seeds, "main", 960),
        *base.probes(MAIN, all_seeds),
        *base.probes((ANCHOR,), all_seeds, 960),
        *small.runs((*MAIN, "own_tile"), (3, 4, 5), "main", 2880),
        *base.runs((*MAIN, "own_tile"), all_seeds, "main", 1920),
    ]
    return Preset(name="cpu", items=tuple(items))


def gpu() -> Preset:
    """16,384 tokens (16 x 32 x 32), 60M and 120M parameters: the shape of the VSA paper's ablations (its section 3.1)."""
    items: list[Item] = []
    for size, steps in ((M60, 600), (M120, 400)):
        make = Maker(size=size, steps=steps, every=steps // 4, known=methods(32))
        items += [make.timing((*MAIN, *COMPARED)), *make.runs(MAIN, (0,), "main"), *make.probes(MAIN, (0,))]
        items += [*make.runs(MAIN, (1, 2), "main"), *make.runs(COMPARED, (0,), "main")]
        items += [*make.longer((0,)), *make.schedules((0, 1, 2), steps // 3)]
        items += [*make.runs(PARTS, (0, 1, 2), "parts"), *make.runs(RULES, (0, 1, 2), "bsa")]
        items += [*make.runs(COMPARED, (1, 2), "main"), *make.longer((1, 2))]
    return Preset(name="gpu", items=tuple(items), windows=12)


PRESETS = {"smoke": smoke, "cpu": cpu, "gpu": gpu}
