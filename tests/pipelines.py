"""Whole diffusers pipelines with tiny networks of random weights; prompts come as embeddings, and nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from common import seeded

import tinyhall as th

STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
LEADING = {**STABLE, "timestep_spacing": "leading", "steps_offset": 1}
FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


class Case(NamedTuple):
    """A pipeline as it is used: its scheduler, the steps that its authors advise, and the arguments of a call."""

    pipeline: str
    build: Callable[[Any], Any]
    scheduler: str
    settings: dict[str, Any]
    steps: int
    call: dict[str, Any] = {}  # noqa: RUF012
    note: str = ""


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _random(make: Callable[[], Any]) -> Any:
    """A network whose weights are drawn from a seed, the global generator left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make().eval()
        for parameter in net.parameters():  # some end in zeros, and would say nothing
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        return net


def vae(channels: int = 4, **more: Any) -> Any:
    return _random(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **more,
        )
    )  # fmt: skip


def plain_unet(size: Any = 8, **more: Any) -> Any:
    return _random(
        lambda: diffusers.UNet2DModel(
            **{
                "sample_size": size, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4,
                "layers_per_block": 1, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, **more,
            }
        )
    )  # fmt: skip


def text_unet(**more: Any) -> Any:
    return _random(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
            attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **more,
        )
    )  # fmt: skip


def dit(classes: int = 10) -> Any:
    return _random(
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
            patch_size=2, num_embeds_ada_norm=classes, norm_type="ada_norm_zero", norm_elementwise_affine=False,
        )
    )  # fmt: skip


def plain(name: str) -> Callable[[Any], Any]:
    return lambda scheduler: _quiet(getattr(diffusers, f"{name}Pipeline")(plain_unet(), scheduler))


def consistency(scheduler: Any) -> Any:
    return _quiet(diffusers.ConsistencyModelPipeline(plain_unet(), scheduler))


def stable(scheduler: Any) -> Any:
    return _quiet(
        diffusers.StableDiffusionPipeline(vae(), None, None, text_unet(), scheduler, None, None, requires_safety_checker=False)
    )


def lcm(scheduler: Any) -> Any:
    net = text_unet(time_cond_proj_dim=8)
    return _quiet(
        diffusers.LatentConsistencyModelPipeline(vae(), None, None, net, scheduler, None, None, requires_safety_checker=False)
    )


def xl(scheduler: Any) -> Any:
    net = text_unet(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 8)
    pipe = diffusers.StableDiffusionXLPipeline(vae(), None, None, None, None, net, scheduler, add_watermarker=False)
    # The size of the second text encoder's answer is asked of the encoder itself.
    pipe._get_add_time_ids = lambda *sizes, **_: torch.tensor([[*sizes[0], *sizes[1], *sizes[2]]], dtype=torch.float32)
    return _quiet(pipe)


def dit_pipeline(scheduler: Any) -> Any:
    return _quiet(diffusers.DiTPipeline(dit(1000), vae(), scheduler))


def pixart(scheduler: Any) -> Any:
    net = _random(
        lambda: diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
            patch_size=2, cross_attention_dim=16, caption_channels=8, use_additional_conditions=False,
        )
    )  # fmt: skip
    return _quiet(diffusers.PixArtAlphaPipeline(None, None, vae(), net, scheduler))


def _sana_net(**more: Any) -> Any:
    return _random(
        lambda: diffusers.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
            sample_size=8, patch_size=1, **more,
        )
    )  # fmt: skip


def _deep() -> Any:
    return _random(
        lambda: diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock"), encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()), downsample_block_type="conv", upsample_block_type="interpolate",
            decoder_norm_types="rms_norm", decoder_act_fns="silu",
        )
    )  # fmt: skip


def sana(scheduler: Any) -> Any:
    return _quiet(diffusers.SanaPipeline(None, None, _deep(), _sana_net(), scheduler))


def sprint(scheduler: Any) -> Any:
    net = _sana_net(guidance_embeds=True, guidance_embeds_scale=0.1)
    return _quiet(diffusers.SanaSprintPipeline(None, None, _deep(), net, scheduler))


