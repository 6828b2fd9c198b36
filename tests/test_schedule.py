"""Annealing: monotone, exact at its target, resumable, and a new step is no new graph."""

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import flexsparse as fs
from flexsparse import SparsitySchedule

RATIO = st.floats(0, 1)


@given(RATIO, RATIO, st.floats(0.001, 2), st.integers(1, 7))
def test_a_schedule_is_monotone_and_reaches_exactly_its_target(
    start: float, target: float, step: float, every: int
) -> None:
    schedule = SparsitySchedule(start=start, target=target, step=step, every=every)
    direction = 1 if target >= start else -1
    last = start
    assert schedule.value == start or schedule.moves == 0
    for training_step in range((schedule.moves + 2) * every):
        assert schedule.finished == (training_step >= schedule.moves * every)
        assert (schedule.value - last) * direction >= 0
        assert abs(schedule.value - last) <= step * (1 + 1e-6)
        assert float(schedule.tensor) == schedule.value
        last = schedule.value
        schedule.advance()
    assert schedule.value == target and schedule.finished


@pytest.mark.parametrize(
    ("target", "step", "moves"),
    [
        (0.8, 0.03, 27),
        (0.95, 0.05, 19),
        (0.9, 0.03, 30),
        (0.3, 0.1, 3),
        (0.7, 0.1, 7),
        (0.5, 0.7, 1),
        (0.0, 0.1, 0),
    ],
)
def test_the_target_is_reached_after_the_moves_that_it_needs(target: float, step: float, moves: int) -> None:
    schedule = SparsitySchedule(target=target, step=step, every=50)
    assert schedule.moves == moves
    assert schedule.value_at(50 * moves) == target
    if moves:
        assert schedule.value_at(50 * moves - 1) < target
        assert schedule.value_at(49) == 0.0
    down = SparsitySchedule(start=1.0, target=1 - target, step=step)
    assert down.moves == moves and down.value_at(10_000) == 1 - target


@given(st.integers(0, 500), st.integers(0, 500))
def test_a_resumed_schedule_goes_on_as_if_never_stopped(before: int, after: int) -> None:
    through, stopped = (SparsitySchedule(target=0.9, step=0.03, every=7) for _ in range(2))
    through.advance(before + after)
    stopped.advance(before)
    resumed = SparsitySchedule(target=0.9, step=0.03, every=7)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    resumed.advance(after)
    assert resumed.value == through.value == float(resumed.tensor)
    assert resumed.state_dict() == through.state_dict()


def test_a_state_of_other_settings_is_refused() -> None:
    state = SparsitySchedule(target=0.9).state_dict()
    with pytest.raises(ValueError, match=r"target is 0\.8 here and 0\.9 in the saved schedule"):
        SparsitySchedule(target=0.8).load_state_dict(state)


