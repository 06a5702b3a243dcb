"""Sampling: captions, and for I2V a first frame, to pixels."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler
from torch import Tensor

from sat_ext.cogvideox import latent_frames
from sat_ext.contact_sheet import SheetRow
from sat_ext.errors import ConfigError
from sat_ext.models.conditioning import condition_latents, padding_frames
from sat_ext.models.config import ScheduleConfig, check_bucket
from sat_ext.models.diffusion import SCHEDULER_CONSTANTS
from sat_ext.models.engine import VideoDiffusionEngine
from sat_ext.pixels import to_model_range, to_uint8
from sat_ext.types import Bucket

SAMPLERS: dict[str, Any] = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}


def make_scheduler(schedule: ScheduleConfig) -> Any:
    """diffusers' CogVideoX scheduler, set as the published scheduler_config.json files are."""
    return SAMPLERS[schedule.sampler](
        **SCHEDULER_CONSTANTS,
        snr_shift_scale=schedule.snr_shift_scale,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


@torch.no_grad()
def generate(
    engine: VideoDiffusionEngine,
    captions: Sequence[str],
    *,
    frames: int,
    height: int,
    width: int,
    first_frames: Tensor | None = None,
    steps: int = 50,
    guidance_scale: float = 6.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Pixels (B, T, C, H, W) in [-1, 1], float32, for B captions.

    `first_frames`, (B, C, H, W) in [-1, 1], is what an I2V model animates; without it the condition is zero,
    as in training's condition dropout. Guidance pushes away from the empty caption; a `guidance_scale` of 1
    or less turns it off, and then each step costs half. Samples are made one after another, and with guidance in
    two passes: in an evaluation they take no more memory than training does. Raises `ConfigError` for a size or
    frame count that the model does not take and for first frames that it cannot use.
    """
    config = engine.config
    check_bucket(config, Bucket(frames=frames, height=height, width=width))
    _check_first_frames(engine, first_frames, (len(captions), 3, height, width), frames)
    device, dtype = engine.network.device, engine.network.dtype
    padding = padding_frames(latent_frames(frames), config.transformer.patch_size_t)
    scale = config.spatial_compression
    size = (height // scale, width // scale)
    shape = (len(captions), padding + latent_frames(frames), config.latent_channels, *size)
    source = device if generator is None else generator.device
    noise = torch.randn(shape, generator=generator, device=source).to(device)
    texts = engine.text.encode([*captions, ""], device, dtype)
    empty = texts[-1:] if guidance_scale > 1.0 else None
    samples = []
    for i in range(len(captions)):
        condition = None
        if config.conditioning == "i2v":
            condition = torch.zeros_like(noise[:1])
            if first_frames is not None:
                first = engine.first_stage.encode_condition(first_frames[i : i + 1, None].to(device, dtype))
                condition = condition_latents(first, shape[1], torch.zeros(1, dtype=torch.bool))
        one, text = noise[i : i + 1], texts[i : i + 1]
        latents = _denoise(engine, one, text, empty, condition, steps, guidance_scale, generator)
        samples.append(engine.first_stage.decode(latents[:, padding:]).float())
    return torch.cat(samples)


def sample_rows(
    engine: VideoDiffusionEngine,
    batch: dict[str, Any],
    generator: torch.Generator,
    *,
    steps: int,
    guidance_scale: float,
) -> list[SheetRow]:
    """One row a sample: what the engine makes of its caption, and the sample itself.

    `batch` holds `mp4` (B, T, C, H, W), uint8 or in [-1, 1], `txt` and `kind`. An image-to-video engine gets
    the first frames of clips; of stills it gets the caption alone, since the first frame would be the answer.
    """
    real = batch["mp4"]
    shows_first = engine.config.conditioning == "i2v" and batch["kind"][0] == "video"
    made = generate(
        engine,
        batch["txt"],
        frames=real.shape[1],
        height=real.shape[3],
        width=real.shape[4],
        first_frames=to_model_range(real[:, 0], torch.float32) if shows_first else None,
        steps=steps,
        guidance_scale=guidance_scale,
        generator=generator,
    )
    return [
        SheetRow(caption=caption, strips={"generated": to_uint8(m), "held out": to_uint8(r)})
        for caption, m, r in zip(batch["txt"], made, real)
    ]


def _check_first_frames(
    engine: VideoDiffusionEngine, first_frames: Tensor | None, shape: tuple[int, ...], frames: int
) -> None:
    if first_frames is None:
        return
    if engine.config.conditioning != "i2v":
        raise ConfigError("sample: a first frame was given, but this model is text-to-video; leave it out.")
    if frames == 1:
        raise ConfigError("sample: a first frame was given, but frames is 1; ask for 5 frames or more.")
    if tuple(first_frames.shape) != shape:
        found = tuple(first_frames.shape)
        raise ConfigError(f"sample: first frames of shape {found} do not fit; make them {shape}.")


def _denoise(
    engine: VideoDiffusionEngine,
    latents: Tensor,
    text: Tensor,
    empty: Tensor | None,
    condition: Tensor | None,
    steps: int,
    guidance_scale: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Pure noise to clean latents, in float32, both (B, T, C, H, W) with any padding."""
    scheduler = make_scheduler(engine.config.schedule)
    scheduler.set_timesteps(steps)
    previous_estimate, previous_timestep = None, None
    for timestep in scheduler.timesteps:
        timesteps = timestep.to(latents.device).expand(len(latents))
        velocity = engine.predict(latents, text, timesteps, condition).float()
        if empty is not None:
            unguided = engine.predict(latents, empty, timesteps, condition).float()
            velocity = unguided + guidance_scale * (velocity - unguided)
        if isinstance(scheduler, CogVideoXDDIMScheduler):
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        else:
            latents, previous_estimate = scheduler.step(
                velocity,
                previous_estimate,
                timestep,
                previous_timestep,
                latents,
                generator=generator,
                return_dict=False,
            )
        latents, previous_timestep = latents.float(), timestep
    return latents
