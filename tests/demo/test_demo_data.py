"""Windows: fixed by seed and step, and never across the split."""

import pytest
import torch

from flexsparse.demo.data import HELD_OUT_TIMES, ClipData, frames_needed
from flexsparse.training import flow


def _clip(frames: int = 40) -> torch.Tensor:
    """Every pixel holds its frame's number."""
    return torch.arange(frames, dtype=torch.float32).view(1, -1, 1, 1).expand(3, frames, 20, 30).contiguous()


def _data(frames: int = 40, **overrides) -> ClipData:
    sizes = {"frames": 6, "height": 16, "width": 24, "seed": 0} | overrides
    return ClipData(_clip(frames), **sizes)


def test_windows_never_straddle_the_split():
    data = _data()
    first_held_out = 40 - 8  # a fifth
    last_seen = max(int(data.batch(step).clean.max()) for step in range(200))
    assert last_seen == first_held_out - 1
    assert all(batch.clean.min() >= first_held_out for batch in data.held_out())


def test_the_shortest_clip_still_splits():
    data = _data(frames_needed(6))
    assert data.batch(0).clean.max() < data.held_out()[0].clean.min()


def test_batches_depend_on_seed_and_step_alone():
    one, two = _data(), _data()
    for _ in range(3):
        one.batch(7)
    for a, b in [(one.batch(3), two.batch(3)), (one.held_out()[1], two.held_out()[1])]:
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("clean", "noise", "t"))
    assert not torch.equal(one.batch(3).noise, one.batch(4).noise)
    assert not torch.equal(one.batch(3).noise, _data(seed=1).batch(3).noise)


def test_held_out_noise_is_shared_by_all_times():
    batches = _data().held_out()
    assert [round(batch.t.item(), 6) for batch in batches] == list(HELD_OUT_TIMES)
    assert all(torch.equal(batch.noise, batches[0].noise) for batch in batches)


def test_flow_identities():
    batch = _data().batch(0)
    z = flow.noisy(batch.clean, batch.noise, batch.t)
    true_velocity = batch.noise - batch.clean
    assert flow.velocity_loss(true_velocity, batch.clean, batch.noise) == 0
    torch.testing.assert_close(flow.denoise(z, true_velocity, batch.t), batch.clean, atol=1e-4, rtol=1e-4)


def test_training_times_cover_the_distribution_evenly():
    times = torch.cat([flow.training_time(step) for step in range(89)])
    assert 0.2 < times.min() < 0.4 and 0.85 < times.max() < 1
    assert times.median().item() == pytest.approx(0.668, abs=0.02)
    first, second = times[:40].mean().item(), times[40:80].mean().item()
    assert first == pytest.approx(second, abs=0.02)