def sd3(scheduler: Any) -> Any:
    net = _random(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
            attention_head_dim=8, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
            pos_embed_max_size=8,
        )
    )  # fmt: skip
    auto = vae(shift_factor=0.1, scaling_factor=1.5)
    return _quiet(diffusers.StableDiffusion3Pipeline(net, scheduler, auto, None, None, None, None, None, None))


def flux(guided: bool) -> Callable[[Any], Any]:
    def build(scheduler: Any) -> Any:
        net = _random(
            lambda: diffusers.FluxTransformer2DModel(
                patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=guided, axes_dims_rope=(4, 4, 8),
            )
        )  # fmt: skip
        auto = vae(shift_factor=0.1, scaling_factor=1.5)
        return _quiet(diffusers.FluxPipeline(scheduler, auto, None, None, None, None, net))

    return build


def cogvideox(scheduler: Any) -> Any:
    net = _random(
        lambda: diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=8,
            num_layers=1, sample_width=4, sample_height=4, sample_frames=5, patch_size=2, temporal_compression_ratio=4,
            max_text_seq_length=5,
        )
    )  # fmt: skip
    auto = _random(
        lambda: diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        )
    )  # fmt: skip
    return _quiet(diffusers.CogVideoXPipeline(None, None, auto, net, scheduler))


def wan(scheduler: Any) -> Any:
    net = _random(
        lambda: diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
            freq_dim=8, ffn_dim=16, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        )
    )  # fmt: skip
    auto = _random(lambda: diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1))
    return _quiet(diffusers.WanPipeline(None, None, auto, scheduler, net))


def _embeds(*names: str, length: int = 5, rows: int = 2, pooled: tuple[str, ...] = (), masks: tuple[str, ...] = ()) -> Any:
    g = seeded(11)
    said = {name: torch.randn(rows, length, 8, generator=g) for name in names}
    said |= {name: torch.randn(rows, 8, generator=g) for name in pooled}
    return said | {name: torch.ones(rows, length) for name in masks}


GUIDED = _embeds("prompt_embeds", "negative_prompt_embeds")
MASKED = _embeds(
    "prompt_embeds", "negative_prompt_embeds", masks=("prompt_attention_mask", "negative_prompt_attention_mask")
)  # fmt: skip
POOLED = _embeds(
    "prompt_embeds", "negative_prompt_embeds", pooled=("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
)  # fmt: skip
UNGUIDED = {**_embeds("prompt_embeds", pooled=("pooled_prompt_embeds",)), "height": 16, "width": 16}
SMALL = {"height": 16, "width": 16, "use_resolution_binning": False}
LARGER = SMALL | {"height": 32, "width": 32}
# As at 1024 by 1024 pixels: for smaller pictures the steps are shifted less.
FLUX_SHIFT = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 1.15, "max_shift": 1.15}

