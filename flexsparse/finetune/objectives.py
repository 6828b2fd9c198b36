"""What a model learns to predict: a velocity (flow matching), or what its noise schedule or its preconditioners (EDM) say.

Schedules are those of diffusers: a model's pipeline has a folder `scheduler`, and each family names the one it was published
with. Latents are float `[B, C, T, H, W]`, times float `[B]` in [0, 1]: 0 is clean, 1 is noise.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flexsparse.finetune.settings import TINY
from flexsparse.training import flow
from flexsparse.training.errors import RunError

SCHEDULER = "scheduler"
FILE = "scheduler_config.json"
PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW, EDM_KIND = "flow matching", "EDM"


class Objective(Protocol):
    """Training times, noisy latents, and the loss of a prediction; functions of their arguments alone."""

    @property
    def steps(self) -> int:
        """Timesteps between clean and noise: a model is told `steps * t`."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def about(self) -> dict[str, Any]:
        """What it is, JSON values; a run is resumed with the same."""

    def time(self, number: int, shift: float) -> Tensor:
        """The time of a training sample, float32 `[1]`; `shift` as `Settings.time_shift`."""

    def told(self, t: Tensor) -> Tensor:
        """The times nearest to `t` that a model can be told."""

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Latents at times that can be told."""

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of a prediction, a 0-d tensor."""


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Straight paths from clean to noise; the prediction is the velocity `noise - clean`."""

    steps: int = 1000

    @property
    def name(self) -> str:
        return "a velocity (flow matching)"

    @property
    def about(self) -> dict[str, Any]:
        return {"prediction": "flow", "steps": self.steps}

    def time(self, number: int, shift: float) -> Tensor:
        """Logit-normal."""
        t = flow.training_time(number)
        return shift * t / (1 + (shift - 1) * t)

    def told(self, t: Tensor) -> Tensor:
        return (self.steps * t).round() / self.steps

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return flow.noisy(clean, noise, t)

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return flow.velocity_loss(prediction, clean, noise)


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """Discrete diffusion: a scheduler of diffusers adds the noise, and its `prediction_type` says what is predicted.

    Attributes:
        scheduler: has `add_noise` in the variance-preserving form, and `get_velocity`.
    """

    scheduler: Any

    @property
    def steps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def name(self) -> str:
        return f"{self.scheduler.config.prediction_type} on the schedule of a {type(self.scheduler).__name__}"

    @property
    def about(self) -> dict[str, Any]:
        config = {name: value for name, value in self.scheduler.config.items() if not name.startswith("_")}
        return json.loads(
            json.dumps({"prediction": config["prediction_type"], "schedule": type(self.scheduler).__name__, **config})
        )

    def time(self, number: int, shift: float) -> Tensor:
        """Uniform over the timesteps 0 to steps - 1. The schedule has a shift of its own, if any."""
        return torch.tensor([int(self.steps * flow.share(number)) / self.steps])

    def told(self, t: Tensor) -> Tensor:
        return (self.steps * t).round().clamp(max=self.steps - 1) / self.steps

    def _timesteps(self, t: Tensor) -> Tensor:
        return (self.steps * t).round().long()

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.scheduler.add_noise(clean, noise, self._timesteps(t))

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            target = self.scheduler.get_velocity(clean, noise, self._timesteps(t))
        else:
            target = noise if kind == "epsilon" else clean
        return (prediction - target).square().mean()


@dataclass(frozen=True, kw_only=True)
class EDM:
    """Karras et al., arXiv 2206.00364, table 1: a network between the preconditioners of `EDMEulerScheduler`.

    Clean latents have variance 1, as for the other objectives; EDM's own are `sigma_data` times these. At time t they have
    noise of `sigma = sigma_data * t / (1 - t)`, so that noise and signal stand as in flow matching, and logit-normal times are
    log-normal sigmas.

    Attributes:
        sigma_data: standard deviation of EDM's own latents.
        sigma_min: the least noise.
        sigma_max: the most.
        prediction: `epsilon` or `v_prediction`: the same but for its sign.
    """

    sigma_data: float
    sigma_min: float
    sigma_max: float
    prediction: str

    @property
    def steps(self) -> int:
        """Of times in thousandths; a model of EDM is told the logarithm of sigma."""
        return 1000

    @property
    def name(self) -> str:
        return f"{self.prediction} between the preconditioners of EDM"

    @property
    def about(self) -> dict[str, Any]:
        return asdict(self)

    def time(self, number: int, shift: float) -> Tensor:
        """Logit-normal."""
        return FlowMatching().time(number, shift)

    def told(self, t: Tensor) -> Tensor:
        least, most = (sigma / (sigma + self.sigma_data) for sigma in (self.sigma_min, self.sigma_max))
        return t.clamp(least, most)

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """As the network is given it, of variance 1."""
        signal, share = self._mix(t)
        return signal * clean + share * noise

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """That of the network itself: EDM's weight makes it so at each sigma."""
        signal, share = self._mix(t)
        target = share * clean - signal * noise
        return (prediction - (target if self.prediction == "epsilon" else -target)).square().mean()

    def _mix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of clean latents and of noise, whose squares add up to 1."""
        t = t.view(-1, 1, 1, 1, 1)
        return (1 - t) / (t.square() + (1 - t).square()).sqrt(), t / (t.square() + (1 - t).square()).sqrt()


def model_folder(given: str) -> Path:
    """The folder of the transformer itself, where the one of a whole pipeline is given."""
    folder = Path(given)
    inside = folder / "transformer"
    return inside if not (folder / "config.json").is_file() and (inside / "config.json").is_file() else folder


def scheduler_file(given: str) -> Path | None:
    """The scheduler's configuration of a model's pipeline; None where there is none.

    Args:
        given: the model's folder, or `tiny`.
    """
    folder = model_folder(given)
    # "." has no parent as it is given, and the pipeline may stand beside a link or beside what it leads to
    paths = [one.parent / SCHEDULER / FILE for one in (folder.absolute(), folder.resolve())]
    return None if given == TINY else next((path for path in paths if path.is_file()), None)


def objective_of(given: str, published: Mapping[str, Any] | None, shift: float = 1.0) -> Objective:
    """What a model learns: its pipeline's `scheduler` folder says, where there is one, else what was published.

    Args:
        given: the model's folder, or `tiny`.
        published: configuration of the scheduler that its family was published with; None: flow matching.
        shift: `--time-shift`.

    Raises:
        RunError: a scheduler that is of another kind than the family's, that cannot be read, or that goes with no shift.
    """
    path = scheduler_file(given)
    config = published
    if path is not None:
        try:
            config = json.loads(path.read_text())
            have = _kind(config)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{str(path)!r} is no scheduler's configuration ({' '.join(str(error).split())}): mend it, or move it away"
            ) from error
        want = FLOW if published is None else _kind(published)
        if have != want:
            raise RunError(
                f"{str(path)!r} is {have}, and models of this class were trained with {want}: put the model's own scheduler "
                "there, or move it away"
            )
        if have == FLOW:
            return FlowMatching(steps=int(config.get("num_train_timesteps", 1000)))
    if config is None or published is None:
        return FlowMatching()
    where = str(path) if config is not published else "the family's"
    if _kind(config) == EDM_KIND:
        return _edm({**published, **config}, where, published)
    if shift != 1:
        raise RunError(
            f"--time-shift {shift:g}: --model was trained on the noise schedule of its scheduler, which has a shift of its "
            "own: leave it out"
        )
    return NoiseSchedule(scheduler=_scheduler(config, where))


def _kind(config: Mapping[str, Any]) -> str:
    """What a scheduler's configuration is of, for people."""
    if config["_class_name"].startswith("EDM"):
        return EDM_KIND
    return FLOW if _is_flow(config) else "a noise schedule"


