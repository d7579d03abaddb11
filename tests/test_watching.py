"""Watching a pipeline leaves it as it is, and shows the x_0 that its network predicts, or says in one line why it cannot."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import Any

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from common import one_line, seeded
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.schedulers import scheduling_consistency_decoder
from pipelines import Look, error, loop

import tinyhall as th
from tinyhall.core._check import TinyhallError

T = 50
BETAS: dict[str, Any] = {"num_train_timesteps": T, "beta_start": 1e-3, "beta_end": 0.3}
# Of diffusers' own; whole pipelines bring more.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def pipe_of(scheduler: Any) -> Any:
    return pipelines.stable(scheduler)


def call(pipe: Any, steps: int = 8, **more: Any) -> torch.Tensor:
    return pipe(**pipelines.GUIDED, num_inference_steps=steps, generator=seeded(7), output_type="latent", **more).images


def everything() -> th.TrajectoryVariance:
    return th.TrajectoryVariance(last=10**6)


def test_a_watched_step_has_the_schedulers_own_signature() -> None:
    scheduler = DDIMScheduler(**BETAS)
    own = inspect.signature(scheduler.step), inspect.signature(scheduler.set_timesteps)
    with th.watch(scheduler):
        assert (inspect.signature(scheduler.step), inspect.signature(scheduler.set_timesteps)) == own
        assert isinstance(scheduler, DDIMScheduler) and type(scheduler).__name__ == "DDIMScheduler"
        assert vars(scheduler).keys() == vars(DDIMScheduler(**BETAS)).keys()
    assert type(scheduler) is DDIMScheduler


def test_callbacks_see_what_they_saw_and_may_change_it() -> None:
    pipe = pipe_of(DDIMScheduler(**pipelines.STABLE))
    seen: list[list[torch.Tensor]] = [[], []]

    def run(into: list[torch.Tensor]) -> torch.Tensor:
        def on_step(pipe: Any, i: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            into.append(tensors["latents"].clone())
            return {"latents": tensors["latents"] * 0.9}

        return call(pipe, callback_on_step_end=on_step)

    alone = run(seen[0])
    with th.watch(pipe.scheduler, everything()):
        watched = run(seen[1])
    assert torch.equal(alone, watched) and len(seen[0]) == len(seen[1]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_one_call_a_block_and_a_second_is_refused() -> None:
    pipe = pipe_of(EulerDiscreteScheduler(**pipelines.STABLE))
    alone, metric, scores = [call(pipe), call(pipe)], everything(), []
    for image in alone:
        with th.watch(pipe.scheduler, metric):
            assert torch.equal(call(pipe), image)
        scores.append(metric.score())
    assert torch.equal(*scores)
    with pytest.raises(TinyhallError) as caught, th.watch(pipe.scheduler, metric):
        call(pipe)
        call(pipe)
    one_line(caught.value, "watch", "one call of the pipeline", "second")
    assert torch.equal(metric.score(), scores[0])  # of the first
    with th.watch(pipe.scheduler, metric):  # a call that broke off is taken up again by the next
        assert torch.equal(call(pipe), alone[0])
    scheduler = DDPMScheduler(**BETAS)  # a loop by hand that sets no timesteps
    with pytest.raises(TinyhallError) as caught, th.watch(scheduler, th.TrajectoryVariance((0, 20))):
        for t in (9, 8, 9):
            scheduler.step(torch.ones(1, 1, 2, 2), t, torch.ones(1, 1, 2, 2), generator=seeded())
    one_line(caught.value, "watch", "falls", "RePaint")


def test_an_exception_in_mid_run_leaves_everything_as_it_was() -> None:
    pipe = pipe_of(EulerDiscreteScheduler(**pipelines.STABLE))
    alone = call(pipe)

    def stop(pipe: Any, i: int, t: Any, tensors: Any) -> Any:
        raise RuntimeError("stop") if i == 3 else None

    with pytest.raises((RuntimeError, TypeError)), th.watch(pipe.scheduler, everything()):
        call(pipe, callback_on_step_end=stop)
    assert type(pipe.scheduler) is EulerDiscreteScheduler
    assert torch.equal(call(pipe), alone)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_of_a_watched_scheduler_goes_its_own_way(copied: Any) -> None:
    """A copy that moved the original's state would spoil both."""
    scheduler = DPMSolverMultistepScheduler(**BETAS)
    metric, said = everything(), torch.randn(2, 1, 4, 4, generator=seeded())
    with th.watch(scheduler, metric):
        scheduler.set_timesteps(5)
        x = scheduler.step(said, scheduler.timesteps[0], said).prev_sample
        other = copied(scheduler)
        assert type(other) is DPMSolverMultistepScheduler
        other.step(said, scheduler.timesteps[1], x)
        assert scheduler.step_index == 1 and metric.count == 1
        scheduler.step(said, scheduler.timesteps[1], x)
    assert metric.count == 2