CASES = [
    Case("DDPM", plain("DDPM"), "DDPM", {}, 50),
    Case("DDIM", plain("DDIM"), "DDIM", {}, 50, {"eta": 1.0}, "eta 1"),
    Case("Stable Diffusion", stable, "PNDM", {**STABLE, "skip_prk_steps": True, "steps_offset": 1}, 50, GUIDED),
    Case("Stable Diffusion", stable, "DDIM", {**LEADING, "clip_sample": False}, 50, GUIDED | {"eta": 1.0}, "eta 1"),
    Case("Stable Diffusion", stable, "DDPM", STABLE, 50, GUIDED),
    Case("Stable Diffusion", stable, "DPMSolverMultistep", STABLE, 20, GUIDED),
    Case("Stable Diffusion", stable, "DPMSolverMultistep", {**STABLE, "algorithm_type": "sde-dpmsolver++"}, 25, GUIDED, "SDE"),
    Case("Stable Diffusion", stable, "DPMSolverSinglestep", STABLE, 20, GUIDED),
    Case("Stable Diffusion", stable, "DEISMultistep", STABLE, 25, GUIDED),
    Case("Stable Diffusion", stable, "UniPCMultistep", STABLE, 20, GUIDED),
    Case("Stable Diffusion", stable, "EulerDiscrete", LEADING, 30, GUIDED),
    Case("Stable Diffusion", stable, "EulerAncestralDiscrete", LEADING, 30, GUIDED),
    Case("Stable Diffusion", stable, "HeunDiscrete", STABLE, 20, GUIDED),
    Case("Stable Diffusion", stable, "KDPM2Discrete", STABLE, 20, GUIDED),
    Case("Stable Diffusion", stable, "KDPM2AncestralDiscrete", STABLE, 20, GUIDED),
    Case("Stable Diffusion", stable, "LMSDiscrete", STABLE, 30, GUIDED),
    Case("Stable Diffusion", stable, "DDIM", {**STABLE, **ZERO_SNR, "clip_sample": False}, 50,
         GUIDED | {"guidance_rescale": 0.7}, "v, zero terminal SNR"),
    Case("Stable Diffusion", stable, "DPMSolverMultistep", {**STABLE, "use_karras_sigmas": True}, 20, GUIDED, "Karras sigmas"),
    Case("Stable Diffusion", stable, "TCD", STABLE, 4, GUIDED | {"eta": 0.3}),
    Case("LCM", lcm, "LCM", STABLE, 4, _embeds("prompt_embeds")),
    Case("SDXL", xl, "EulerDiscrete", LEADING, 30, POOLED),
    Case("SDXL-Turbo", xl, "EulerAncestralDiscrete", {**STABLE, "timestep_spacing": "trailing"}, 4,
         {**_embeds("prompt_embeds", pooled=("pooled_prompt_embeds",)), "guidance_scale": 0.0}),
    Case("Playground", xl, "EDMDPMSolverMultistep", {"sigma_data": 0.5}, 30, POOLED),
    Case("DiT", dit_pipeline, "DDIM", {"clip_sample": False}, 50, {"class_labels": [1, 2]}),
    Case("PixArt", pixart, "DPMSolverMultistep", {}, 20, MASKED | SMALL | {"negative_prompt": None}),
    Case("SANA", sana, "DPMSolverMultistep", {**FLOW_SIGMAS, "flow_shift": 3.0}, 20,
         MASKED | LARGER | {"negative_prompt": None}, "flow"),
    Case("SANA-Sprint", sprint, "SCM", {}, 2, _embeds("prompt_embeds", masks=("prompt_attention_mask",)) | LARGER),
    Case("SD3", sd3, "FlowMatchEulerDiscrete", {"shift": 3.0}, 28, POOLED),
    Case("SD3", sd3, "FlowMatchHeunDiscrete", {"shift": 3.0}, 14, POOLED),
    Case("SD3", sd3, "FlowMatchLCM", {"shift": 3.0}, 8, POOLED),
    Case("FLUX", flux(True), "FlowMatchEulerDiscrete", FLUX_SHIFT, 28, UNGUIDED),
    Case("FLUX schnell", flux(False), "FlowMatchEulerDiscrete", {"shift": 1.0}, 4, UNGUIDED),
    Case("Wan", wan, "UniPCMultistep", {**FLOW_SIGMAS, "flow_shift": 5.0}, 50,
         GUIDED | {"height": 16, "width": 16, "num_frames": 5}, "flow"),
    Case("CogVideoX", cogvideox, "CogVideoXDDIM", ZERO_SNR, 50,
         GUIDED | {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 5}, "v, zero terminal SNR"),
    Case("CogVideoX", cogvideox, "CogVideoXDPM", ZERO_SNR, 50,
         GUIDED | {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 5}, "v, zero terminal SNR"),
    Case("Consistency model", consistency, "CMStochasticIterative", {}, 2, {"batch_size": 2}),
]  # fmt: skip


def make(case: Case) -> Any:
    """The pipeline of a case."""
    return case.build(getattr(diffusers, f"{case.scheduler}Scheduler")(**case.settings))


def draw(pipe: Any, case: Case, steps: int | None = None, seed: int = 7) -> torch.Tensor:
    """What a call returns, before it is decoded."""
    latent = "np" if case.pipeline in ("DDPM", "DDIM", "DiT") else "pt" if case.pipeline == "Consistency model" else "latent"
    call = {"batch_size": 2} if case.pipeline in ("DDPM", "DDIM") else {}
    out = pipe(**call, **case.call, num_inference_steps=steps or case.steps, generator=seeded(seed), output_type=latent)
    return torch.as_tensor(out[0] if isinstance(out, tuple) else next(iter(out.values())))


class Look(th.TrajectoryVariance):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__(last=10**6)
        self.steps: list[th.Step] = []

    def update(self, step: th.Step) -> None:
        self.steps.append(step)


