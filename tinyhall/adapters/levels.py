"""What a network's answer says about x_0, and where a diffusers scheduler stands when it is given.

Every state of every family is x = signal * x_0 + noise * eps. Two numbers so describe a step, and five lines of algebra turn an
answer into x_0; schedulers differ in where they keep the two numbers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ..core import _check
from ..core._typing import Tensor
from ..core.metrics import Step

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")

# Families of schedulers, by the class or one that it descends from.
FAMILIES = {
    # x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, alpha_bar looked up at the network's own t (Ho et al. 2020)
    "alphas": "DDPM DDPMParallel DDIM DDIMParallel PNDM LCM TCD UnCLIP CogVideoXDDIM CogVideoXDPM RePaint",
    # the same states, at sigmas = noise / signal that need not belong to a whole t (Lu et al. 2022)
    "preserving": "DPMSolverMultistep DPMSolverSinglestep DEISMultistep UniPCMultistep SASolver",
    # x = x_0 + sigma eps (Karras et al. 2022)
    "exploding": "EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete LMSDiscrete"
    " DPMSolverSDE",
    # x = (1 - sigma) x_0 + sigma eps, the network says eps - x_0 (Lipman et al. 2023)
    "flow": "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM LTXEulerAncestralRF",
    # x = x_0 + sigma eps, the network says F in x_0 = c_skip x + c_out F (Karras et al. 2022; consistency: Song et al. 2023)
    "edm": "EDMEuler EDMDPMSolverMultistep CosineDPMSolverMultistep",
    "consistency": "CMStochasticIterative",
    # x = cos(t) x_0 + sin(t) eps, the network says F in x_0 = cos(t) x - sin(t) F (Lu and Song 2024): v, by another name
    "angle": "SCM IPNDM",
}
_FAMILY = {f"{name}Scheduler": family for family, names in FAMILIES.items() for name in names.split()}


class Level(NamedTuple):
    """x = signal * x_0 + noise * eps."""

    signal: float
    noise: float

    @property
    def share(self) -> float:
        """sigma / (1 + sigma) with sigma = noise / signal, from 0 for data to 1 for noise: the time of flow matching.

        As 1 - alpha_bar = sigma^2 / (1 + sigma^2) it depends on the ratio alone, so that it is the same whether a model scales
        its states or not; and of the two it is the one in which flow matching's steps are even.
        """
        return self.noise / (max(self.signal, 0.0) + self.noise)  # of an angle of pi / 2 the cosine may be below 0


def implied(kind: str, signal: Any, noise: Any, said: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(x_0, eps), in the shape of x, that a network's answer `said` implies at x = signal * x_0 + noise * eps.

    signal and noise are numbers, or tensors that multiply x. x_0 comes straight from the answer: by way of eps one of v or of
    x_0 itself would be divided by a signal of 0 (zero terminal SNR).
    """
    if kind == "epsilon":
        return (x - noise * said) / signal, said
    if kind == "sample":
        return said, (x - signal * said) / noise
    if kind == "flow_prediction":
        return x - noise * said, x + signal * said
    norm = (signal**2 + noise**2) ** 0.5  # v is that of the state scaled to unit variance (Salimans and Ho 2022)
    signal, noise, x = signal / norm, noise / norm, x / norm
    return signal * x - noise * said, noise * x + signal * said