def test_a_step_that_somebody_has_patched_is_watched_and_put_back() -> None:
    scheduler, metric = DDIMScheduler(**BETAS), everything()
    scheduler.set_timesteps(10)
    own, calls = scheduler.step, []

    @functools.wraps(own)
    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    scheduler.step = patched
    with th.watch(scheduler, metric):
        for t in scheduler.timesteps:
            scheduler.step(torch.ones(1, 1, 2, 2), t, torch.ones(1, 1, 2, 2))
    assert len(calls) == metric.count == 10 and scheduler.step is patched


def test_two_watch_one_scheduler() -> None:
    pipe = pipe_of(DDIMScheduler(**pipelines.STABLE))
    alone, one, two = call(pipe), everything(), everything()
    with th.watch(pipe.scheduler, one), th.watch(pipe.scheduler, two):
        assert torch.equal(call(pipe), alone)
    assert torch.equal(one.score(), two.score()) and type(pipe.scheduler) is DDIMScheduler


VARIANCE_PRESERVING = [
    "DDPM",
    "DDIM",
    "PNDM",
    "LCM",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "DEISMultistep",
    "UniPCMultistep",
]
BY_SIGMA = ["EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("family", [*VARIANCE_PRESERVING, *BY_SIGMA])
def test_x0_hat_is_the_x0_that_the_network_knows(family: str, kind: str) -> None:
    """Relative error in float32 over a whole run, and beside it the scheduler's own x_0 where it reports one."""
    if kind == "sample" and family in ("PNDM", "EulerAncestralDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"):
        pytest.skip("diffusers has none")
    more = {"clip_sample": False} if family in ("DDPM", "DDIM") else {}
    scheduler = getattr(diffusers, f"{family}Scheduler")(**pipelines.STABLE, prediction_type=kind, **more)
    assert error(scheduler, 12) < 1e-4
    look = Look()
    net = torch.randn(4, 4, generator=seeded()) / 4  # any network
    with th.watch(scheduler, look):
        outs = loop(scheduler, lambda x, t, i: torch.einsum("nchw,cd->ndhw", scheduler.scale_model_input(x, t), net), 12)
    own = [out[1] for out in outs if len(out) > 1 and family not in ("LCM", "TCD")]  # LCM's other is the consistency function's
    assert len(own) in (0, len(look.steps))
    for step, x0 in zip(look.steps, own, strict=False):
        assert float((step.x0_hat - x0).abs().max() / x0.abs().max()) < 2e-5


@pytest.mark.parametrize(
    ("family", "settings", "steps"),
    [
        ("DPMSolverMultistep", {"use_karras_sigmas": True, **pipelines.STABLE}, 12),
        ("EulerDiscrete", {"use_exponential_sigmas": True, **pipelines.STABLE}, 12),
        ("EulerDiscrete", {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True,
                           "sigma_min": 0.002, "sigma_max": 700.0, **pipelines.STABLE}, 25),
        ("EDMEuler", {}, 18), ("EDMEuler", {"prediction_type": "v_prediction"}, 18),
        ("EDMDPMSolverMultistep", {}, 18), ("CMStochasticIterative", {}, 4), ("SCM", {}, 2),
        ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, 12), ("FlowMatchHeunDiscrete", {}, 12),
        ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}, 12), ("FlowMatchLCM", {}, 8), ("LTXEulerAncestralRF", {}, 8),
        ("UniPCMultistep", {**pipelines.FLOW_SIGMAS, "flow_shift": 5.0}, 12),
        ("DDIM", {**pipelines.STABLE, **pipelines.ZERO_SNR, "clip_sample": False}, 10),
        ("DDIM", {**pipelines.STABLE, **pipelines.ZERO_SNR, "clip_sample": False, "prediction_type": "sample"}, 10),
        ("DDPM", {**pipelines.STABLE, **pipelines.ZERO_SNR, "clip_sample": False}, 10),
        ("DPMSolverMultistep", {**pipelines.STABLE, **pipelines.ZERO_SNR}, 10),
    ],
)  # fmt: skip
def test_x0_hat_at_other_sigmas(family: str, settings: dict[str, Any], steps: int) -> None:
    kind = getattr(diffusers, f"{family}Scheduler", None)
    if kind is None or not settings.keys() <= inspect.signature(kind.__init__).parameters.keys():
        pytest.skip("this diffusers is older than that scheduler")
    assert error(getattr(diffusers, f"{family}Scheduler")(**settings), steps) < 2e-4


