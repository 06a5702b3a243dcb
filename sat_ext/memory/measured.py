"""What a micro-batch takes, measured on the real modules at their real sizes, on tensors without memory.

The modules are diffusers' transformer and autoencoder and transformers' T5 with our levers. CogVideo's engine is
measured on them too, as its modules have the same widths and blocks. Workspaces that cuDNN takes for a convolution
are not counted."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sat_ext.cogvideo.network import PRETRAINED
from sat_ext.cogvideox import LATENT_SIDE, latent_frames
from sat_ext.errors import ConfigError
from sat_ext.memory.counts import empty_first_stage, empty_network, empty_t5, t5_shape
from sat_ext.memory.meter import metering, metering_meta
from sat_ext.memory.results import remembered
from sat_ext.memory.run import Run
from sat_ext.models.config import FirstStageConfig, ModelConfig, TextConfig
from sat_ext.types import Bucket

DTYPES = {2: torch.bfloat16, 4: torch.float32}  # by the bytes of a number; fp16 takes what bf16 does
BLOCKS = 2  # of the transformer that is measured: all others take what its last one does
TOKENS = 3  # dimensions (B, N, D) of hidden states


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Bytes beside the weights, for one micro-step of a transformer of one block.

    `peak` is the peak of the backward pass without the gradients of weights; each further block holds `saved`
    until its turn. `at_end` is the peak after the last block's turn, to which all gradients add if they are kept.
    `inputs` are the hidden states, of video and text, that enter a block."""

    peak: int
    at_end: int
    saved: int
    inputs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of a micro-batch under the checkpointing of the YAML.

    `on_gpu` and `at_end` are the peaks of `TrainingStep` for all blocks. `on_host` are the inputs of blocks that
    wait in CPU memory, an entry each."""

    on_gpu: int
    at_end: int
    on_host: tuple[int, ...] = ()


def measurements(run: Run) -> list[Callable[[], object]]:
    """What a plan of `run` measures, one after the other, for a progress bar."""
    return [partial(m, run, b) for m in (training_step, encoding, decoding, embedding) for b in run.steps]


def activations(run: Run, bucket: Bucket) -> Activations:
    """The transformer's part of a training step of `bucket`."""
    step, layers = training_step(run, bucket), run.model.transformer.num_layers
    checkpointing = run.model.checkpointing
    if checkpointing is None:
        return Activations(on_gpu=step.peak + (layers - 1) * step.saved, at_end=step.at_end)
    recomputed = -(-layers // checkpointing.every)
    # the backward pass starts at the last block, while the inputs of all others still wait; `step.peak` has the
    # last block, whether it is recomputed or kept
    last_is_kept = (layers - 1) % checkpointing.every > 0
    kept, waiting = layers - recomputed - last_is_kept, recomputed - (not last_is_kept)
    if checkpointing.offload:  # the inputs of one block are on their way back
        waiting = min(waiting, 1)
    return Activations(
        on_gpu=step.peak + waiting * sum(step.inputs) + kept * step.saved,
        at_end=step.at_end,
        on_host=step.inputs * recomputed if checkpointing.offload else (),
    )


def training_step(run: Run, bucket: Bucket) -> TrainingStep:
    """The largest micro-step with `bucket`, from latents on, with no block recomputed."""
    config = ModelConfig(  # nothing that has no effect on it, so that other levers do not make it measure again
        transformer=replace(run.model.transformer, num_layers=BLOCKS),
        train=run.model.train,
        text=TextConfig(kind="byt5", max_length=run.model.text_length),
    )
    return _training_step(config, run.itemsize, tuple(run.steps[bucket].items()))


@remembered
def _training_step(config: ModelConfig, itemsize: int, groups: tuple[tuple[Bucket, int], ...]) -> TrainingStep:
    dtype = DTYPES[itemsize]
    network = empty_network(config, dtype).train()
    nn.Module.to(network, dtype)  # as SAT casts the model; diffusers' own method warns
    held: list[int] = []  # before and after the last block's forward pass
    inputs: list[int] = []
    peaks: list[int] = []

    with metering(network) as meter:

        def enter(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            states = [t for t in (*given, *named.values()) if isinstance(t, Tensor) and t.ndim == TOKENS]
            inputs.extend(t.nbytes for t in states)
            held.append(meter.now)
            if states[0].requires_grad:  # not where nothing trains before the block
                states[0].register_hook(leave)

        def leave(_: Tensor) -> None:  # the backward pass has left the last block
            peaks.append(meter.least_peak)
            meter.mark()

        def set_aside(parameter: Tensor) -> None:
            assert parameter.grad is not None
            meter.aside += parameter.grad.nbytes

        last = network.transformer_blocks[-1]
        last.register_forward_pre_hook(enter, with_kwargs=True)
        last.register_forward_hook(lambda *_: held.append(meter.now))
        # how long gradients stay depends on ZeRO's stage, so they are counted in `states.py`
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(set_aside)
        before = meter.mark()
        _loss(network, config, groups, dtype).backward()
        saved = held[1] - held[0]
        return TrainingStep(
            peak=max([*peaks, meter.least_peak]) - before - (BLOCKS - 1) * saved,
            at_end=meter.peak - before - meter.aside,
            saved=saved,
            inputs=tuple(inputs),
        )


def _loss(network: Any, config: ModelConfig, groups: tuple[tuple[Bucket, int], ...], dtype: torch.dtype) -> Tensor:
    """The engine's loss, from latents on."""
    from sat_ext.models.conditioning import padding_frames
    from sat_ext.models.diffusion import NoiseSchedule, velocity_losses
    from sat_ext.models.transformer import predict_velocity

    transformer, schedule = config.transformer, NoiseSchedule(torch.empty(1000))
    inputs, targets = [], []
    for bucket, samples in groups:
        frames = latent_frames(bucket.frames)
        frames += padding_frames(frames, transformer.patch_size_t)
        height, width = bucket.height // LATENT_SIDE, bucket.width // LATENT_SIDE
        latents = torch.empty(samples, frames, transformer.out_channels, height, width, dtype=dtype)
        noise = torch.empty(latents.shape)
        timesteps = torch.zeros(samples, dtype=torch.long)
        noisy = schedule.add_noise(latents, noise, timesteps)
        if transformer.in_channels > transformer.out_channels:  # image-to-video
            noisy = torch.cat([noisy, torch.empty_like(latents).float()], dim=2)
        text = torch.empty(samples, config.text_length, transformer.text_embed_dim, dtype=dtype)
        inputs.append((noisy, text, timesteps))
        targets.append(schedule.velocity(latents, noise, timesteps))
    predictions = predict_velocity(network, config, inputs)
    losses = [velocity_losses(made, target).mean() for made, target in zip(predictions, targets, strict=True)]
    return torch.stack(losses).sum()


def encoding(run: Run, bucket: Bucket) -> int:
    """Bytes beside all weights while the pixels of a micro-batch become latents, pixels included."""
    first, samples = run.model.first_stage, run.steps[bucket][bucket]
    if run.cached:
        return 0
    pixels = samples * bucket.frames * 3 * bucket.height * bucket.width
    given = pixels * (1 + run.itemsize)  # as they come (uint8), and in the training dtype
    together = 1 if first.slicing and first.kind == "autoencoder" else samples
    whole = 0
    if run.whole_clips:  # CogVideo's own encoder has no chunks
        first = replace(first, frames=max(4, bucket.frames - bucket.frames % 4))
    elif run.model.pretrained == PRETRAINED and run.recompute == "block":
        # ChunkedFirstStage, whose code is not on every machine, holds an activation of the clip at full resolution
        whole = first.autoencoder.block_out_channels[0] * together * bucket.frames * bucket.height * bucket.width
    return given + _encoding(first, run.itemsize, bucket, together) + whole * run.itemsize


@remembered
def _encoding(first: FirstStageConfig, itemsize: int, bucket: Bucket, samples: int) -> int:
    with metering_meta() as meter:
        stage = empty_first_stage(first, DTYPES[itemsize])
        height, width = _tile(stage, bucket, tiled=first.tiling)
        pixels = torch.empty(samples, bucket.frames, 3, height, width, dtype=DTYPES[itemsize])
        before = meter.mark()
        try:
            stage.encode(pixels)
        except RuntimeError as error:  # diffusers splits large convolutions in time, even below the kernel
            raise ConfigError(
                f"model.first_stage: the autoencoder cannot encode {samples} samples of {bucket} at once; set "
                "slicing: true (of CogVideo's engine, model.en_and_decode_n_samples_a_time: 1)."
            ) from error
        return meter.peak - before


def decoding(run: Run, bucket: Bucket) -> int:
    """Bytes beside all weights while one sample's latents become pixels; 0 if the run makes no samples."""
    if not run.model.sampling.number:
        return 0
    pixels = bucket.frames * 3 * bucket.height * bucket.width
    return pixels * run.itemsize + _decoding(run.model.first_stage, run.itemsize, bucket)


@remembered
def _decoding(first: FirstStageConfig, itemsize: int, bucket: Bucket) -> int:
    channels = ModelConfig(first_stage=first, text=TextConfig(kind="byt5")).latent_channels
    with metering_meta() as meter:
        stage = empty_first_stage(first, DTYPES[itemsize])
        height, width = _tile(stage, bucket, tiled=True)
        shape = latent_frames(bucket.frames), channels, height // LATENT_SIDE, width // LATENT_SIDE
        latents = torch.empty(1, *shape, dtype=DTYPES[itemsize])
        before = meter.mark()
        stage.decode(latents)
        return meter.peak - before


def _tile(stage: Any, bucket: Bucket, *, tiled: bool) -> tuple[int, int]:
    """Height and width that the first stage works on at a time; every tile takes as much as the first."""
    if not tiled or not hasattr(stage, "vae"):
        return bucket.height, bucket.width
    return min(bucket.height, stage.vae.tile_sample_min_height), min(bucket.width, stage.vae.tile_sample_min_width)


def embedding(run: Run, bucket: Bucket) -> int:
    """Bytes beside the weights while captions become embeddings, on the GPU."""
    if run.cached_text or run.model.text.device == "cpu":
        return 0
    return _embedding(t5_shape(run.model), run.itemsize, run.model.text_length, sum(run.steps[bucket].values()))


@remembered
def _embedding(shape: dict[str, Any] | int, itemsize: int, length: int, samples: int) -> int:
    # without gradients a layer holds nothing after its turn, so two of them take what all do
    encoder = empty_t5(shape, num_layers=2).to(DTYPES[itemsize])
    with metering(encoder) as meter, torch.no_grad():
        before = meter.mark()
        encoder(torch.zeros(samples, length, dtype=torch.long))
        return meter.peak - before
