"""What models learn: times, noisy latents, targets, and which scheduler says so."""

import json

import diffusers
import pytest
import torch
from models.zoo import ZOO

from flexsparse.finetune.cosmos import EDM_SCHEDULER
from flexsparse.finetune.families import FAMILIES
from flexsparse.finetune.objectives import EDM, FlowMatching, NoiseSchedule, objective_of
from flexsparse.training.errors import RunError

COGVIDEOX, ALLEGRO = (
    FAMILIES[ZOO[name].make[0]].scheduler(ZOO[name].model().config) for name in ("cogvideox", "allegro")
)


def _folder(root, config=None):
    """A pipeline's folder, with a scheduler."""
    (root / "transformer").mkdir(parents=True)
    if config is not None:
        (root / "scheduler").mkdir()
        (root / "scheduler" / "scheduler_config.json").write_text(
            config if isinstance(config, str) else json.dumps(config)
        )
    return str(root / "transformer")


def _tensors(batch=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, 2, 2, 4, 4, generator=g), torch.randn(batch, 2, 2, 4, 4, generator=g)


def test_flow_matching_times_move_to_noise():
    objective = FlowMatching()
    for number in range(5):
        t = objective.time(number, 1.0)
        torch.testing.assert_close(objective.time(number, 3.0), 3 * t / (1 + 2 * t))
    assert objective.told(torch.tensor([0.12349, 1.0])).tolist() == pytest.approx([0.123, 1.0])


def test_a_schedules_times_are_its_timesteps_evenly(tmp_path):
    objective = objective_of(_folder(tmp_path), COGVIDEOX)
    assert isinstance(objective, NoiseSchedule) and objective.steps == 1000
    t = torch.cat([objective.time(number, 1.0) for number in range(1000)])
    timesteps = objective._timesteps(t)
    assert torch.equal(objective.told(t), t), "a training time is one that can be told"
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    assert torch.histc(timesteps.float(), bins=10, min=0, max=1000).tolist() == pytest.approx([100] * 10, abs=2)
    assert objective._timesteps(objective.told(torch.tensor([0.001, 0.5, 1.0]))).tolist() == [1, 500, 999]
    assert [float(objective.time(7, 1.0))] == objective.time(7, 1.0).tolist(), "a function of the number"


def test_cogvideox_learns_v_on_a_schedule_that_ends_in_noise_alone(tmp_path):
    """The loss is that of diffusers' training example: the clean latents' error, weighted by 1 / (1 - alpha)."""
    objective = objective_of(_folder(tmp_path), COGVIDEOX)
    clean, noise = _tensors()
    t = torch.tensor([0.999, 0.5, 0.003])
    noisy = objective.noisy(clean, noise, t)
    torch.testing.assert_close(noisy[0], noise[0], atol=1e-6, rtol=0)
    signal = objective.scheduler.alphas_cumprod[[999, 500, 3]].float().view(-1, 1, 1, 1, 1)
    assert float(signal[0]) == pytest.approx(0, abs=1e-12)
    predicted = torch.randn_like(clean)
    reached = signal.sqrt() * noisy - (1 - signal).sqrt() * predicted
    wanted = ((reached - clean).square() / (1 - signal)).mean()
    torch.testing.assert_close(objective.loss(predicted, clean, noise, t), wanted, rtol=1e-4, atol=0)
    exact = signal.sqrt() * noise - (1 - signal).sqrt() * clean
    assert float(objective.loss(exact, clean, noise, t)) == pytest.approx(0, abs=1e-10)


def test_the_large_cogvideox_has_another_schedule(tmp_path):
    config = {**ZOO["cogvideox"].model().config, "use_rotary_positional_embeddings": True}
    large = FAMILIES["CogVideoXTransformer3DModel"].scheduler(config)
    assert (COGVIDEOX["snr_shift_scale"], large["snr_shift_scale"]) == (3.0, 1.0)
    one, other = (objective_of(_folder(tmp_path / name), found) for name, found in (("2b", COGVIDEOX), ("5b", large)))
    assert one.about != other.about and one.about["schedule"] == "CogVideoXDDIMScheduler"


def test_allegro_learns_noise(tmp_path):
    objective = objective_of(_folder(tmp_path), ALLEGRO)
    clean, noise = _tensors()
    t = torch.tensor([0.0, 0.4, 0.999])
    signal = diffusers.DDPMScheduler().alphas_cumprod[[0, 400, 999]].view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(objective.noisy(clean, noise, t), signal.sqrt() * clean + (1 - signal).sqrt() * noise)
    assert float(objective.loss(noise, clean, noise, t)) == 0 < float(objective.loss(clean, clean, noise, t))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_learns_what_its_scheduler_asks_for(tmp_path, prediction):
    """Of diffusers' scheduler: the network's input, and the prediction that its output makes clean latents of."""
    config = EDM_SCHEDULER | {"prediction_type": prediction}
    objective, scheduler = objective_of(_folder(tmp_path, config), EDM_SCHEDULER), diffusers.EDMEulerScheduler(**config)
    assert isinstance(objective, EDM) and objective.about["prediction"] == prediction
    clean, noise = _tensors()
    t = torch.tensor([0.1, 0.5, 0.9])
    sigma = (0.5 * t / (1 - t)).view(-1, 1, 1, 1, 1)
    own = 0.5 * clean + sigma * noise  # in latents of standard deviation sigma_data
    noisy = objective.noisy(clean, noise, t)
    torch.testing.assert_close(noisy, scheduler.precondition_inputs(own, sigma))
    left = scheduler.precondition_outputs(own, torch.zeros_like(own), sigma)
    whole = scheduler.precondition_outputs(own, torch.ones_like(own), sigma) - left
    perfect = (0.5 * clean - left) / whole
    assert float(objective.loss(perfect, clean, noise, t)) == pytest.approx(0, abs=1e-10)
    assert float(objective.loss(-perfect, clean, noise, t)) > 1
    torch.testing.assert_close(objective.loss(perfect + 2, clean, noise, t), torch.tensor(4.0))
    assert objective.told(torch.tensor([0.0, 0.75, 1.0])).tolist() == pytest.approx([0.002 / 0.502, 0.75, 80 / 80.5])
    assert objective.time(3, 2.0) == FlowMatching().time(3, 2.0)