def test_a_scheduler_that_counts_its_sigmas_upwards() -> None:
    """Mochi's: its answer points to the data, and 1 - sigma is the noise."""
    scheduler, look = FlowMatchEulerDiscreteScheduler(invert_sigmas=True), Look()
    scheduler.set_timesteps(8)
    x0, x = torch.randn(2, 4, 4, generator=seeded(1)), torch.randn(2, 4, 4, generator=seeded(2))
    with th.watch(scheduler, look):
        for t in scheduler.timesteps:
            x = scheduler.step((x0 - x) / (1 - float(t) / 1000), t, x, return_dict=False)[0]
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-4)
    assert all(float((step.x0_hat - x0).abs().max()) < 1e-5 for step in look.steps)
    shares = [step.noise or 0 for step in look.steps]
    assert shares == sorted(shares, reverse=True)


def test_the_angles_of_dance_diffusion() -> None:
    scheduler, look = diffusers.IPNDMScheduler(), Look()
    scheduler.set_timesteps(8)
    x0, x = torch.randn(2, 4, 4, generator=seeded(1)), torch.randn(2, 4, 4, generator=seeded(2))
    with th.watch(scheduler, look):
        for t in scheduler.timesteps:
            angle = t.double() * torch.pi / 2  # alpha = cos, sigma = sin
            velocity = (angle.cos() * x - x0) / angle.sin()
            x = scheduler.step(velocity.float(), t, x, return_dict=False)[0]
    assert all(float((step.x0_hat - x0).abs().max()) < 1e-4 for step in look.steps)


def test_the_default_window_sees_two_steps_of_what_people_run() -> None:
    def held(scheduler: Any, steps: int, **more: Any) -> int:
        scheduler.set_timesteps(steps, **more)
        with th.watch(scheduler) as metric:
            for t in scheduler.timesteps:
                scheduler.step(torch.zeros(1, 1, 2, 2), t, torch.ones(1, 1, 2, 2))
        return metric.count

    assert held(EulerDiscreteScheduler(**pipelines.LEADING), 30) == 6  # SDXL
    assert held(FlowMatchEulerDiscreteScheduler(shift=3.0), 28) == 4  # SD3
    shifted = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert held(shifted, 28, sigmas=np.linspace(1, 1 / 28, 28), mu=1.15) == 3  # FLUX at 1024 by 1024
    assert held(DPMSolverMultistepScheduler(**pipelines.STABLE), 20) == 3
    with pytest.raises(TinyhallError) as caught:
        held(diffusers.LCMScheduler(**pipelines.STABLE), 4)
    one_line(caught.value, "window", "2 steps", "got 0 with a noise share in [0,", "the last of 4 have", "0.62 and 0.42")


def test_a_window_that_the_sampler_skips_is_refused_at_the_first_step() -> None:
    pipe = pipe_of(DPMSolverMultistepScheduler(**pipelines.STABLE))
    metric, steps = th.TrajectoryVariance((0, 100)), []
    with pytest.raises(TinyhallError) as caught, th.watch(pipe.scheduler, metric):
        call(pipe, steps=20, callback_on_step_end=lambda *a: steps.append(1) or {})
    one_line(caught.value, "window", "with t in [0,100)", "got 1", "the last of 20")
    assert not steps
    with th.watch(pipe.scheduler, th.TrajectoryVariance(last=2)) as metric:
        call(pipe, steps=20)
    assert metric.count == 2
    svd = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True)
    svd.set_timesteps(10)
    with pytest.raises(TinyhallError) as caught, th.watch(svd, th.TrajectoryVariance((0, 100))):
        svd.step(torch.zeros(1, 1, 2, 2), svd.timesteps[0], torch.ones(1, 1, 2, 2))
    one_line(caught.value, "window", "noise=(a, b)", "no count")