def step_at(x: Tensor, said: Tensor, predicts: str = "sample", *, sigma: Any = None, alpha_bar: Any = None) -> Step:
    """A step of any sampler, for the `update` of a metric: what a network said at x, and how noisy x was.

        metric.update(th.step_at(x, denoised, sigma=sigma))  # k-diffusion, EDM: x = x_0 + sigma eps
        metric.update(th.step_at(x, eps, "epsilon", alpha_bar=alpha_bar[t]))  # DDPM
        metric.update(th.step_at(x, v, "flow_prediction", sigma=s))  # x = (1 - s) x_0 + s eps, v = eps - x_0

    Its `t` is the noise share in thousandths: take a metric with a window in `noise`.

    Args:
        x: the state that the network saw, before it was scaled for the network, `[n, *shape]`.
        said: the answer with which the sampler goes on, after guidance, of x's shape.
        predicts: one of `PREDICTIONS`.
        sigma: a number, or a tensor whose values are all equal; or
        alpha_bar: the same.

    Raises:
        TinyhallError: bad arguments.
    """
    if predicts not in PREDICTIONS:
        raise _check.fail("predicts", predicts, f"one of {', '.join(PREDICTIONS)}")
    if said.shape != x.shape:
        raise _check.fail("said", said, f"x's shape {tuple(x.shape)}")
    if (sigma is None) == (alpha_bar is None) or (predicts == "flow_prediction" and sigma is None):
        raise _check.fail("sigma", sigma, "sigma= or alpha_bar=, and of flow matching sigma=")
    given = torch.as_tensor(alpha_bar if sigma is None else sigma).detach().cpu().double().reshape(-1)
    value, most = float(given[0]), math.inf if sigma is not None and predicts != "flow_prediction" else 1.0
    if not bool((given == given[0]).all()) or not 0 < value <= most:
        raise _check.fail("alpha_bar" if sigma is None else "sigma", given.tolist(), f"one number above 0, at most {most:g}")
    if sigma is None:
        level = Level(math.sqrt(value), math.sqrt(1 - value))
    else:
        level = Level(1 - value if predicts == "flow_prediction" else 1.0, value)
    x0_hat, eps = implied(predicts, level.signal, level.noise, said.detach().float(), x.detach().float())
    return Step(round(1000 * level.share), x, x0_hat, eps, level.share)


def prediction(scheduler: Any) -> str:
    """What the network predicts, one of `PREDICTIONS`, by the scheduler's configuration."""
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    kind = "sample" if kind == "original_sample" else kind
    if kind not in PREDICTIONS:
        raise _check.fail("prediction_type", kind, f"one of {', '.join(PREDICTIONS)}")
    return kind