STATE = SparsitySchedule(target=0.9).state_dict()
WRONG: list[tuple[Callable[[SparsitySchedule], Any], str]] = [
    (
        lambda s: s.load_state_dict({}),
        "state has no steps_done, target, start, step, every: give the dict that state_dict",
    ),
    (lambda s: s.load_state_dict(None), "state is NoneType: give the dict that state_dict"),  # type: ignore[arg-type]
    (lambda s: s.load_state_dict({**STATE, "steps_done": 1.5}), r"steps_done=1\.5: give an int of at least 0"),
    (lambda s: s.load_state_dict({**STATE, "steps_done": -1}), "steps_done=-1: give an int of at least 0"),
    (lambda s: s.advance(0.5), r"steps is 0\.5 at step 3: give how many training steps, an int"),  # type: ignore[arg-type]
    (lambda s: s.advance(-4), "steps is -4 at step 3: give .* cannot go below step 0"),
    (lambda s: s.seek(0.5), r"step is 0\.5: give a training step, an int of at least 0"),  # type: ignore[arg-type]
    (lambda s: s.value_at(-100), "step is -100: give a training step of at least 0"),
    (lambda s: s.seek("a"), "step is 'a': give a training step"),  # type: ignore[arg-type]
    (lambda s: SparsitySchedule(target=0.5, step="a"), "step is 'a': give how much the ratio moves"),  # type: ignore[arg-type]
    (lambda s: SparsitySchedule(target="a"), r"target is 'a': give a ratio in \[0, 1\]"),  # type: ignore[arg-type]
    (lambda s: SparsitySchedule(target=0.5, every="a"), "every is 'a': give the training steps"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_what_is_no_step_or_no_state_is_refused(call: Callable[[SparsitySchedule], Any], message: str) -> None:
    schedule = SparsitySchedule(target=0.9)
    schedule.seek(3)
    with pytest.raises((TypeError, ValueError), match=f"SparsitySchedule .*{message}"):
        call(schedule)
    assert schedule.steps_done == 3


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_moves_by_itself(copied: Callable[[SparsitySchedule], SparsitySchedule]) -> None:
    one = SparsitySchedule(target=0.8, start=0.2, step=0.2, every=1)
    one.advance()
    other = copied(one)
    other.advance(2)
    for schedule, value in ((one, 0.4), (other, 0.8)):
        assert schedule.value == pytest.approx(value) and float(schedule.tensor) == schedule.value


@pytest.mark.parametrize("under", [torch.device("meta"), torch.inference_mode()], ids=["meta", "inference mode"])
def test_a_schedule_may_be_made_wherever_a_model_is(under: Any) -> None:
    """Its tensor was on the meta device, and a selection made with whatever memory held."""
    with under:
        schedule = SparsitySchedule(target=0.9, start=0.5, step=0.1, every=1)
    assert schedule.tensor.device.type == "cpu" and not schedule.tensor.is_inference() and schedule.tensor.item() == 0.5
    q, k = torch.randn(2, 1, 1, 64, 8)
    layout = fs.TileLayout(grid=(2, 4, 8), tile=(2, 2, 2))
    assert fs.VSA(sparsity=schedule).select(q, k, layout).counts.unique().tolist() == [4]
    assert schedule.advance() == pytest.approx(0.6) == schedule.tensor.item()


def test_vsa_reads_its_schedule() -> None:
    layout = fs.TileLayout(grid=(2, 8, 10), tile=(2, 2, 2))
    q, k = torch.randn(2, 1, 2, layout.seq_len, 8).unbind()
    schedule = SparsitySchedule(target=0.9, step=0.3, every=1)
    for kept in (20, 14, 8, 2):
        counts = fs.VSA(sparsity=schedule).select(q, k, layout).counts
        assert counts.unique().tolist() == [kept]
        assert kept == fs.VSA(top_k=kept).tiles_kept(20)
        schedule.advance()


@pytest.mark.parametrize("name", ("VSA", "BSA", "TopP"))
def test_a_new_step_changes_the_selection_and_compiles_nothing(name: str, fresh_dynamo: None) -> None:
    layout = fs.TileLayout(grid=(2, 8, 8), tile=(2, 2, 2))
    q, k, v = torch.randn(3, 1, 2, layout.seq_len, 8).unbind()
    ramp = SparsitySchedule(start=0.0, target=0.9, step=0.3, every=1)
    fall = SparsitySchedule(start=1.0, target=0.1, step=0.3, every=1)
    builder: fs.masks.MaskBuilder
    if name == "VSA":
        builder, schedules = fs.VSA(sparsity=ramp), [ramp]
    elif name == "TopP":
        builder, schedules = fs.TopP(mass=fall), [fall]
    else:
        half = SparsitySchedule(start=1.0, target=0.5, step=0.25, every=1)
        builder, schedules = fs.BSA(kv_density=fall, keep_queries=half), [fall, half]
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fs.sparse_attention(q, k, v, layout, builder, backend="gather")

    outs = []
    for _ in range(4):
        out = attend(q, k, v)
        expected = fs.sparse_attention(q, k, v, layout, builder, backend="reference")
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert all(not torch.equal(out, other) for other in outs)
        outs.append(out)
        for schedule in schedules:
            schedule.advance()
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["VSA", "TopP", "BSA", "BSA's queries", "BSA of a head"])
def test_no_cuda_graph_keeps_a_schedules_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value is read on the CPU when kernels are launched: replays would never see another."""
    schedule, layout = SparsitySchedule(start=1.0, target=0.5), fs.TileLayout(grid=(4, 8, 8), tile=(4, 4, 4))
    builder = {
        "VSA": fs.VSA(sparsity=schedule),
        "TopP": fs.TopP(mass=schedule),
        "BSA": fs.BSA(kv_density=schedule),
        "BSA's queries": fs.BSA(keep_queries=schedule),
        "BSA of a head": fs.BSA(kv_density=schedule, statistics="head"),
    }[name]
    q = torch.randn(1, 1, layout.seq_len, 16)
    assert builder.select(q, q, layout).counts.min() >= 1
    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with pytest.raises(RuntimeError, match="give the builder a plain number"):
        builder.select(q, q, layout)
    fs.BSA().select(q, q, layout)


@pytest.mark.parametrize(
    "device, mode, refused", [("cuda", "reduce-overhead", True), ("cpu", "reduce-overhead", False)]
)
def test_a_schedule_is_refused_where_the_options_ask_for_cuda_graphs(device: str, mode: str, refused: bool) -> None:
    backend = fs.backend(fs.VSA(sparsity=SparsitySchedule(target=0.5)), grid=(4, 8, 8), inner="aot_eager")
    gm = torch.fx.symbolic_trace(lambda x: (x + 1,))
    with FakeTensorMode():
        x = torch.empty(2, device=device)
    if refused:
        with pytest.raises(Exception, match="'max-autotune-no-cudagraphs'"):
            backend(gm, [x], mode=mode)
    else:
        backend(gm, [x], mode=mode)
    fs.backend(fs.VSA(sparsity=0.5), grid=(4, 8, 8), inner="aot_eager")(gm, [torch.empty(2)], mode=mode)