def test_rows_that_come_twice() -> None:
    """DiT holds its states twice under guidance; the first half becomes the images."""
    pipe = pipelines.dit_pipeline(DDIMScheduler(clip_sample=False))
    run = functools.partial(pipe, class_labels=[1, 2, 3], num_inference_steps=20, output_type="np")
    alone = run(generator=seeded(7)).images
    with pytest.raises(TinyhallError) as caught, th.watch(pipe.scheduler):
        run(generator=seeded(7))
    one_line(caught.value, "doubled", "6 rows", "DiT")
    scores = []
    for doubled in (True, False):
        with th.watch(pipe.scheduler, doubled=doubled) as metric:
            assert (run(generator=seeded(7)).images == alone).all()
        scores.append(metric.score())
    assert scores[0].shape == (3,) and torch.equal(scores[1], scores[0].repeat(2))
    with th.watch(pipe.scheduler) as metric:
        run(generator=seeded(7), guidance_scale=1.0)
    assert metric.score().shape == (3,)


def test_runs_that_go_back_up_are_refused_before_they_begin() -> None:
    repaint = diffusers.RePaintScheduler()
    repaint.set_timesteps(10, jump_length=2, jump_n_sample=2)
    one = torch.ones(1, 1, 4, 4)
    with pytest.raises(TinyhallError) as caught, th.watch(repaint, everything()) as metric:
        repaint.step(one, repaint.timesteps[0], one, one, one, generator=seeded())
    one_line(caught.value, "watch", "falls", "RePaint")
    assert metric.count == 0
    for inverse in (diffusers.DDIMInverseScheduler(), diffusers.DPMSolverMultistepInverseScheduler()):
        with pytest.raises(TinyhallError) as caught, th.watch(inverse):
            pass
        one_line(caught.value, "scheduler", "closed form", "Inverse")


def test_a_t_that_pndm_visits_twice_counts_twice() -> None:
    scheduler = PNDMScheduler(**pipelines.STABLE, skip_prk_steps=True, steps_offset=1)
    look = Look()
    with th.watch(scheduler, look):
        loop(scheduler, lambda x, t, i: 0.1 * x, 10)
    assert [step.t for step in look.steps[:4]] == [901, 801, 801, 701]
    assert [step.left for step in look.steps] == list(range(10, -1, -1))


def test_what_has_no_x0_is_refused_in_one_line() -> None:
    of_tokens: dict[str, dict[str, int]] = {"Amused": {"mask_token_id": 5}, "VQDiffusion": {"num_vec_classes": 5}}
    for name, settings in (of_tokens | {"ScoreSdeVe": {}, "ConsistencyDecoder": {}}).items():
        home = diffusers if hasattr(diffusers, f"{name}Scheduler") else scheduling_consistency_decoder
        scheduler = getattr(home, f"{name}Scheduler")(**settings)
        with pytest.raises(TinyhallError) as caught, th.watch(scheduler):
            pass
        one_line(caught.value, "scheduler", name)
    odd = DDPMScheduler(**BETAS, prediction_type="epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(TinyhallError) as caught, th.watch(odd, everything()):
        odd.step(torch.ones(1, 1, 2, 2), T - 1, torch.ones(1, 1, 2, 2), generator=seeded())
    one_line(caught.value, "prediction_type", "noise alone", "epsilon")


def test_slips_get_one_line(unchecked: None) -> None:
    pipe, m = pipelines.plain("DDPM")(DDPMScheduler()), th.TrajectoryVariance()
    for slip, name, part in [
        (lambda: th.watch(pipe, m), "scheduler", "pipeline.scheduler"),
        (lambda: th.watch(pipe.scheduler, [m]), "metrics", "one by one"),
        (lambda: th.watch(pipe.scheduler, th.TrajectoryVariance), "metrics", "one by one"),
        (lambda: th.watch(pipe.scheduler, m, m), "metrics", "once"),
    ]:
        with pytest.raises(TinyhallError) as caught, slip():
            pass
        one_line(caught.value, name, part)
    schedule = th.Schedule.linear()
    with pytest.raises(TinyhallError) as caught:
        th.sample(lambda x, t, label=None: x, schedule, 2, shape=(1,), metrics=m, generator=seeded())
    one_line(caught.value, "metrics", "list")


def test_memory_does_not_grow_with_the_steps() -> None:
    """Latents of a video: two sums of their size, whatever the sampler does."""
    metric, x = everything(), torch.ones(1, 16, 8, 8)
    for left in range(100):
        metric.update(th.Step(left, x, x * left, x, 0.1, left))
    held = [value for value in vars(metric.seen).values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() for value in held) == 2 * x.numel()
