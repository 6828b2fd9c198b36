"""From cases to rows: check, time, write, and go on whatever happens, until the time is over."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

from bench.suite import attention, ceiling, checks, fine, memory, model, overlap, timing, tuning
from bench.suite.cases import OURS, Case
from bench.suite.contender import Contender, Missing, after_dense, reason_of
from bench.suite.device import Device
from bench.suite.gate import verdict
from bench.suite.rows import Row, label, load, tflops, write

LOST = ("CUDA error", "illegal memory access", "unspecified launch failure", "misaligned address", "device-side assert")
STEP, SLOW_STEP, TUNE_STEP = 75.0, 200.0, 30.0
"""Seconds after which a step counts as hanging; compiling a whole model is slow, and what `tune` runs is compiled already."""
TIMING = "timing"
"""What begins when a case is timed, as `beat` is told it; with the name of a contender where each is waited for."""


class ContextLost(Exception):
    """The GPU answers no more; only a new process gets it back."""


@dataclass
class Budget:
    """Until when cases are started.

    Attributes:
        until: on the clock.
        clock: seconds.
        factor: how much longer cases take than their estimates.
    """

    until: float
    clock: Callable[[], float] = time.time
    factor: float = 1.0

    def left(self) -> float:
        """Seconds."""
        return self.until - self.clock()

    def allows(self, seconds: float) -> bool:
        """Whether something of this estimate still fits."""
        return seconds * self.factor <= self.left()

    def learn(self, estimate: float, took: float) -> None:
        """Correct later estimates; by a third at a time, and within bounds."""
        self.factor = min(3.0, max(0.3, self.factor * (2 / 3 + took / max(estimate * self.factor, 1e-3) / 3)))


@dataclass
class Run:
    """State of a run.

    Attributes:
        device: the machine.
        out: directory of the files.
        head: header of every file.
        budget: time.
        baselines: by name, what `bench.baselines` holds.
        checked: rows of the stage `check`, of this run or an earlier one.
        skip: (case, contender) pairs that an earlier process died of, and how.
        beat: told what begins, case and contender, and how many seconds it may take; a supervisor watches it.
        rows: of each stage.
        winners: the tuned choice of each configuration.
        tune_until: when tuning ends; None for a share of what is left.
        deadline: when the case that runs should begin to time what it has checked.
        limit: seconds of a step of it.
    """

    device: Device
    out: Path
    head: dict[str, Any]
    budget: Budget
    baselines: dict[str, Any]
    checked: list[Row] = field(default_factory=list)
    skip: dict[tuple[str, str], str] = field(default_factory=dict)
    beat: Callable[[str, str, float], None] = lambda case, contender, limit: None
    rows: dict[str, list[Row]] = field(default_factory=dict)
    winners: dict[tuning.Key, Any] = field(default_factory=dict)
    tune_until: float | None = None
    deadline: float = math.inf
    limit: float = STEP
    say: Callable[[str], None] = print

    def save(self, stage: str) -> None:
        """Write a stage's file."""
        head = {**self.head, "stage": stage, "checks": checks.tally(self.checked)}
        write(self.out / f"{stage}.json", head, self.rows.setdefault(stage, []))

    def add(self, stage: str, rows: Iterable[Row]) -> None:
        """More rows, written at once."""
        self.rows.setdefault(stage, []).extend(rows)
        self.save(stage)

    def run_check(self, share: float, tests: Path | None = None, first: bool = False) -> None:
        """The stage `check`, in at most ``share`` of what is left; ``first`` for what is measured first alone."""
        until = self.budget.clock() + share * self.budget.left()
        where = {} if tests is None else {"tests": tests}
        done = {row["case"]: row for row in self.checked if row["outcome"] != "not run"}
        found = checks.run_checks(self.out, lambda: until - self.budget.clock(), **where, first=first, done=list(done))
        self.checked = [*done.values(), *(row for row in found if row["case"] not in done)]
        self.rows["check"] = self.checked
        self.save("check")
        self.say(f"checks: {checks.tally(self.checked)}")
        for row in self.checked:
            if row["outcome"] == "failed":
                self.say(f"  FAILED {row['case']}: {str(row['reason'])[:200]}")

    def recheck(self, cases: list[Case]) -> None:
        """Take back times of ours of what a later check found wrong."""
        path = self.out / "bench.json"
        self.rows["bench"] = load(path)[1] if path.is_file() else []
        by_name = {case.name: case for case in cases}
        for row in self.rows["bench"]:
            refused = checks.refusal(self.checked, by_name[row["case"]]) if row["case"] in by_name else {}
            if row["impl"] == OURS and row["op"] in refused and row["ms"]:
                why = refused[row["op"]]
                row |= {"ms": None, "tflops": None, "checked": False, "reason": why, "error": why}
        self.save("bench")

    def run_tune(self, cases: list[Case], share: float) -> None:
        """The stage `tune`: winners are used from then on."""
        self.save("tune")
        until = self.tune_until or self.budget.clock() + share * self.budget.left()
        stage = Budget(until=until, clock=self.budget.clock)
        for case in cases:
            if any(row["case"] == case.name for row in self.rows["tune"]):
                continue
            if not stage.allows(case.estimate()):
                self.add(
                    "tune", [case.row("fine_forward", OURS, reason="the time for tuning was over before its turn")]
                )
                continue
            try:
                choices = tuning.candidates(case, self.device)
            except Exception as error:  # a table that cannot be read leaves the defaults
                self.add("tune", [case.row("fine_forward", OURS, reason=reason_of(error))])
                continue
            if not choices:
                self.add("tune", [case.row("fine_forward", OURS, reason="this version has no candidates to tune")])
                continue
            wrong = self.wrong_choices(case, choices)
            refused = {str(choice.config()): choice for choice in choices if str(choice.config()) in wrong}
            choices = [choice for choice in choices if str(choice.config()) not in refused]
            rows = self.run_case(
                "tune", case, lambda case=case, choices=choices: tuning.contenders(case, self.device, choices), stage
            )  # type: ignore[misc]
            self.add("tune", [self.wrong_row(case, choice, wrong[text]) for text, choice in refused.items()])
            best = tuning.winner(rows, choices)
            if best is not None:
                self.winners[tuning.key_of(case)] = best
                self.say(f"tuned {case.name}: {best.config()}")

    def wrong_choices(self, case: Case, choices: list[Any]) -> dict[str, str]:
        """Configurations that are not tried, as text, and why: their check failed, or one of their kernel ended a process."""
        dead = checks.dead_families(self.checked)
        for name, how in self.skip.items():
            for choice in choices:
                if tuning.name_of(choice) in name[1]:
                    dead.setdefault(checks.family(choice.config()), f"another of the same kernel: {how}")
        # the first of an op is its default, which everything else needs anyway: it may still be tried
        spared = {str(choice.config()) for choice in tuning.defaults(choices)}
        found = {
            str(choice.config()): dead[checks.family(choice.config())]
            for choice in choices
            if checks.family(choice.config()) in dead and str(choice.config()) not in spared
        }
        return found | checks.wrong_choices(self.checked, case)

    def wrong_row(self, case: Case, choice: Any, why: str) -> Row:
        """The row of a configuration whose own check failed."""
        self.say(f"  not tried: {choice.config()}: {why}")
        return case.row(tuning.op_of(choice), OURS, reason=why, error=why, config=choice.config())

    def run_bench(self, cases: list[Case], last: bool = True) -> None:
        """The stage `bench`; cases that were run in part, or before something was tuned for them, are run again.

        ``last`` says of cases for which no time is left that they were not run; otherwise their turn is still to come, and what
        is known of one is written before anything is compiled that may take longer than there is.
        """
        self.save("bench")
        for case in cases:
            choice = self.winners.get(tuning.key_of(case))
            before = [row for row in self.rows["bench"] if row["case"] == case.name]
            whole = bool(before) and not any(row.get("partial") for row in before)
            if whole and (choice is None or any(row.get("tuned") for row in before) or self.defaults_won(case, choice)):
                continue
            if not self.budget.allows(case.estimate()):
                if last and not before:
                    self.add("bench", [case.row(case.kind, OURS, reason="the time was over before its turn")])
                continue
            # what backward may be run twice on must not be given away by compiled baselines
            keep = {"donated_buffer": False} if case.kind == "fine_backward" else {}
            with tuning.forced(choice, tuning.key_of(case)), torch._functorch.config.patch(**keep):
                self.run_case("bench", case, partial(self.contenders, case), choice=choice, keep=not last)

    def defaults_won(self, case: Case, choice: Any) -> bool:
        """Whether what was tuned is what runs anyway."""
        with contextlib.suppress(Exception):
            defaults = {str(default.config()) for default in tuning.defaults(tuning.candidates(case, self.device))}
            return all(str(one.config()) in defaults for one in choice.choices)
        return False

    def contenders(self, case: Case) -> Iterable[Contender | Missing]:
        """Who computes a case."""

        def begin(name: str) -> str | None:
            self.step(case, f"preparing {name}", SLOW_STEP)
            return self.skip.get((case.name, f"preparing {name}"))

        peers = fine.Peers(baselines=self.baselines, begin=begin)
        if case.kind == "fine_forward":
            return fine.forward(case, self.device, peers)
        if case.kind == "fine_backward":
            return fine.backward(case, self.device, peers)
        if case.kind == "ceiling":
            return ceiling.contenders(case, self.device)
        if case.kind == "model_step":
            return model.contenders(case, self.device)
        return attention.contenders(case, self.device, peers)

    def run_case(
        self,
        stage: str,
        case: Case,
        make: Callable[[], Iterable[Any]],
        budget: Budget | None = None,
        choice: Any = None,
        keep: bool = False,
    ) -> list[Row]:
        """Rows of one case, written before anything else begins; a case that is run again replaces its rows, if it is timed.

        ``keep`` also writes what is known once dense attention was checked, and compilers of other people's kernels begin.
        """
        budget = self.budget if budget is None else budget
        started = budget.clock()
        self.say(f"[{stage}] {case.name} ({self.budget.left():.0f} s left)")
        self.deadline = budget.until - case.seconds
        self.limit = TUNE_STEP if stage == "tune" else STEP
        self.step(case, "")
        refused = checks.refusal(self.checked, case)
        died = self.skip.get((case.name, ""))
        try:
            if died is not None:
                rows = [case.row(case.kind, OURS, reason=died, error=died)]
            elif case.kind == "overlap":
                rows = overlap.rows(case, self.device)
            elif case.kind == "memory":
                rows = memory.rows(case, self.device)
            else:
                rows = self.measure(case, make, refused, stage if keep else None)
            self.clean()
        except ContextLost:
            raise
        except Exception as error:  # one case must not stop the next
            self.lost(error)
            self.clean()
            rows = [case.row(case.kind, OURS, reason=reason_of(error))]
        if choice is not None:
            for row in rows:
                row["tuned"] = True
                if row["impl"] == OURS and tuning.applies(case, row):
                    row["config"] = {**(row["config"] or {}), **choice.config()}
        before = [row for row in self.rows[stage] if row["case"] == case.name]
        if timed(before) and not timed(rows):
            self.say(f"  {case.name} was not timed again: the rows from before stay")
            rows, why = before, next((row["reason"] for row in rows if row["reason"]), None)
            for row in rows:
                row |= {"retried": why} | ({} if choice is None else {"tuned": True})
        self.rows[stage] = [row for row in self.rows[stage] if row["case"] != case.name]
        self.add(stage, rows)
        for row in rows:
            if row["reason"]:
                self.say(f"  {label(row)} {row['impl']}: {row['reason'][:200]}")
        budget.learn(case.estimate(), budget.clock() - started)
        return rows

    def step(self, case: Case, contender: str, limit: float | None = None) -> None:
        """Tell a supervisor what begins: code that has never run may hang, or end the process."""
        compiles = case.kind in ("model_step", "attention_forward", "attention_training", "memory")
        self.beat(case.name, contender, SLOW_STEP if compiles else limit or self.limit)

    def clean(self) -> None:
        """Wait for the GPU and free what a case held; what fails here was begun by the case."""
        try:
            self.device.synchronize()
            self.device.reset()
        except Exception as error:
            self.lost(error)
            raise

    def lost(self, error: Exception) -> None:
        """Raise where the error has taken the GPU with it."""
        if any(word in str(error) for word in LOST):
            raise ContextLost(reason_of(error)) from error

    def measure(
        self, case: Case, make: Callable[[], Iterable[Any]], refused: dict[str, str], keep: str | None = None
    ) -> list[Row]:
        """Check each contender, then time all that passed in one loop; ``keep`` names the stage of rows that are kept early."""
        rows: dict[str, Row] = {}
        passed: dict[str, Contender] = {}
        wrong: dict[tuple[str, Any], str | None] = {}  # None: checked and right

        def save() -> None:
            if keep is not None and passed:
                self.time(case, rows, passed, case.seconds / 2)
                self.keep(keep, case, list(rows.values()))

        for number, found in enumerate(after_dense(case.baselines, make(), save)):
            if isinstance(found, Missing):
                rows[f"missing {number}"] = case.row(
                    found.op, found.impl, reason=found.reason, part=found.part, config=found.config
                )
                continue
            tile = list(found.tile or case.layout.sides)
            fields = {"flops": found.flops, "density": found.density, "part": found.part, "config": found.config}
            row = case.row(found.op, found.impl, **fields, tile=tile, **found.fields)
            rows[found.name] = row
            died = self.skip.get((case.name, found.name)) or self.skip.get((case.name, f"{TIMING} {found.name}"))
            if died is None and passed and self.budget.clock() > self.deadline:
                row["reason"] = "the time was over before its turn"
                wrong.setdefault((found.impl, found.tile), row["reason"])
                continue
            self.step(case, found.name)
            row["reason"] = died or self.why_not(found, row, refused, wrong)
            if row["reason"] is None:
                row["checked"] = True
                passed[found.name] = found
                wrong[found.impl, found.tile] = None
            else:
                row["error"] = row["error"] or row["reason"]
                wrong.setdefault((found.impl, found.tile), row["reason"])
        self.time(case, rows, passed, case.seconds)
        return list(rows.values())

    def keep(self, stage: str, case: Case, rows: list[Row]) -> None:
        """Write a case's rows so far; ``partial`` says that the case is still to be run as a whole."""
        later = set(case.baselines) - {row["impl"] for row in rows}
        rows = rows + [case.row(case.kind, name, reason="the time was over before its turn") for name in sorted(later)]
        self.rows[stage] = [row for row in self.rows[stage] if row["case"] != case.name]
        self.add(stage, [{**row, "partial": True} for row in rows])

    def time(self, case: Case, rows: dict[str, Row], passed: dict[str, Contender], seconds: float) -> None:
        """Samples of all that passed, into their rows."""
        functions = {name: one.run for name, one in passed.items()}
        # where a process died while all were timed, each is waited for: then the one that it dies of is left out alone
        apart = any(name == case.name and what.startswith(TIMING) for name, what in self.skip)
        found_ms = timing.samples(
            self.device,
            functions,
            seconds,
            alive=lambda name: self.step(case, f"{TIMING} {name}".strip()),
            apart=apart,
        )
        for name, ms in found_ms.items():
            rows[name] |= {"ms": ms, "tflops": tflops(rows[name]["flops"], ms)}

    def why_not(
        self, one: Contender, row: Row, refused: dict[str, str], wrong: dict[tuple[str, Any], str | None]
    ) -> str | None:
        """Why a contender is not timed: a check that failed, its own, or that of the whole it is a part of."""
        if one.impl == OURS and one.op in refused:
            return refused[one.op]
        try:
            if one.results is None and not one.alone:
                why = wrong.get((one.impl, one.tile), "it was not checked")
                if why is not None:
                    return f"not checked alone, and the whole failed: {why}"
            elif one.results is not None:
                row["error"], reason = verdict(one)
                if reason is not None:
                    return reason
            one.run(0)
            one.run(1)
            self.device.synchronize()
        except Exception as error:
            self.lost(error)
            return reason_of(error)
        return None


def timed(rows: list[Row]) -> bool:
    """Whether there is a time of ours."""
    return any(row["ms"] for row in rows if row["impl"] == OURS)
