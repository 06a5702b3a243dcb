"""Sampling: captions, and for I2V a first frame, to pixels; from an engine, or from a run's folder."""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat_ext.checkpoint.layout import CONFIG_NAME, find_weights, read_run_config
from sat_ext.checkpoint.reading import read_weights, under_adapters
from sat_ext.cogvideox import latent_frames
from sat_ext.contact_sheet import SheetRow
from sat_ext.errors import ConfigError
from sat_ext.models.conditioning import condition_latents, padding_frames
from sat_ext.models.config import check_bucket
from sat_ext.models.diffusion import diffusers_scheduler
from sat_ext.models.engine import VideoDiffusionEngine
from sat_ext.pixels import to_model_range, to_uint8
from sat_ext.types import Bucket


def load_engine(run: Path, *, ema: bool = False) -> tuple[VideoDiffusionEngine, int]:
    """The engine of a run's newest checkpoint, in evaluation mode, and its iteration; `ema`: of averaged weights.
    Raises `ConfigError`."""
    engine = build_engine(read_run_config(run))
    return engine, load_weights(engine, run, ema=ema)


def build_engine(config: Mapping[str, Any]) -> VideoDiffusionEngine:
    """The engine of a run's YAML, with its folder's weights or random ones, in evaluation mode."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = bool(config.get("deepspeed", {}).get("bf16", {}).get("enabled"))
    dtype = torch.bfloat16 if bf16 and device == "cuda" else torch.float32
    return VideoDiffusionEngine(Namespace(model_config=config["model"]), params_dtype=dtype).to(device).eval()


def load_weights(engine: VideoDiffusionEngine, run: Path, *, ema: bool = False) -> int:
    """Put the weights of a run's newest checkpoint into its engine; its iteration. Raises `ConfigError`."""
    weights, iteration = read_weights(run, ema=ema)
    weights = under_adapters(weights, {name for name, _ in engine.named_parameters()})
    missing, unexpected = engine.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ConfigError(
            f"{find_weights(run)}: {len(missing)} weights of the model in {CONFIG_NAME} are missing and "
            f"{len(unexpected)} belong to another; first: {(missing or unexpected)[0]}."
        )
    return iteration


@torch.no_grad()
def generate(engine: VideoDiffusionEngine, captions: Sequence[str], **options: Any) -> Tensor:
    """Pixels (B, T, C, H, W) in [-1, 1], float32, for B captions, with the options of `generate_latents`."""
    # one after another, and decoded so: samples at an evaluation then take no more memory than training does
    made = generate_latents(engine, captions, **options)
    return torch.cat([engine.first_stage.decode(latents).float() for latents in made])


@torch.no_grad()
def generate_latents(
    engine: VideoDiffusionEngine, captions: Sequence[str], *, frames: int, height: int, width: int,
    first_frames: Tensor | None = None, steps: int | None = None, guidance_scale: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Latents (1, T, C, h, w), float32, of each caption in turn. `frames`, `height` and `width` are in pixels.

    `first_frames`, (B, C, H, W) in [-1, 1], is what an I2V model animates; without it the condition is zero,
    as in training's condition dropout. Guidance pushes away from the empty caption; a `guidance_scale` of 1
    or less turns it off, and then each step costs half. It and `steps` default to those of `model.sampling`.
    Raises `ConfigError` for a shape that the model does not take, and for a first frame that it cannot use."""
    config = engine.config
    check_bucket(config, Bucket(frames=frames, height=height, width=width))
    if first_frames is not None and config.conditioning != "i2v":
        raise ConfigError("sample: a first frame was given, but this model is text-to-video; leave it out.")
    if first_frames is not None and frames == 1:  # the answer would be the condition
        raise ConfigError("sample: a first frame was given, but frames is 1; ask for 5 frames or more.")
    steps = config.sampling.steps if steps is None else steps
    guidance_scale = config.sampling.guidance_scale if guidance_scale is None else guidance_scale
    device, dtype = engine.network.device, engine.network.dtype
    padding = padding_frames(latent_frames(frames), config.transformer.patch_size_t)
    size = (height // config.spatial_compression, width // config.spatial_compression)
    shape = (len(captions), padding + latent_frames(frames), config.latent_channels, *size)
    source = device if generator is None else generator.device
    noise = torch.randn(shape, generator=generator, device=source).to(device)
    texts = engine.text.encode([*captions, ""], device, dtype)
    empty = texts[-1:] if guidance_scale > 1.0 else None

    def denoise(latents: Tensor, text: Tensor, condition: Tensor | None) -> Tensor:
        """Pure noise to clean latents, in float32, both (B, T, C, H, W) with any padding."""
        scheduler = diffusers_scheduler(config.schedule)
        scheduler.set_timesteps(steps)
        estimate, previous = None, None  # of the step before
        for timestep in scheduler.timesteps:
            timesteps = timestep.to(latents.device).expand(len(latents))
            velocity = engine.predict(latents, text, timesteps, condition).float()
            if empty is not None:  # two passes, not a batch of two, which would take twice the memory
                unguided = engine.predict(latents, empty, timesteps, condition).float()
                velocity = unguided + guidance_scale * (velocity - unguided)
            if config.schedule.sampler == "ddim":
                latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            else:
                latents, estimate = scheduler.step(
                    velocity, estimate, timestep, previous, latents, generator=generator, return_dict=False
                )
            latents, previous = latents.float(), timestep
        return latents

    for i in range(len(captions)):
        condition = None
        if config.conditioning == "i2v":
            condition = torch.zeros_like(noise[:1])
            if first_frames is not None:
                first = engine.first_stage.encode_condition(first_frames[i : i + 1, None].to(device, dtype))
                condition = condition_latents(first, shape[1], torch.zeros(1, dtype=torch.bool))
        yield denoise(noise[i : i + 1], texts[i : i + 1], condition)[:, padding:]


def sample_rows(
    engine: VideoDiffusionEngine, batch: dict[str, Any], *, frames: int | None = None, **options: Any
) -> list[SheetRow]:
    """One row a sample: what the engine makes of its caption with `generate`'s options, and the sample itself.

    `batch` holds `mp4` (B, T, C, H, W), uint8 or in [-1, 1], and `txt`; `frames` is T unless given. An
    image-to-video engine gets the first frame of what becomes a clip; for a still it gets the caption alone, since
    the first frame would be the answer."""
    real = batch["mp4"]
    frames = frames or real.shape[1]
    size = {"frames": frames, "height": real.shape[3], "width": real.shape[4]}
    shows_first = engine.config.conditioning == "i2v" and frames > 1
    first = to_model_range(real[:, 0], torch.float32) if shows_first else None
    made = generate(engine, batch["txt"], **size, first_frames=first, **options)
    return [
        SheetRow(caption=caption, strips={"generated": to_uint8(m), "held out": to_uint8(r)})
        for caption, m, r in zip(batch["txt"], made, real)
    ]
