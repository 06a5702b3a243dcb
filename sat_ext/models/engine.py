"""The built-in engine: what SAT trains. Batch in, loss and per-kind losses out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from sat_ext.config import plain
from sat_ext.errors import ConfigError
from sat_ext.latents.text import TextEmbeddings
from sat_ext.models.conditioning import (
    condition_latents,
    drop_mask,
    noisy_first_frames,
    pad_front,
    padding_frames,
    stills,
)
from sat_ext.models.config import ABSENT
from sat_ext.models.diffusion import (
    EVALUATED_TIMESTEPS,
    NoiseSchedule,
    diffusers_scheduler,
    mean_where,
    read_schedule,
    sample_seeds,
    stratified_timesteps,
    velocity_losses,
)
from sat_ext.models.first_stage import build_first_stage
from sat_ext.models.folder import check_zero, folder_config, load_model_config
from sat_ext.models.stopwatch import Stopwatch
from sat_ext.models.t5 import build_text
from sat_ext.models.transformer import adapters_off, build_transformer, predict_velocity
from sat_ext.pixels import to_model_range
from sat_ext.types import groups_of
from sat_ext.zero import zero_of


class VideoDiffusionEngine(nn.Module):
    """First stage, text encoder, transformer and noise schedule of a CogVideoX model.

    SAT's `get_model` constructs it. `args.model_config` is the YAML's `model:` section. If the run trains from a
    cache (`args.sat_ext.cache_folder`), no encoder is loaded. The state dict holds what the YAML cannot give back:
    never the first stage and the text encoder, and under LoRA not the base weights of a pretrained folder."""

    def __init__(self, args: Any, params_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        config = load_model_config(plain(args.model_config))
        if config.pretrained is not None:
            found = folder_config(config.pretrained, "scheduler", "scheduler_config.json")
            schedule = read_schedule(found, f"{config.pretrained}/scheduler/scheduler_config.json")
            config = replace(config, schedule=schedule)
        check_zero(config, int(zero_of(args).get("stage", 0)))
        self.config = config
        # not called "transformer": SAT would take it for one of its own when it saves
        self.network = build_transformer(config, params_dtype)
        cache = getattr(getattr(args, "sat_ext", None), "cache_folder", None)
        if cache is not None and config.sampling.number:
            raise ConfigError(
                f"model.sampling.number: {config.sampling.number} samples at an evaluation need the first stage, "
                "which a run from data.params.cache does not load; set it to 0, and use sat-ext sample."
            )
        self.first_stage: Any = build_first_stage(config, params_dtype) if cache is None else None
        self.text: Any = build_text(config, params_dtype) if cache is None else TextEmbeddings(Path(cache))
        self.schedule = NoiseSchedule(diffusers_scheduler(config.schedule).alphas_cumprod)
        self.encoding = Stopwatch()  # of captions and pixels in training
        self.disable_untrainable_params()
        self.register_state_dict_post_hook(_leave_out_fixed)
        self.register_load_state_dict_post_hook(_forgive_fixed)

    def disable_untrainable_params(self) -> None:
        """Mark what trains, under the name that SAT calls: the transformer, or under LoRA its adapters alone."""
        lora = self.config.train.mode == "lora"
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("network.") and (not lora or "lora_" in name))

    def is_fixed(self, name: str) -> bool:
        """Whether the YAML alone gives the weight of this name, so that checkpoints need not hold it."""
        if not name.startswith("network."):
            return True
        return self.config.pretrained is not None and self.config.train.mode == "lora" and "lora_" not in name

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and `loss_image` and `loss_video`: -100 if it has no such sample. Samples whose
        target is the base count in `loss_base` instead, which training batches with a `target` have.

        `batch` is a group of samples of one shape or, with the key `groups`, a pack of several groups. A group has
        mp4 (B, T, C, H, W), uint8 or in [-1, 1], and lists of B: txt, kind, source, key (the last two seed an
        evaluation); in training optionally `loss_weight` (B,), a factor on what its mean adds to the loss,
        `timestep` (B,), from 0 to 1, and `target`, a list of "data" or "base". In training the batch has `seed`,
        an int that differs between ranks, which every draw follows from, and may have `gradient_norms`: if true,
        the metrics include `gradient_image` and so on, the norms of what each kind adds to the gradient."""
        groups = groups_of(batch)
        if self.training:
            losses = self._training_losses(groups, batch["seed"])
        else:
            losses = [self._evaluation_losses(group) for group in groups]
        weighted = torch.cat([self._factors(g, of) * of / len(of) for g, of in zip(groups, losses, strict=True)])
        every, metrics = torch.cat(losses).detach(), {}
        kinds = [kind for group in groups for kind in (kinds_of(group) if self.training else group["kind"])]
        # by the key alone: SAT reduces metrics by name, so that ranks must not differ in what their samples give
        by_base = self.training and any("target" in group for group in groups)
        for kind in ("image", "video", "base") if by_base else ("image", "video"):
            chosen = [k == kind for k in kinds]
            metrics[f"loss_{kind}"] = mean_where(every, chosen)
            if batch.get("gradient_norms"):
                metrics[f"gradient_{kind}"] = self._gradient_norm(weighted, chosen)
        return weighted.sum(), metrics

    def _gradient_norm(self, losses: Tensor, chosen: list[bool]) -> Tensor:
        """The norm of the gradient of the sum of the chosen losses, 0-dim, or -100 without any."""
        if not any(chosen):
            return losses.new_tensor(ABSENT)
        trained = [p for p in self.parameters() if p.requires_grad]
        of_kind = losses[torch.tensor(chosen, device=losses.device)].sum()
        gradients = torch.autograd.grad(of_kind, trained, retain_graph=True, allow_unused=True)
        return torch.stack([g.float().norm() for g in gradients if g is not None]).norm()

    def _factors(self, group: Mapping[str, Any], losses: Tensor) -> Tensor:
        """What each sample's loss is multiplied by, (B,), before the mean over the group is added to the total."""
        weights = self.config.loss_weights
        factors = torch.tensor([getattr(weights, kind) for kind in group["kind"]], device=losses.device)
        if self.training and "loss_weight" in group:
            factors = factors * group["loss_weight"].to(losses.device)
        return factors

    def predict(self, noisy: Tensor, text: Tensor, timesteps: Tensor, condition: Tensor | None) -> Tensor:
        """The transformer's velocity for noisy latents (B, T, C, H, W); T divides by its temporal patch.

        `text` is (B, length, D), `timesteps` (B,), and `condition` is of the latents' shape, or None."""
        inputs = noisy if condition is None else torch.cat([noisy, condition.to(noisy.dtype)], dim=2)
        (velocity,) = predict_velocity(self.network, self.config, [(inputs, text, timesteps)])
        return velocity

    def _training_losses(self, groups: Sequence[Mapping[str, Any]], seed: int) -> list[Tensor]:
        """(B,) losses of each group, with one random noise level a sample, condition noise and dropout."""
        generator = Generator(self.network.device).manual_seed(int(seed))
        captions = [caption for group in groups for caption in group["txt"]]
        dropped = drop_mask(len(captions), self.config.caption_dropout, generator).tolist()
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        with self.encoding:
            texts = self.text.encode(captions, self.network.device, self.network.dtype)
        inputs, targets = [], []
        for group, text in zip(groups, texts.split([len(group["txt"]) for group in groups]), strict=True):
            with self.encoding:
                latents, condition, padding = self._inputs(group, generator)
            if (
                places := group.get("timestep")
            ) is None:  # a data set of the user's own does not place its samples
                places = torch.rand(len(latents), generator=generator, device=generator.device)
            (timesteps,) = stratified_timesteps(places.to(generator.device), 1)
            noise = torch.randn(latents.shape, generator=generator, device=latents.device)
            noisy = self.schedule.add_noise(latents, noise, timesteps)
            if condition is not None:
                noisy = torch.cat([noisy, condition.to(noisy.dtype)], dim=2)
            inputs.append((noisy, text, timesteps))
            targets.append((self.schedule.velocity(latents, noise, timesteps), padding))
        self._put_base(groups, inputs, [velocity for velocity, _ in targets])
        predictions = predict_velocity(self.network, self.config, inputs)
        return [velocity_losses(made, *target) for made, target in zip(predictions, targets, strict=True)]

    @torch.no_grad()
    def _put_base(
        self, groups: Sequence[Mapping[str, Any]], inputs: Sequence[tuple[Tensor, ...]], targets: Sequence[Tensor]
    ) -> None:
        """Replace the velocities of samples of the target "base", in place, by those without the adapters."""
        chosen = [[i for i, kind in enumerate(kinds_of(group)) if kind == "base"] for group in groups]
        taught = [number for number, own in enumerate(chosen) if own]
        if not taught:
            return
        with adapters_off(self.network):  # before the pass that keeps activations, so that the two do not add up
            parts = [tuple(value[chosen[n]] for value in inputs[n]) for n in taught]
            made = predict_velocity(self.network, self.config, parts)  # type: ignore[arg-type]
        for number, velocity in zip(taught, made, strict=True):
            targets[number][chosen[number]] = velocity.float()

    @torch.no_grad()
    def _evaluation_losses(self, batch: Mapping[str, Any]) -> Tensor:
        """(B,) losses, a function of each sample's source and key and of the weights alone.

        Each sample has `EVALUATED_TIMESTEPS` noise levels, one from each equal part of the range."""
        latents, condition, padding = self._inputs(batch, None)
        text = self.text.encode(batch["txt"], latents.device, self.network.dtype)
        generators = [Generator(latents.device).manual_seed(seed) for seed in sample_seeds(batch)]
        offsets = torch.cat([torch.rand(1, generator=g, device=g.device) for g in generators])
        losses = []
        for timesteps in stratified_timesteps(offsets, EVALUATED_TIMESTEPS):
            # a generator a sample, so that its draws do not depend on what else is in the batch
            noise = torch.stack([torch.randn(latents.shape[1:], generator=g, device=g.device) for g in generators])
            noisy = self.schedule.add_noise(latents, noise, timesteps)
            prediction = self.predict(noisy, text, timesteps, condition)
            velocity = self.schedule.velocity(latents, noise, timesteps)
            losses.append(velocity_losses(prediction, velocity, padding))
        return torch.stack(losses).mean(dim=0)

    def _inputs(self, batch: Mapping[str, Any], generator: Generator | None) -> tuple[Tensor, Tensor | None, int]:
        """Latents (B, t, C, h, w), the I2V condition of that shape or None, and 1.5's frames of padding.

        Without a generator nothing is drawn, and no condition is dropped but that of stills."""
        latents, first = self._latents(batch, generator)
        padding = padding_frames(latents.shape[1], self.config.transformer.patch_size_t)
        condition = None
        if first is not None:
            dropped = stills(batch["kind"], batch["mp4"].shape[1])
            if generator is not None:
                drawn = drop_mask(len(first), self.config.condition_dropout, generator)
                dropped = dropped.to(drawn.device) | drawn
            condition = condition_latents(first, latents.shape[1] + padding, dropped)
        return pad_front(latents, padding), condition, padding

    def _latents(self, batch: Mapping[str, Any], generator: Generator | None) -> tuple[Tensor, Tensor | None]:
        """Latents (B, t, C, h, w) and, of an image-to-video model, the first frames' (B, 1, C, h, w)."""
        device, dtype = self.network.device, self.network.dtype
        conditioned = self.config.conditioning == "i2v"
        given = batch["mp4"].to(device)  # uint8 crosses to the device four times faster than float32
        if self.first_stage is None:  # a batch from a cache brings latents
            first = batch["condition_latents"].to(device, dtype) if conditioned else None
            return given.to(dtype), first
        pixels = to_model_range(given, dtype)
        latents = self.first_stage.encode(pixels, generator)
        if not conditioned:
            return latents, None
        frames = pixels[:, :1] if generator is None else noisy_first_frames(pixels, generator)
        return latents, self.first_stage.encode_condition(frames, generator)


def kinds_of(group: Mapping[str, Any]) -> list[str]:
    """The kind of each sample, or "base" where that is its target."""
    targets = group.get("target") or group["kind"]
    return [t if t == "base" else kind for t, kind in zip(targets, group["kind"], strict=True)]


def _leave_out_fixed(engine: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in [n for n in state if n.startswith(prefix) and engine.is_fixed(n[len(prefix) :])]:
        del state[name]


def _forgive_fixed(engine: Any, keys: _IncompatibleKeys) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if not engine.is_fixed(name)]