class Reader:
    """Reads (t, signal, noise) of the coming step off a scheduler, without changing anything in it.

    Raises:
        TinyhallError: a scheduler of no known family, such as those of tokens, in which there is no x_0 to predict.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.name = scheduler, type(scheduler).__name__
        config: Any = getattr(scheduler, "config", None)
        known = [c.__name__ for c in type(scheduler).__mro__ if c.__name__ in _FAMILY]
        names = [_FAMILY[name] for name in known]
        self.known = known[0] if known else ""
        if not names and isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor) and not hasattr(scheduler, "sigmas"):
            inverse = "Inverse" in self.name  # runs up, and asks the network at another t than that of its state
            names = ["alphas"] if getattr(scheduler, "init_noise_sigma", 1.0) == 1.0 and not inverse else []
        if not names:
            some = ", ".join(f"{names.split()[0]}Scheduler" for names in FAMILIES.values())
            raise _check.fail("scheduler", self.name, f"one in which x_0 has a closed form, such as {some}")
        self.family = names[0]
        straight = self.family == "flow" or bool(getattr(config, "use_flow_sigmas", False))
        if self.family in ("edm", "consistency"):
            self.kind = "sample"
        elif self.family == "angle":
            self.kind = "v_prediction"
        else:
            self.kind = "flow_prediction" if self.family == "flow" else prediction(scheduler)
            if straight != (self.kind == "flow_prediction") and not (straight and self.kind in ("epsilon", "sample")):
                raise _check.fail("prediction_type", self.kind, "flow_prediction with flow sigmas, and with these alone")
        self.straight = straight
        # Otherwise t is a function of sigma: a quarter of its logarithm, an angle.
        continuous = getattr(config, "timestep_type", "discrete") == "continuous"
        self.counts = self.family in ("alphas", "preserving", "exploding", "flow") and not continuous
        self.restart()

    def restart(self) -> None:
        """A new run begins."""
        self.times: list[float] = []
        self._at = -1

    def index(self, t: Any) -> int | None:
        """The place of the coming step in `times`, None where it is not among them."""
        scheduler, t = self.scheduler, float(torch.as_tensor(t).reshape(-1)[0])
        if not self.times:
            # As its own first step will look it up.
            self.times = [float(v) for v in torch.as_tensor(scheduler.timesteps).tolist()]
            if self.known == "SCMScheduler":  # which names the end too
                self.times.pop()
        known = getattr(scheduler, "step_index", None)
        if known is None and (begin := getattr(scheduler, "begin_index", None)) is not None:
            known = begin
        if known is None and hasattr(scheduler, "index_for_timestep"):
            known = scheduler.index_for_timestep(scheduler.timesteps.new_tensor(t))
        if known is None:  # a scheduler that keeps no count; PNDM visits one t twice
            after = self._at + 1
            here = after if after < len(self.times) and self.times[after] == t else None
            known = here if here is not None else self.times.index(t) if t in self.times else None
        self._at = -2 if known is None else int(known)
        return None if known is None else int(known)

    def level(self, t: Any, i: int | None, second: bool = False) -> Level:
        """Where x lies at the i-th step. `second`: it is the second time that a step of second order asks the network."""
        s = self.scheduler
        if self.family == "alphas":
            bar = float(s.alphas_cumprod[int(t)])
            return Level(math.sqrt(bar), math.sqrt(1 - bar))
        if i is None:
            raise _check.fail("timestep", t, "one of scheduler.timesteps")
        if self.family == "angle":
            if hasattr(s, "alphas"):  # IPNDM, which has them as tables
                return Level(float(s.alphas[i]), float(s.betas[i]))
            return Level(math.cos(self.times[i]), math.sin(self.times[i]))
        sigma = float(s.sigmas[i])
        if second and self.known.startswith("KDPM2Ancestral"):
            sigma = float(s.sigmas_interpol[i - 1])
        elif second and self.known.startswith("KDPM2"):
            sigma = float(s.sigmas_interpol[i])
        elif second and self.known.startswith("DPMSolverSDE"):  # half way, on the scale of the logarithm
            sigma = math.sqrt(float(s.sigmas[i - 1]) * sigma)
        if self.straight:
            return Level(sigma, 1 - sigma) if getattr(s.config, "invert_sigmas", False) else Level(1 - sigma, sigma)
        if self.family == "preserving":
            return Level(1 / math.hypot(sigma, 1), sigma / math.hypot(sigma, 1))
        return Level(1.0, sigma)

    def second(self) -> bool:
        """Whether the coming call is the second of a step of second order."""
        return not getattr(self.scheduler, "state_in_first_order", True)

    def plan(self, i: int) -> list[tuple[float, Level, bool]]:
        """(t, level, second) of the steps from the i-th on."""
        two = hasattr(self.scheduler, "state_in_first_order")
        return [
            (t, self.level(t, j, second), second)
            for j, t in enumerate(self.times[i:], i)
            for second in [two and ((j - i) % 2 == 1)]
        ]

    def read(self, level: Level, said: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, eps), float32, that the network's answer implies."""
        said, x = said.detach().float(), x.detach().float()
        if self.family == "edm":
            said = self.scheduler.precondition_outputs(x, said, level.noise)
        elif self.family == "consistency":
            skip, out = self.scheduler.get_scalings_for_boundary_condition(level.noise)
            said = skip * x + out * said
        elif self.family == "flow" and getattr(self.scheduler.config, "invert_sigmas", False):
            said = -said  # Mochi's answer points to the data
        if self.kind == "epsilon" and level.signal == 0:
            raise _check.fail("prediction_type", self.kind, "v_prediction or sample where a state is noise alone")
        return implied(self.kind, level.signal, level.noise, said, x)