@pytest.mark.parametrize("sampler", ["EulerAncestralDiscrete", "EulerDiscrete", "DPMSolverMultistep", "DDIM", "PNDM"])
def test_a_scheduler_folder_counts_whatever_its_sampler_is(tmp_path, sampler):
    """Only betas and the prediction matter in training: Euler's own noise is not what a model was given."""
    betas = {"beta_start": 0.001, "beta_end": 0.015, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, f"{sampler}Scheduler")(**betas, prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path / "saved")
    config = (tmp_path / "saved" / "scheduler_config.json").read_text()
    objective = objective_of(_folder(tmp_path / "pipe", config), ALLEGRO)
    plain = diffusers.DDPMScheduler(**betas, prediction_type="v_prediction")
    clean, noise = _tensors(1)
    t = torch.tensor([0.7])
    steps = torch.tensor([700])
    torch.testing.assert_close(objective.noisy(clean, noise, t), plain.add_noise(clean, noise, steps))
    assert float(objective.loss(plain.get_velocity(clean, noise, steps), clean, noise, t)) < 1e-10
    assert objective.about["prediction"] == "v_prediction"


def test_the_whole_pipelines_folder_serves_too(tmp_path):
    _folder(tmp_path, {**COGVIDEOX, "snr_shift_scale": 2.0})
    (tmp_path / "transformer" / "config.json").write_text("{}")
    for given in (tmp_path, tmp_path / "transformer"):
        assert objective_of(str(given), COGVIDEOX).scheduler.config.snr_shift_scale == 2.0


def test_the_folder_itself_and_links_to_it(tmp_path, monkeypatch):
    """Their scheduler was not seen, and the family's taken, which may learn another thing."""
    _folder(tmp_path / "pipe", {**COGVIDEOX, "snr_shift_scale": 2.0})
    (tmp_path / "link").symlink_to(tmp_path / "pipe" / "transformer")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "transformer").symlink_to(tmp_path / "pipe" / "transformer")
    (tmp_path / "other" / "scheduler").mkdir()
    own = json.dumps({**COGVIDEOX, "snr_shift_scale": 3.0})
    (tmp_path / "other" / "scheduler" / "scheduler_config.json").write_text(own)
    monkeypatch.chdir(tmp_path / "pipe" / "transformer")
    for given, shift in ((".", 2.0), ("../../link", 2.0), ("../../other/transformer", 3.0)):
        assert objective_of(given, COGVIDEOX).scheduler.config.snr_shift_scale == shift


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0},
        {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True},
    ],
)
def test_flow_matching_schedulers(tmp_path, config):
    folder = _folder(tmp_path, config)
    assert objective_of(folder, None) == FlowMatching()
    with pytest.raises(
        RunError, match=r"scheduler_config.json' is flow matching, and models of this class were trained with a"
    ):
        objective_of(folder, COGVIDEOX)


@pytest.mark.parametrize(
    ("config", "published", "message"),
    [
        (COGVIDEOX, None, r"is a noise schedule, and models of this class were trained with flow matching"),
        ("{", COGVIDEOX, r"is no scheduler's configuration \(.*: mend it, or move it away"),
        (EDM_SCHEDULER, None, r"is EDM, and models of this class were trained with flow matching"),
        (COGVIDEOX, EDM_SCHEDULER, r"is a noise schedule, and models of this class were trained with EDM"),
        (
            EDM_SCHEDULER | {"sigma_data": 1.0},
            EDM_SCHEDULER,
            r"has sigma_data 1\.0 and prediction_type 'epsilon': 0\.5",
        ),
        ({}, COGVIDEOX, r"is no scheduler's configuration \('_class_name'\)"),
        ({"_class_name": "Nothing"}, COGVIDEOX, r"scheduler is Nothing with prediction_type None"),
        (
            {"_class_name": "DDIMScheduler", "prediction_type": "x"},
            COGVIDEOX,
            r"prediction_type 'x': one of epsilon, v_pre",
        ),
    ],
)
def test_schedulers_that_cannot_serve(tmp_path, config, published, message):
    folder = _folder(tmp_path, dict(config) if not isinstance(config, str) else config)
    with pytest.raises(RunError, match=message):
        objective_of(folder, published)


def test_a_schedule_has_no_time_shift(tmp_path):
    with pytest.raises(RunError, match=r"--time-shift 3: --model was trained on the noise schedule"):
        objective_of(_folder(tmp_path), COGVIDEOX, 3.0)
    assert objective_of(_folder(tmp_path / "flow"), None, 3.0) == FlowMatching()
