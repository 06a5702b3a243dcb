"""CogVideo's loss for stills and clips together."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from sat import mpu
from torch import Tensor, nn

from sat_ext.cogvideo.target import Target
from sat_ext.cogvideo.timesteps import StratifiedSampling
from sat_ext.cogvideox import OFS, SCALE_FACTOR
from sat_ext.config import convert, load
from sat_ext.errors import ConfigError
from sat_ext.models.conditioning import condition_latents, pad_condition, pad_front, padding_frames, stills
from sat_ext.models.config import ABSENT, LossWeights
from sat_ext.models.diffusion import mean_where
from sat_ext.ranks import rank_and_world

PARAMS = "model.loss_fn_config.params"


class JointDiffusionLoss(Target, nn.Module):
    """A target for `model.loss_fn_config`: the class `parent`, with losses by kind and safe for stills.

    Of a batch of clips that need no padding, without options and weights, the losses are the parent's bit for bit,
    and as many random numbers are drawn. Beyond that:

    - Stills train with `concat_images` zeroed, as their condition frame is their target.
    - `condition_dropout` is the probability that a sample trains without its condition, on top of CogVideo's
      `model.noised_image_dropout` of whole batches. Evaluations (the network not in training mode) drop none.
    - `loss_weights` are factors by kind, in training and evaluation. The batch's `loss_weight` (B,) is another in
      training, and its `timestep` (B,) goes to a `sigma_sampler_config` of `StratifiedSampling`.
    - Where the network's patches span several latent frames (2 in 1.5), copies of the first latent frame are put
      in front until the patches fit, as CogVideo's diffusers trainers do. The loss is a mean over the others.
    - `condition_latents` (B, 1, C, h, w), of a batch from a cache, replace `concat_images`.
    - `condition_scale` is the factor on the first stage's latent of the condition frame, by default
      `scale_factor`, which must equal the engine's `model.scale_factor`. A 1.5 model needs it (docs/cogvideo.md).
    - Samples whose `target` in the batch is "base" are trained on what the network predicts with its LoRA switched
      off, instead of `input`.
    - A network that embeds `ofs` (B,) is given it: 2.0, or the batch's own.

    Raises `ConfigError` for an option that is unknown, out of its range, or of no use (`condition_dropout` of a
    model without condition, at the first step)."""

    PARENT = "sgm.modules.diffusionmodules.loss.VideoDiffusionLoss"
    WHERE = PARAMS
    CALLS = ("get_loss",)
    batch2model_keys: set[str]
    sigma_sampler: Any

    def __init__(
        self, *, loss_weights: Mapping[str, float] | None = None, condition_dropout: float = 0.0,
        condition_scale: float | None = None, scale_factor: float = SCALE_FACTOR, **params: Any,
    ) -> None:  # fmt: skip
        if "sigma_sampler_config" in params:
            params["sigma_sampler_config"] = fitting_groups(params["sigma_sampler_config"])
        super().__init__(**params)
        self.condition_factor = condition_factor(condition_scale, scale_factor, PARAMS)
        self.kind_weights = load(LossWeights, loss_weights or {}, f"{PARAMS}.loss_weights")
        self.condition_dropout: float = convert(float, condition_dropout, f"{PARAMS}.condition_dropout")
        if not 0 <= self.condition_dropout <= 1:
            raise ConfigError(
                f"{PARAMS}.condition_dropout: {condition_dropout} is not a probability; use a value from 0 to 1."
            )
        self._padding = 0
        self._base: Callable[[Tensor], Tensor] | None = None  # puts the base's prediction into a target
        self._metrics = {"loss_image": torch.tensor(ABSENT), "loss_video": torch.tensor(ABSENT)}

    def __call__(
        self, network: nn.Module, denoiser: Callable[..., Tensor], conditioner: Callable[..., dict[str, Tensor]],
        input: Tensor, batch: Mapping[str, Any],
    ) -> Tensor:  # fmt: skip
        """The loss of each sample, (B,), of latents `input` (B, T, C, h, w)."""
        transformer = getattr(network, "diffusion_model", network)
        still, dropped, taught, factors = self._per_sample(batch, input, getattr(network, "training", True))
        batch, frames = dict(batch), input.shape[1]
        patch = getattr(transformer, "patch_size", 1)  # (frames, rows, columns) in 1.5, an integer in 1.0
        self._padding = padding_frames(frames, 1 if isinstance(patch, int) else int(patch[0]))
        if "condition_latents" in batch:  # from a cache, which has the first frame alone
            first = batch.pop("condition_latents").to(input)
            batch["concat_images"] = condition_latents(first, frames, torch.zeros_like(still))
        if "concat_images" in batch:
            images = scaled(batch["concat_images"], self.condition_factor)
            if (without := still | dropped).any():
                images = images.masked_fill(without.to(images.device)[:, None, None, None, None], 0)
            batch["concat_images"] = pad_condition(images, self._padding)
        elif self.condition_dropout:
            raise ConfigError(
                f"{PARAMS}.condition_dropout: {self.condition_dropout}, but the model has no image condition "
                "to drop (model.noised_image_input is not set); remove it."
            )
        if getattr(transformer, "ofs_embed_dim", None) is not None:
            batch.setdefault("ofs", torch.full((len(input),), OFS, device=input.device))
            self.batch2model_keys.add("ofs")
        if "timestep" in batch and isinstance(self.sigma_sampler, StratifiedSampling):
            self.sigma_sampler.places = batch["timestep"]
        latents, self._base = pad_front(input, self._padding), None
        if taught.any():
            denoiser = self._with_base(denoiser, taught.to(input.device))
        losses: Tensor = super().__call__(network, denoiser, conditioner, latents, batch)
        of_kinds = {"image": still & ~taught, "video": ~still & ~taught}
        if getattr(network, "training", True):  # in every step: SAT reduces metrics by name, on all ranks
            of_kinds["base"] = taught
        self._metrics = {f"loss_{k}": mean_where(losses.detach(), of.tolist()) for k, of in of_kinds.items()}
        return losses * factors.to(losses)

    def get_loss(self, model_output: Tensor, target: Tensor, w: Tensor) -> Tensor:
        """The parent's loss (B,) without the padding in front, which neither counts nor has a gradient."""
        if self._base is not None:
            target, self._base = self._base(target), None
        return super().get_loss(model_output[:, self._padding :], target[:, self._padding :], w)  # type: ignore[misc]

    def _with_base(self, denoiser: Callable[..., Tensor], taught: Tensor) -> Callable[..., Tensor]:
        """`denoiser`, that first notes what it makes of this noise without the LoRA: the target of `taught`."""

        def denoise(network: nn.Module, *inputs: Any, **more: Any) -> Tensor:
            with torch.no_grad(), lora_off(network):
                base = denoiser(network, *inputs, **more)
            where = taught.view(-1, *[1] * (base.ndim - 1))
            self._base = lambda target: torch.where(where, base, target)  # in the wider dtype of the two
            return denoiser(network, *inputs, **more)

        return denoise

    def metrics(self) -> dict[str, Tensor]:
        """Of the last call, `loss_image`, `loss_video` and in training `loss_base`: unweighted means, 0-dim, -100
        where there was none."""
        return self._metrics

    def _per_sample(
        self, batch: Mapping[str, Any], latents: Tensor, training: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each sample, (B,): whether it is a still, whether its condition is dropped, whether the base teaches
        it, and its loss's factor. All but the last are on the CPU, so that no GPU waits."""
        still = stills(kinds(batch, len(latents)), latents.shape[1])
        factors = torch.where(still, self.kind_weights.image, self.kind_weights.video).to(latents.device)
        if training and "loss_weight" in batch:
            factors = factors * batch["loss_weight"].to(latents.device)
        dropped, taught = torch.zeros_like(still), torch.zeros_like(still)
        if training and "target" in batch:
            taught = torch.tensor([target == "base" for target in batch["target"]])
        if training and self.condition_dropout:
            # SAT seeds all ranks alike: each takes a row of its own, or all would drop at once
            rank, world = rank_and_world()
            dropped = torch.rand(world, len(still))[rank] < self.condition_dropout
        if not mpu.model_parallel_is_initialized() or mpu.get_model_parallel_world_size() == 1:
            return still, dropped, taught, factors
        # Ranks that share a model must agree, as on the parent's noise, and only the first of them has `kind`,
        # `target` and `loss_weight`: `broad_cast_batch` in CogVideo's train_video.py sends none of them.
        values = torch.stack([v.to(factors) for v in (still, dropped, taught, factors)])
        source = dist.get_rank() - mpu.get_model_parallel_rank()
        dist.broadcast(values, src=source, group=mpu.get_model_parallel_group())
        return values[0].bool().cpu(), values[1].bool().cpu(), values[2].bool().cpu(), values[3]


@contextmanager
def lora_off(network: nn.Module) -> Iterator[None]:
    """Inside, SAT's `LoraLinear`s add nothing to what they adapt."""
    layers: list[Any] = [m for m in network.modules() if hasattr(m, "matrix_A") and hasattr(m, "scaling")]
    scales = [layer.scaling for layer in layers]
    for layer in layers:
        layer.scaling = 0.0  # SAT has no switch; the product is computed, and adds zero
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling = scale


def condition_factor(condition_scale: float | None, scale_factor: float, where: str) -> float:
    """The factor that brings the condition, which CogVideo's engine makes at `scale_factor`, to `condition_scale`.
    Raises `ConfigError` for a scale that is not above 0; `where` is the place in the YAML."""
    own = convert(float, scale_factor, f"{where}.scale_factor")
    asked = convert(float | None, condition_scale, f"{where}.condition_scale")
    for name, value in (("scale_factor", own), ("condition_scale", asked)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{where}.{name}: {value} is not a scale; give a number above 0.")
    return 1.0 if asked is None else float(asked / own)


def scaled(latents: Tensor, factor: float) -> Tensor:
    """`latents` times `factor`, computed in float32; unchanged where it is 1."""
    return latents if factor == 1.0 else (latents.float() * factor).to(latents)


def fitting_groups(sigma_sampler: Any) -> Any:
    """CogVideo's `sigma_sampler_config` with a `group_num` that divides the ranks, where its own does not.

    With `uniform_sampling` each group of ranks has an interval of noise levels. The tag v1.0 takes the largest
    number that divides ranks and levels (`DiscreteSampling` in sgm/modules/diffusionmodules/sigma_sampling.py);
    the main branch asserts that the YAML's number, 40 in 1.5, fits."""
    params = (sigma_sampler or {}).get("params") or {}
    if not params.get("uniform_sampling") or not params.get("group_num"):
        return sigma_sampler
    ranks = mpu.get_data_parallel_world_size()
    if ranks % params["group_num"] == 0:
        return sigma_sampler
    return {**sigma_sampler, "params": {**params, "group_num": math.gcd(ranks, params["num_idx"])}}


def kinds(batch: Mapping[str, Any], count: int) -> list[str]:
    """The kind of each sample. A data class other than ours has `num_frames` at most."""
    if "kind" in batch:
        return list(batch["kind"])
    if "num_frames" in batch:
        return ["image" if frames == 1 else "video" for frames in batch["num_frames"].tolist()]
    return ["video"] * count
