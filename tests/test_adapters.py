"""Other people's models: the same scores whether diffusers drives the network or this package does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from common import one_line, seeded
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)

import tinyhall as th
from tinyhall._check import TinyhallError

T = 50
BETAS: dict[str, Any] = {"num_train_timesteps": T, "beta_start": 1e-3, "beta_end": 0.3}
WINDOW = (0, 20)
by_numpy = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside of diffusers


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), num_class_embeds=3,
        )  # fmt: skip
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        schedule, g = th.Schedule.linear(1e-3, 0.3, T), seeded(1)
        for _ in range(30):
            x0 = torch.randn(32, 1, 1, 1, generator=g).sign().expand(-1, 1, 8, 8)
            t, eps = torch.randint(T, (32,), generator=g), torch.randn(32, 1, 8, 8, generator=g)
            label = (x0[:, 0, 0, 0] > 0).long()
            loss = (net(schedule.q_sample(x0, t, eps), t, class_labels=label).sample - eps).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


class Labelled(torch.nn.Module):
    """The network at one class: pipelines without classes call it so."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet, self.config = unet, unet.config

    def forward(self, x: torch.Tensor, t: Any, **_: Any) -> Any:
        t = torch.as_tensor(t).expand(len(x))
        return self.unet(x, t, class_labels=torch.ones(len(x), dtype=torch.int64))


def drive(scheduler: Any, net: Any, steps: int, n: int = 4, **more: Any) -> torch.Tensor:
    """What a pipeline does."""
    g = seeded(7)
    scheduler.set_timesteps(steps)
    x = torch.randn(n, 1, 8, 8, generator=g)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t).sample, t, x, generator=g, **more).prev_sample
    return x