def perfect(scheduler: Any, x: torch.Tensor, t: Any, i: int, x0: torch.Tensor) -> torch.Tensor:
    """What a network says at the i-th state x that knows x_0, by each parametrisation's own definition.

    It takes the noise level from what a network is given, the scaled state and t, and not from the scheduler's tables, except
    for solvers whose states lie at sigmas that t, rounded, does not tell.
    """
    kind, config = getattr(scheduler.config, "prediction_type", None), scheduler.config
    family = type(scheduler).__name__.removesuffix("Scheduler")
    x, x0 = x.double(), x0.double()
    if family == "SCM":
        angle = float(t)
        return ((torch.cos(torch.tensor(angle)) * x - x0) / torch.sin(torch.tensor(angle))).float()
    if family.startswith(("FlowMatch", "LTX")):
        return ((x - x0) / (float(t) / 1000)).float()
    if kind == "flow_prediction":
        return ((x - x0) / float(scheduler.sigmas[i])).float()
    scaled = scheduler.scale_model_input(x.float(), t)
    if family.startswith("EDM") or family.startswith("CM"):
        data = config.sigma_data
        sigma = float((x / scaled.double()).square().median() - data**2) ** 0.5
        if family.startswith("CM"):
            low = sigma - config.sigma_min
            skip, out = data**2 / (low**2 + data**2), low * data / (sigma**2 + data**2) ** 0.5
        else:
            skip, out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2) ** 0.5
            out = -out if kind == "v_prediction" else out
        return ((x0 - skip * x) / out).float()
    if torch.equal(scaled.double(), x):
        if hasattr(scheduler, "sigmas"):
            sigma = float(scheduler.sigmas[i])
            bar = torch.tensor(1 / (1 + sigma**2), dtype=torch.float64)
        else:
            bar = scheduler.alphas_cumprod[int(t)].double()
        eps = (x - bar.sqrt() * x0) / (1 - bar).sqrt()
    else:  # x_0 + sigma eps, which the network sees scaled to unit variance
        sigma = float((x / scaled.double()).square().median() - 1) ** 0.5
        bar = torch.tensor(1 / (1 + sigma**2), dtype=torch.float64)
        eps = (x - x0) / sigma
    velocity = bar.sqrt() * eps - (1 - bar).sqrt() * x0
    return {"epsilon": eps, "v_prediction": velocity, "sample": x0}[kind].float()


def loop(scheduler: Any, said: Any, steps: int, seed: int = 3) -> list[Any]:
    """The scheduler's own loop from pure noise, with what it returned at each step."""
    if type(scheduler).__name__ == "SCMScheduler":
        scheduler.set_timesteps(steps, intermediate_timesteps=None if steps != 2 else 1.3)
    elif getattr(scheduler.config, "use_dynamic_shifting", False):
        scheduler.set_timesteps(steps, mu=1.15)
    else:
        scheduler.set_timesteps(steps)
    x = torch.randn(2, 4, 8, 8, generator=seeded(seed)) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    times = scheduler.timesteps[:-1] if type(scheduler).__name__ == "SCMScheduler" else scheduler.timesteps
    outs, back, old = [], None, None
    for i, t in enumerate(times):
        answer = said(x, t, i)
        if type(scheduler).__name__ == "CogVideoXDPMScheduler":
            out = scheduler.step(answer, old, t, back, x, generator=seeded(i), return_dict=False)
            back, old = t, out[1]
        else:
            known = "generator" in scheduler.step.__wrapped__.__code__.co_varnames
            out = scheduler.step(answer, t, x, return_dict=False, **({"generator": seeded(i)} if known else {}))
        x = out[0]
        outs.append(out)
    return outs


def error(scheduler: Any, steps: int) -> float:
    """The largest error of x0_hat over a run of a network that knows x_0, relative to x_0's root mean square."""
    x0 = torch.randn(2, 4, 8, 8, generator=seeded(5))
    look = Look()
    with torch.random.fork_rng(devices=[]), th.watch(scheduler, look):
        loop(scheduler, lambda x, t, i: perfect(scheduler, x, t, i, x0), steps)
    assert len(look.steps) >= steps - 1
    return max(float((step.x0_hat - x0).abs().max()) for step in look.steps)
