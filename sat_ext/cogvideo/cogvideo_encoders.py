"""CogVideo's own first stage and text encoder, as its YAML names them, for `sat-ext cache`; and their stand-in."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat_ext.cogvideo.network import CACHED_FIRST_STAGE, CACHED_TEXT, LOSS, read_network, target_of
from sat_ext.cogvideo.target import import_class
from sat_ext.cogvideox import LATENT_CHANNELS, LATENT_SIDE, TEXT_TOKENS
from sat_ext.errors import ConfigError
from sat_ext.latents.checksummed import files_fingerprint
from sat_ext.latents.encoders import Fingerprints, LatentShape, Part, loaded
from sat_ext.latents.store import fingerprint_of
from sat_ext.latents.text import encoder_fingerprint
from sat_ext.models.conditioning import noisy_first_frames
from sat_ext.pixels import to_model_range

OPTIONS = ("parent", "frames", "clips", "recompute", "cp_size")  # of the first stage's, that change no latent


class CachedFirstStage(nn.Module):
    """A target for `model.first_stage_config`: there is no first stage, and batches bring latents in `mp4`.

    The parameters of the class that it stands for may stay in `params`; only `sat-ext cache` needs them.
    """

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def encode(self, latents: Tensor) -> Tensor:
        """What it is given, (B, C, t, h, w). Raises `ConfigError` for pixels."""
        if latents.shape[1] == 3:
            raise ConfigError(
                f"model.first_stage_config.target: {CACHED_FIRST_STAGE} takes latents, and the batch brings "
                "pixels; set data.params.cache.folder, or remove the target."
            )
        return latents

    def decode(self, *_: Any, **__: Any) -> Tensor:
        """Raises `ConfigError`: there is no decoder."""
        raise ConfigError(
            f"model.first_stage_config.target: {CACHED_FIRST_STAGE} cannot decode samples; set "
            "args.eval_interval: null."
        )


class CogVideoEncoders:
    """`sat_ext.latents.encoders.Encoders` of CogVideo's `model` section; its code must be importable.

    Latents of clips are as the first stage gives them, which the engine scales. Conditions are at `scale_factor`,
    as the engine makes them; the fingerprint holds that scale, and `JointDiffusionLoss` brings them to its
    `condition_scale`, so that one cache serves every value of it.
    """

    def __init__(self, model: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        _require_encoder(model)
        self.dtype, self.device = dtype, device
        self.scale = float(model["scale_factor"])
        embedder = _embedder(model)
        self.sections = {
            "text": (embedder, "model.conditioner_config.params.emb_models"),
            "first_stage": (model["first_stage_config"], "model.first_stage_config"),
        }
        self.text: Any = None
        self.first_stage: Any = None
        params = embedder.get("params") or {}
        network = read_network(model)
        self.shape = LatentShape(
            channels=network.out_channels or LATENT_CHANNELS,
            side=LATENT_SIDE,
            item=dtype.itemsize,
            deviates=True,
            conditions=bool(model.get("noised_image_input")),
            text=(int(params.get("max_length", TEXT_TOKENS)), network.text_hidden_size or 4096),
        )

    def holding(self, part: Part) -> AbstractContextManager[None]:
        """See `Encoders`."""
        return loaded(self, part, lambda: _built(*self.sections[part]).to(self.device, self.dtype).eval())

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Encoders`."""
        mean, deviation = self._posterior(to_model_range(pixels.to(self.device), self.dtype))
        return mean.cpu(), deviation.cpu()

    @torch.no_grad()
    def condition(self, pixels: Tensor, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        """See `Encoders`. The noise is that of CogVideo's `add_noise_to_first_frame`."""
        frames = to_model_range(pixels[:, :1].to(self.device), self.dtype)
        noisy = []
        for _ in range(count):
            mean, deviation = self._posterior(noisy_first_frames(frames, generator))
            noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
            noisy.append((self.scale * (mean.float() + deviation.float() * noise)).to(self.dtype))
        return (self.scale * self._posterior(frames)[0]).cpu(), torch.stack(noisy, dim=1).cpu()

    @torch.no_grad()
    def embed(self, captions: list[str]) -> Tensor:
        """See `Encoders`."""
        embedded: Tensor = self.text(captions)
        return embedded.to(self.dtype)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (B, t, C, h, w), as `DiagonalGaussianDistribution` of sgm reads them."""
        given = self.first_stage.encode(pixels.transpose(1, 2).contiguous(), unregularized=True)
        moments = given[0] if isinstance(given, tuple) else given
        mean, log_variance = moments.transpose(1, 2).chunk(2, dim=2)
        return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))


def fingerprints(model: Mapping[str, Any], dtype: torch.dtype) -> Fingerprints:
    """Of CogVideo's `model` section, without loading a weight."""
    config = model["first_stage_config"]
    params = {k: v for k, v in (config.get("params") or {}).items() if k not in OPTIONS}
    checkpoint = params.pop("ckpt_path", None)
    weights = files_fingerprint(Path(checkpoint)) if checkpoint else "random"
    name = str(dtype).removeprefix("torch.")
    architecture = {k: params[k] for k in ("encoder_config", "regularizer_config") if k in params}
    stage = fingerprint_of("cogvideo", weights, architecture, model.get("scale_factor"), name)
    text = _embedder(model).get("params") or {}
    length = text.get("max_length")
    found = encoder_fingerprint(text.get("model_dir"), None if length is None else int(length), dtype)
    return Fingerprints(first_stage=stage, text=found)


def check_cache(args: argparse.Namespace, model: Mapping[str, Any], *, is_cached: bool) -> None:
    """Raise `ConfigError` where the section and the arguments do not go with a cache, or with training without."""
    first_stage = target_of(model.get("first_stage_config"))
    if not is_cached:
        if first_stage == CACHED_FIRST_STAGE:
            raise ConfigError(
                f"model.first_stage_config.target: {CACHED_FIRST_STAGE} takes latents; set "
                "data.params.cache.folder to what sat-ext cache wrote."
            )
        return
    if first_stage != CACHED_FIRST_STAGE:
        raise ConfigError(
            f"data.params.cache: CogVideo's engine takes latents through model.first_stage_config.target: "
            f"{CACHED_FIRST_STAGE}, and the YAML has {first_stage}; append configs/cogvideo/cached.yaml."
        )
    loss = target_of(model.get("loss_fn_config"))
    if read_network(model).is_conditioned and loss != LOSS:
        raise ConfigError(
            f"data.params.cache: the cached condition goes through model.loss_fn_config.target: {LOSS}, and the "
            f"YAML has {loss}; append configs/cogvideo/joint.yaml."
        )
    if args.model_parallel_size > 1:
        raise ConfigError(
            "data.params.cache: CogVideo's script does not hand cached conditions to ranks that share a model; "
            "set args.model_parallel_size: 1."
        )
    if args.eval_interval:
        raise ConfigError(
            f"args.eval_interval: {args.eval_interval}, but CogVideo's evaluations decode samples, and a run from "
            "data.params.cache has no first stage; set it to null."
        )


def _embedder(model: Mapping[str, Any]) -> Mapping[str, Any]:
    embedders = model["conditioner_config"]["params"]["emb_models"]
    found: Mapping[str, Any] = embedders[0]
    return found


def _require_encoder(model: Mapping[str, Any]) -> None:
    targets = (model["first_stage_config"].get("target"), _embedder(model).get("target"))
    if CACHED_FIRST_STAGE in targets or CACHED_TEXT in targets:
        raise ConfigError(
            "model: the YAML files train from a cache, and to write one the encoders are needed; leave "
            "configs/cogvideo/cached.yaml out, and name the folder with -o."
        )


def _built(config: Mapping[str, Any], where: str) -> Any:
    return import_class(str(config["target"]), f"{where}.target")(**(config.get("params") or {}))