@pytest.mark.parametrize("variance", ["small", "large"])
def test_watching_ddpm_scores_as_reverse_does(unet: UNet2DModel, variance: str) -> None:
    scheduler = DDPMScheduler(**BETAS, variance_type=f"fixed_{variance}", clip_sample=False)
    metric, own = th.TrajectoryVariance(WINDOW), th.TrajectoryVariance(WINDOW)
    with th.watch(scheduler, metric):
        x = drive(scheduler, Labelled(unet), T)
    net, schedule = th.from_diffusers(unet, scheduler)
    ones = torch.ones(4, dtype=torch.int64)
    for step in th.reverse(net, schedule, (4, 1, 8, 8), sampler=th.ddpm(variance), generator=seeded(7), label=ones):
        own.update(step)
    torch.testing.assert_close(x, step.x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(metric.score(), own.score(), rtol=2e-3, atol=1e-6)
    assert float(own.score().min()) > 0


def test_watching_ddim_scores_as_reverse_does(unet: UNet2DModel) -> None:
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True)
    metric, own = th.TrajectoryVariance(WINDOW), th.TrajectoryVariance(WINDOW)
    with th.watch(scheduler, metric):
        x = drive(scheduler, Labelled(unet), T)
    net, schedule = th.from_diffusers(unet, scheduler)
    ones = torch.ones(4, dtype=torch.int64)
    for step in th.reverse(net, schedule, (4, 1, 8, 8), sampler=th.ddim(), generator=seeded(7), label=ones):
        own.update(step)
    torch.testing.assert_close(x, step.x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(metric.score(), own.score(), rtol=2e-3, atol=1e-6)


def test_a_network_in_half_precision_answers_in_single(unet: UNet2DModel) -> None:
    scheduler = DDPMScheduler(**BETAS)
    (whole, _), (half, _) = th.from_diffusers(unet, scheduler), th.from_diffusers(copy.deepcopy(unet).half(), scheduler)
    x, t, label = torch.randn(4, 1, 8, 8, generator=seeded()), torch.full((4,), 20), torch.ones(4, dtype=torch.int64)
    with torch.no_grad():
        torch.testing.assert_close(half(x, t, label), whole(x, t, label), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("pipeline", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_a_pipeline_is_scored_while_it_runs(unet: UNet2DModel, pipeline: Any, scheduler: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        plain = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    pipe = pipeline(plain, scheduler(**BETAS))
    pipe.set_progress_bar_config(disable=True)
    metric = th.TrajectoryVariance(WINDOW)
    kwargs = {"batch_size": 3, "num_inference_steps": 25, "output_type": "np"}
    alone = pipe(generator=seeded(), **kwargs).images
    with th.watch(pipe.scheduler, metric):
        watched = pipe(generator=seeded(), **kwargs).images
    assert (alone == watched).all()  # nobody is disturbed
    assert metric.score().shape == (3,)
    assert metric.count == 10  # every second t
    assert "step" not in vars(pipe.scheduler)


@by_numpy
@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(**BETAS, skip_prk_steps=True),  # as Stable Diffusion has it
        PNDMScheduler(**BETAS),
        DPMSolverMultistepScheduler(**BETAS),
        DPMSolverMultistepScheduler(**BETAS, prediction_type="v_prediction"),
    ],
    ids=lambda s: f"{type(s).__name__} {s.config.prediction_type} {s.config.get('skip_prk_steps', '')}",
)
def test_solvers_without_noise_are_scored_by_the_path_that_they_follow(scheduler: Any) -> None:
    """Of normal data the exact network, the path of a sample and so the variance of x0_hat have closed forms."""
    std, bar = 0.4, scheduler.alphas_cumprod.double()

    def spread(t: int) -> float:
        return float(bar[t] * std**2 + 1 - bar[t]) ** 0.5

    def exact(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = float(bar[int(t)])
        x0 = a**0.5 * (std / spread(int(t))) ** 2 * x
        eps = (x - a**0.5 * x0) / (1 - a) ** 0.5
        return eps if scheduler.config.prediction_type == "epsilon" else a**0.5 * eps - (1 - a) ** 0.5 * x0

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        scheduler.set_timesteps(T // 2)  # at as many as T some visit a t twice, and end in NaN
        start = x = torch.randn(4, 1, 8, 8, generator=seeded(7))
        for t in scheduler.timesteps:
            x = scheduler.step(exact(x, t), t, x).prev_sample
        return start, x

    steps: list[th.Step] = []

    class Look(th.TrajectoryVariance):
        def update(self, step: th.Step) -> None:
            steps.append(step)
            super().update(step)

    metric = Look(WINDOW)
    with th.watch(scheduler, metric):
        start, x = draw()
    assert torch.equal(draw()[1], x)  # nobody is disturbed
    late = [step.t for step in steps if step.t < WINDOW[1]]
    assert late == sorted(set(late), reverse=True) and metric.count == len(late) >= 9
    path = [float(bar[t]) ** 0.5 * std**2 / spread(t) / spread(int(scheduler.timesteps[0])) * start for t in late]
    expected = torch.stack(path).double().var(0, correction=0).mean((1, 2, 3))
    torch.testing.assert_close(metric.score().double(), expected, rtol=0.05, atol=0)


def test_a_clipped_guess_is_seen_unclipped() -> None:
    scheduler = DDPMScheduler(**BETAS, clip_sample=True, clip_sample_range=1.0)
    seen: list[torch.Tensor] = []

    class Look(th.TrajectoryVariance):
        def update(self, step: th.Step) -> None:
            seen.append(step.x0_hat)

    with th.watch(scheduler, Look(WINDOW)):
        out = scheduler.step(torch.zeros(1, 1, 2, 2), 10, torch.full((1, 1, 2, 2), 5.0), generator=seeded())
    assert float(out.pred_original_sample.max()) == 1.0
    assert float(seen[0].min()) > 5.0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_gives_one_x0(kind: str) -> None:
    scheduler = DDPMScheduler(**BETAS, prediction_type=kind, clip_sample=False)
    schedule = th.Schedule.linear(1e-3, 0.3, T)
    x0, eps, t = torch.randn(3, 1, 4, 4, generator=seeded(1)), torch.randn(3, 1, 4, 4, generator=seeded(2)), torch.tensor([20])
    a = float(schedule.alpha_bar[20])
    said = {"epsilon": eps, "v_prediction": a**0.5 * eps - (1 - a) ** 0.5 * x0, "sample": x0}[kind]
    x = schedule.q_sample(x0, t, eps)
    seen: list[th.Step] = []

    class Look(th.TrajectoryVariance):
        def update(self, step: th.Step) -> None:
            seen.append(step)

    with th.watch(scheduler, Look(WINDOW)):
        out = scheduler.step(said, 20, x, generator=seeded(), return_dict=False)
    torch.testing.assert_close(seen[0].x0_hat, x0, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(seen[0].eps, eps, rtol=1e-3, atol=1e-4)
    assert torch.equal(seen[0].x, out[0])
    assert seen[0].t == 20


def test_the_scheduler_is_itself_again_after_an_error() -> None:
    scheduler = DDPMScheduler(**BETAS)
    with pytest.raises(RuntimeError, match="stop"), th.watch(scheduler, th.TrajectoryVariance(WINDOW)):
        raise RuntimeError("stop")
    assert "step" not in vars(scheduler)


def test_metrics_start_afresh() -> None:
    scheduler, metric = DDPMScheduler(**BETAS), th.TrajectoryVariance(WINDOW)
    for _ in range(2):
        with th.watch(scheduler, metric):
            scheduler.step(torch.zeros(1, 1, 2, 2), 5, torch.ones(1, 1, 2, 2), generator=seeded())
        assert metric.count == 1


@by_numpy
def test_refused(unet: UNet2DModel) -> None:
    odd = DDPMScheduler(**BETAS)
    odd.register_to_config(prediction_type="flow")
    with pytest.raises(TinyhallError) as caught, th.watch(odd):
        pass
    one_line(caught.value, "prediction_type", "epsilon", "flow")
    with pytest.raises(TinyhallError) as caught:
        th.from_diffusers(unet, DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
    one_line(caught.value, "noise")  # Stable Diffusion's
    with pytest.raises(TinyhallError) as caught:
        th.from_diffusers(unet, FlowMatchEulerDiscreteScheduler())
    one_line(caught.value, "scheduler", "betas", "FlowMatchEulerDiscreteScheduler")


def test_a_schedule_from_alpha_bar() -> None:
    linear = th.Schedule.linear(1e-3, 0.2, 200)
    again = th.Schedule.from_alpha_bar(linear.alpha_bar)
    torch.testing.assert_close(again.betas, linear.betas, rtol=1e-9, atol=0)
    for bad in (torch.tensor([0.9, 0.95, 1e-4]), torch.tensor([1.0, 1e-4]), torch.tensor([0.5, -0.1]), torch.empty(0)):
        with pytest.raises(TinyhallError) as caught:
            th.Schedule.from_alpha_bar(bad)
        one_line(caught.value, "alpha_bar", "falling")