def _edm(config: Mapping[str, Any], where: str, published: Mapping[str, Any]) -> EDM:
    """Sigma_data is the family's: its call tells the model sigmas of it."""
    if config["sigma_data"] != published["sigma_data"] or config["prediction_type"] not in ("epsilon", "v_prediction"):
        raise RunError(
            f"{where} scheduler has sigma_data {config['sigma_data']} and prediction_type {config['prediction_type']!r}: "
            f"{published['sigma_data']}, and epsilon or v_prediction, are needed: put the model's own scheduler there"
        )
    return EDM(
        sigma_data=config["sigma_data"],
        sigma_min=config["sigma_min"],
        sigma_max=config["sigma_max"],
        prediction=config["prediction_type"],
    )


def _is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is of flow matching: a class of its own, or a mode of UniPC and others."""
    return (
        "FlowMatch" in config["_class_name"]
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def _scheduler(config: Mapping[str, Any], where: str) -> Any:
    """A scheduler of diffusers with the configuration's schedule, whose `add_noise` is the variance-preserving one.

    A class that samples in another form (Euler's noise has no bound) gives its betas to a `DDPMScheduler`.
    """
    import diffusers

    kind = getattr(diffusers, config["_class_name"], None)
    if kind is None or config.get("prediction_type", "epsilon") not in PREDICTIONS:
        raise RunError(
            f"{where} scheduler is {config['_class_name']} with prediction_type {config.get('prediction_type')!r}: one of "
            f"{', '.join(PREDICTIONS)} in a class of diffusers is needed"
        )
    with _without_remarks():
        scheduler = kind.from_config(dict(config))
        if not hasattr(scheduler, "get_velocity") or hasattr(scheduler, "sigmas"):
            scheduler = diffusers.DDPMScheduler.from_config(scheduler.config)
    return scheduler


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Settings of sampling, which another class does not have, are nothing to report."""
    logger = logging.getLogger("diffusers.configuration_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
