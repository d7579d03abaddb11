"""Other people's models: the same scores whether diffusers drives the network or this package does."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pipelines
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
from tinyhall.core._check import TinyhallError

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


NOISY = DDPMScheduler()  # ends in noise


def drawn(net: Any, scheduler: Any = NOISY, extra: dict[str, Any] | None = None, **more: Any) -> tuple[int, ...]:
    own, schedule = th.from_diffusers(net, scheduler, **(extra or {}))
    return tuple(th.sample(own, schedule, 2, sampler=th.ddim(sample_steps=5), generator=seeded(), **more).x.shape)


def test_networks_that_people_have(unchecked: None) -> None:
    """What a network can do is done, the rest is said in one line."""
    labelled, dit = pipelines.plain_unet(num_class_embeds=3), pipelines.dit()
    text, label = pipelines.text_unet(), torch.tensor([0, 1])
    wave = pipelines._random(
        lambda: diffusers.UNet1DModel(
            sample_size=64, in_channels=2, out_channels=2, block_out_channels=(32, 32), norm_num_groups=4,
            down_block_types=("DownBlock1D",) * 2, up_block_types=("UpBlock1D",) * 2,
        )
    )  # fmt: skip
    assert drawn(pipelines.plain_unet((8, 16))) == (2, 1, 8, 16)
    assert drawn(pipelines.plain_unet(None), shape=(1, 8, 8)) == (2, 1, 8, 8)
    assert drawn(pipelines.plain_unet(out_channels=2)) == (2, 1, 8, 8)  # a learned variance
    assert drawn(wave) == (2, 2, 64)
    assert drawn(labelled, label=label) == (2, 1, 8, 8)
    assert drawn(labelled, extra={"null": 2}, label=label, guidance=2.0) == (2, 1, 8, 8)
    assert drawn(dit) == drawn(dit, label=label) == drawn(dit, label=label, guidance=4.0) == (2, 4, 8, 8)
    assert drawn(text, extra={"encoder_hidden_states": torch.zeros(2, 5, 8)}) == (2, 4, 8, 8)
    refused: list[tuple[Any, tuple[str, ...]]] = [
        (lambda: drawn(pipelines.plain_unet(None)), ("shape", "(2,)")),
        (lambda: drawn(pipelines.plain_unet(out_channels=3)), ("net", "1 channels")),
        (lambda: drawn(pipelines.plain_unet(), label=label), ("label", "no classes")),
        (lambda: drawn(labelled), ("label", "0 to 2", "null=")),
        (lambda: drawn(labelled, label=label, guidance=2.0), ("label", "guidance")),
        (lambda: drawn(labelled, label=torch.tensor([0, 3])), ("label", "to 2", "3")),
        (lambda: drawn(text), ("unet", "encoder_hidden_states=", "UNet2DConditionModel")),
        (lambda: drawn(pipelines.plain("DDPM")(NOISY)), ("unet", "pipeline.unet", "DDPMPipeline")),
        (lambda: drawn(labelled, diffusers.EDMEulerScheduler()), ("scheduler", "betas", "EDM")),
        (lambda: drawn(labelled, DDPMScheduler(rescale_betas_zero_snr=True)), ("scheduler", "zero terminal SNR", "th.watch")),
    ]
    for attempt, parts in refused:
        with pytest.raises(TinyhallError) as caught:
            attempt()
        one_line(caught.value, *parts)


def test_the_row_for_no_class_is_used() -> None:
    labelled = pipelines.plain_unet(num_class_embeds=3)
    net, _ = th.from_diffusers(labelled, NOISY, null=2)
    x, t = torch.randn(2, 1, 8, 8, generator=seeded()), torch.tensor([10, 500])
    with torch.no_grad():
        none = labelled(x, t, class_labels=torch.tensor([2, 2])).sample
        mixed = labelled(x, t, class_labels=torch.tensor([1, 2])).sample
        assert torch.equal(net(x, t), none)
        assert torch.equal(net(x, t, torch.tensor([1, -1])), mixed)


STD = 0.4  # of normal data, whose exact denoiser is x / (1 + (sigma / STD)^2)


def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return x / (1 + (float(sigma) / STD) ** 2)


SIGMAS = [2.0 * 0.8**i for i in range(20)]


def of_sigmas() -> torch.Tensor:
    """What the examples should score: x0_hat along the exact path from sigma to sigma."""
    x, metric = torch.randn(3, 2, generator=seeded()) * SIGMAS[0], th.TrajectoryVariance(noise=(0, 1 / 3))
    for here, there in pairwise([*SIGMAS, 0.0]):
        metric.update(th.Step(0, x, denoise(x, here), x, here / (1 + here)))
        x = denoise(x, here) + there / here * (x - denoise(x, here))
    return metric.score()


def test_k_diffusion_by_its_callback() -> None:
    def sample_euler(model: Any, x: torch.Tensor, sigmas: Any, callback: Any) -> torch.Tensor:  # its call and its callback
        for i, (here, there) in enumerate(pairwise(sigmas)):
            denoised = model(x, here * x.new_ones(len(x)))
            callback({"x": x, "i": i, "sigma": here, "sigma_hat": here, "denoised": denoised})
            x = x + (x - denoised) / here * (there - here)
        return x

    metric = th.TrajectoryVariance(noise=(0, 1 / 3))
    x, sigmas = torch.randn(3, 2, generator=seeded()) * SIGMAS[0], torch.tensor([*SIGMAS, 0.0])
    sample_euler(
        lambda x, sigma: denoise(x, sigma[0]), x, sigmas,
        callback=lambda d: metric.update(th.step_at(d["x"], d["denoised"], sigma=d["sigma"])),
    )  # fmt: skip
    torch.testing.assert_close(metric.score(), of_sigmas(), rtol=1e-4, atol=0)


def test_edm_by_a_wrapped_denoiser() -> None:
    def edm_sampler(net: Any, latents: torch.Tensor) -> torch.Tensor:  # of first order
        x = latents.double() * SIGMAS[0]
        for here, there in pairwise([*SIGMAS, 0.0]):
            x = x + (there - here) * (x - net(x, torch.tensor(here)).double()) / here
        return x

    metric = th.TrajectoryVariance(noise=(0, 1 / 3))

    def seen(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        denoised = denoise(x, float(sigma))
        metric.update(th.step_at(x, denoised, sigma=sigma))
        return denoised

    edm_sampler(seen, torch.randn(3, 2, generator=seeded()))
    torch.testing.assert_close(metric.score(), of_sigmas(), rtol=1e-4, atol=0)


def test_smalldiffusion_by_its_predict_eps() -> None:
    class Model(torch.nn.Module):
        def predict_eps(self, x: torch.Tensor, sigma: float, cond: Any = None) -> torch.Tensor:
            return (x - denoise(x, sigma)) / sigma

    def samples(model: Any, sigmas: Any, xt: torch.Tensor) -> Any:  # yields states alone
        for here, there in pairwise(sigmas):
            xt = xt - (here - there) * model.predict_eps(xt, here)
            yield xt

    model, metric = Model(), th.TrajectoryVariance(noise=(0, 1 / 3))
    predict = model.predict_eps

    def seen(x: torch.Tensor, sigma: float, cond: Any = None) -> torch.Tensor:
        eps = predict(x, sigma, cond)
        metric.update(th.step_at(x, eps, "epsilon", sigma=sigma))
        return eps

    model.predict_eps = seen  # type: ignore[method-assign]
    list(samples(model, [*SIGMAS, 0.0], torch.randn(3, 2, generator=seeded()) * SIGMAS[0]))
    torch.testing.assert_close(metric.score(), of_sigmas(), rtol=1e-4, atol=0)


def test_denoising_diffusion_pytorch_by_its_model_predictions() -> None:
    class Predictions(NamedTuple):
        pred_noise: torch.Tensor
        pred_x_start: torch.Tensor

    class GaussianDiffusion:
        alphas_cumprod = th.Schedule.linear(1e-3, 0.2, 100).alpha_bar.float()

        def model_predictions(self, x: torch.Tensor, t: torch.Tensor, x_self_cond: Any = None) -> Predictions:
            bar = self.alphas_cumprod[t][:, None]
            start = bar.sqrt() * STD**2 / (bar * STD**2 + 1 - bar) * x
            return Predictions((x - bar.sqrt() * start) / (1 - bar).sqrt(), start)

        def ddim_sample(self, x: torch.Tensor) -> torch.Tensor:
            for t in range(99, -1, -1):
                said = self.model_predictions(x, torch.full((len(x),), t))
                bar = self.alphas_cumprod[t - 1] if t else torch.tensor(1.0)
                x = bar.sqrt() * said.pred_x_start + (1 - bar).sqrt() * said.pred_noise
            return x

    diffusion, metric = GaussianDiffusion(), th.TrajectoryVariance(noise=(0, 1 / 3))
    predict, expected = diffusion.model_predictions, []

    def seen(x: torch.Tensor, t: torch.Tensor, *rest: Any) -> Predictions:
        out = predict(x, t, *rest)
        metric.update(th.step_at(x, out.pred_noise, "epsilon", alpha_bar=diffusion.alphas_cumprod[t]))
        if th.Schedule.linear(1e-3, 0.2, 100).noise_share(int(t[0])) < 1 / 3:
            expected.append(out.pred_x_start)
        return out

    diffusion.model_predictions = seen  # type: ignore[method-assign]
    diffusion.ddim_sample(torch.randn(3, 2, generator=seeded()))
    exact = torch.stack(expected).double().var(0, correction=0).mean(1).float()
    torch.testing.assert_close(metric.score(), exact, rtol=1e-3, atol=0)


def test_a_step_of_flow_matching_and_bad_steps(unchecked: None) -> None:
    x0, eps = torch.randn(3, 2, generator=seeded(1)), torch.randn(3, 2, generator=seeded(2))
    step = th.step_at(0.7 * x0 + 0.3 * eps, eps - x0, "flow_prediction", sigma=torch.full((3,), 0.3))
    torch.testing.assert_close(step.x0_hat, x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(step.eps, eps, rtol=0, atol=1e-6)
    assert step.noise == pytest.approx(0.3) and step.t == 300
    for name, attempt in {
        "predicts": lambda: th.step_at(x0, eps, "score", sigma=1.0),
        "said": lambda: th.step_at(x0, eps[:2], sigma=1.0),
        "sigma": lambda: th.step_at(x0, eps),
        "sigma ": lambda: th.step_at(x0, eps, sigma=torch.tensor([1.0, 2.0])),
        "sigma  ": lambda: th.step_at(x0, eps, "flow_prediction", sigma=3.0),
        "alpha_bar": lambda: th.step_at(x0, eps, alpha_bar=1.5),
    }.items():
        with pytest.raises(TinyhallError) as caught:
            attempt()
        one_line(caught.value, f"{name.strip()}: expected")


def test_where_it_moved_is_drawn_over_the_pictures() -> None:
    """One call from latents to pictures, for everything that a pipeline returns."""
    moved = torch.zeros(2, 4, 4, 4)
    moved[0, :, 0, 3] = 5.0  # one corner of the first, upper right
    grey = torch.zeros(2, 3, 16, 16)
    over = th.overlay(grey, moved, strength=1.0)
    assert over.shape == (2, 3, 16, 16) and over.dtype == torch.float32 and float(over.abs().max()) <= 1
    assert float(over[0, 0, 0, 15]) == 1.0 and float(over[0, 1, 0, 15]) == pytest.approx(-0.8)
    assert torch.equal(over[0, :, 12:, :8], grey[0, :, 12:, :8]) and torch.equal(over[1], grey[1])
    array = np.full((2, 16, 16, 3), 0.5, np.float32)
    for images in (
        array,
        list(array),
        np.full((2, 16, 16, 3), 127.5, np.float32) / 255,
        grey[:, :1],
        torch.zeros(2, 5, 16, 16),
    ):
        torch.testing.assert_close(th.overlay(images, moved, strength=1.0), over)
    from PIL import Image

    pil = [Image.fromarray(np.full((16, 16, 3), 128, np.uint8))] * 2
    torch.testing.assert_close(th.overlay(pil, moved, strength=1.0), over, rtol=0, atol=0.01)
    wide = torch.zeros(1, 3, 16, 32)
    patches = torch.zeros(1, 2 * 4, 6)  # FLUX's, of 8 by 8 pixels
    patches[0, 3] = 1.0  # the last of the first row
    over = th.overlay(wide, patches, strength=1.0)
    assert float(over[0, 0, 0, 31]) == 1.0 and float(over[0, 0, 15].abs().max()) == 0
    for name, attempt in {
        "images": lambda: th.overlay("cat.png", moved),
        "variance": lambda: th.overlay(grey[:1], moved),
        "variance ": lambda: th.overlay(wide, torch.zeros(1, 7, 6)),
        "variance  ": lambda: th.overlay(wide, torch.zeros(1, 7)),
        "strength": lambda: th.overlay(grey, moved, strength=2),
    }.items():
        with pytest.raises(TinyhallError) as caught:
            attempt()
        one_line(caught.value, f"{name.strip()}: expected")
