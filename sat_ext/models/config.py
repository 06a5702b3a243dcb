"""The `model:` section of the YAML, and what follows from its numbers. docs/memory.md weighs the levers.

Imports neither diffusers nor transformers, so that the data set and the command line can ask what a model accepts.
"""

import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from sat_ext.cogvideox import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    PATCH,
    SCALE_FACTOR_2B,
    TEMPORAL_COMPRESSION,
    TEXT_TOKENS,
    pixel_frames,
)
from sat_ext.errors import ConfigError
from sat_ext.types import Bucket

Quantization = Literal["none", "nf4", "fp8"]
# What `target_modules` may name in one word; see docs/weights.md for why "all-linear" stays within the blocks.
TARGETS = {"attention": ("to_q", "to_k", "to_v", "to_out.0"), "all-linear": ("attn1", "ff", "norm1", "norm2")}
ABSENT = -100.0  # SAT's mark for a metric that a rank has no value for; SAT averages the others


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Architecture of diffusers' `CogVideoXTransformer3DModel`; the defaults are CogVideoX-2B's.

    `sample_height` and `sample_width` are in latent pixels, `sample_frames` in pixel frames. The `in_channels` of
    an image-to-video model include the condition's."""

    num_layers: int = 30
    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = LATENT_CHANNELS
    out_channels: int = LATENT_CHANNELS
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    text_embed_dim: int = 4096
    max_text_seq_length: int = TEXT_TOKENS
    sample_height: int = 60
    sample_width: int = 90
    sample_frames: int = 49
    patch_size: int = PATCH
    patch_size_t: int | None = None
    patch_bias: bool = True
    spatial_interpolation_scale: float = 1.875
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Architecture of diffusers' `AutoencoderKLCogVideoX`; the defaults are CogVideoX-2B's."""

    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 3
    latent_channels: int = LATENT_CHANNELS
    norm_num_groups: int = 32
    scaling_factor: float = SCALE_FACTOR_2B
    invert_scale_latents: bool = False


@dataclass(frozen=True, kw_only=True)
class FirstStageConfig:
    """Pixels to latents: the video autoencoder, or the tiny models' cosine transform, which has no weights.

    `slicing`, `tiling` and `frames` are levers on the autoencoder's memory when it encodes. Without `slicing`
    diffusers fails from nine stills of 480x720 on. Tiles are of half the native height and width; they take a
    quarter of the memory for some 40 % more time. The published models saw latents of 8 `frames`, a multiple of 4.

    `condition_scale` multiplies the latents of the I2V condition frame, in training and in `sat-ext sample`. Null
    is as in diffusers' pipeline: `scaling_factor`, or its inverse if the folder's vae/config.json has
    `invert_scale_latents`."""

    kind: Literal["autoencoder", "cosine"] = "autoencoder"
    tiling: bool = False
    slicing: bool = True
    frames: int = 8
    condition_scale: float | None = None
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)

    def __post_init__(self) -> None:
        if self.frames < 4 or self.frames % TEMPORAL_COMPRESSION:
            near = max(1, round(self.frames / TEMPORAL_COMPRESSION)) * TEMPORAL_COMPRESSION
            raise ConfigError(f"model.first_stage.frames: {self.frames} is not a multiple of 4; use {near}.")
        if self.condition_scale is not None and (self.kind == "cosine" or not 0 < self.condition_scale < math.inf):
            raise ConfigError(
                f"model.first_stage.condition_scale: {self.condition_scale} is not a scale of an autoencoder's "
                "latents; use a number above 0, or null for that of diffusers' pipeline."
            )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Captions to embeddings: `t5` is a folder's encoder; `byt5` is a small random one over bytes, for
    models without a folder.

    `device: on_off` copies the encoder before the transformer's activations are there. `quantization` is of a `t5`
    that stays on the GPU, by bitsandbytes: of the linear layers except `wo`, which transformers leaves alone."""

    kind: Literal["t5", "byt5"] = "t5"
    device: Literal["gpu", "cpu", "on_off"] = "gpu"
    quantization: Literal["none", "int8", "nf4"] = "none"
    max_length: int | None = None  # tokens; null is the transformer's `max_text_seq_length`


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The noise schedule and the sampler. A pretrained folder's scheduler/ wins over them."""

    snr_shift_scale: float = 1.0
    sampler: Literal["ddim", "dpm"] = "ddim"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What trains. Rank, alpha and targets default to those of CogVideo's diffusers trainer
    (finetune/schemas/args.py). `quantization` applies to the frozen weights below a LoRA, in the blocks' linear
    layers: "fp8" takes 1 byte each, "nf4" 0.53, and bf16 2.

    `target_modules` is one of `TARGETS`, or names of layers or of what contains them, in every block alike.
    `rslora` scales by alpha / sqrt(rank) in place of alpha / rank, and `dora` also learns the norm of each row."""

    mode: Literal["full", "lora"] = "full"
    quantization: Quantization = "none"
    rank: int = 128
    alpha: int = 64
    target_modules: Literal["attention", "all-linear"] | tuple[str, ...] = "attention"
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if self.mode == "lora" and self.rank < 1:
            raise ConfigError(f"model.train.rank: {self.rank} leaves nothing to train; use 1 or more.")
        if self.mode == "lora" and not self.targets:
            raise ConfigError(
                f"model.train.target_modules: [] leaves nothing to train; write {' or '.join(TARGETS)}, or list "
                "layers."
            )

    @property
    def targets(self) -> tuple[str, ...]:
        """`target_modules` as names."""
        given = self.target_modules
        return TARGETS[given] if isinstance(given, str) else given


@dataclass(frozen=True, kw_only=True)
class GradientCheckpointing:
    """Keep a transformer block's input alone, and recompute the rest in the backward pass."""

    every: int = 1  # of so many blocks the first is recomputed
    offload: bool = False  # those inputs wait in page-locked CPU memory

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"model.gradient_checkpointing.every: {self.every}; give 1 (all blocks) or more.")


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Factors on the loss of the samples of each kind. The reported losses are without them."""

    image: float = 1.0
    video: float = 1.0

    def __post_init__(self) -> None:
        for kind in ("image", "video"):
            if getattr(self, kind) < 0:
                raise ConfigError(f"loss_weights.{kind}: {getattr(self, kind)} is below 0; 0 leaves the kind out.")
        if not self.image and not self.video:
            raise ConfigError("loss_weights: both are 0, so nothing would be learned; give one above 0.")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How samples are made, at an evaluation (`number` of each kind) and by `sat-ext sample`. Steps and guidance
    default to those of CogVideo's sampler (`num_steps`, DynamicCFG's `scale`, tag v1.0). With `motion`,
    evaluations also measure how much samples move, those of a LoRA beside its base's."""

    number: int = 0
    steps: int = 50
    guidance_scale: float = 6.0
    motion: bool = False

    def __post_init__(self) -> None:
        if self.motion and not self.number:
            raise ConfigError("model.sampling.motion: true, but number: 0 makes no samples; use 1 or more.")
        if self.motion and find_spec("cv2") is None:
            raise ConfigError("model.sampling.motion: true needs OpenCV; run pip install 'sat_ext[motion]'.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The YAML's `model:`.

    With `pretrained`, a local folder in diffusers' layout, the architecture is the folder's, and a
    `transformer:` section is what the folder is expected to hold. Dropout rates default to CogVideo's
    `ucg_rate` and `noised_image_dropout` (sat/configs/cogvideox_5b_i2v_lora.yaml at tag v1.0).

    `gradient_checkpointing` is true for every block, or `GradientCheckpointing`. `block_swap` is the number of
    blocks whose frozen weights wait in the CPU memory of each rank; all but two of them leave the GPU."""

    pretrained: str | None = None
    conditioning: Literal["none", "i2v"] = "none"
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    first_stage: FirstStageConfig = field(default_factory=FirstStageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss_weights: LossWeights = field(default_factory=LossWeights)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    caption_dropout: float = 0.1
    condition_dropout: float = 0.05
    gradient_checkpointing: bool | GradientCheckpointing = False
    block_swap: int = 0

    def __post_init__(self) -> None:
        for name in ("caption_dropout", "condition_dropout"):
            if not 0.0 <= (rate := getattr(self, name)) <= 1.0:
                raise ConfigError(f"model.{name}: {rate} is not a probability; use a value from 0 to 1.")
        if self.pretrained is None and self.text.kind == "t5":
            raise ConfigError("model.text.kind: t5 needs a folder; set model.pretrained, or kind: byt5.")

    @property
    def checkpointing(self) -> GradientCheckpointing | None:
        """Which blocks are recomputed in the backward pass; None if all keep what they need."""
        given = self.gradient_checkpointing
        return (GradientCheckpointing() if given else None) if isinstance(given, bool) else given

    @property
    def without_zero3(self) -> str | None:
        """The value that reaches for weights itself, as ZeRO-3 does too; None if there is none."""
        train = self.train
        values = {
            f"model.block_swap: {self.block_swap}": self.block_swap > 0,
            f"model.train.quantization: {train.quantization}": train.quantization != "none",
            "model.train.dora: true": train.mode == "lora" and train.dora,
        }
        return next((value for value, is_set in values.items() if is_set), None)

    @property
    def latent_channels(self) -> int:
        """Channels of one latent frame, without the condition's."""
        first = self.first_stage
        return LATENT_CHANNELS if first.kind == "cosine" else first.autoencoder.latent_channels

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent pixel, each way."""
        first = self.first_stage
        return LATENT_SIDE if first.kind == "cosine" else 2 ** (len(first.autoencoder.block_out_channels) - 1)

    @property
    def text_length(self) -> int:
        """Tokens per caption."""
        return self.text.max_length or self.transformer.max_text_seq_length

    @property
    def size_multiple(self) -> int:
        """Heights and widths, in pixels, must be multiples of this: one patch of the transformer.

        >>> ModelConfig(text=TextConfig(kind="byt5")).size_multiple
        16
        """
        return self.spatial_compression * self.transformer.patch_size


def check_bucket(config: ModelConfig, bucket: Bucket) -> None:
    """Raise `ConfigError` unless the model takes samples of this shape."""
    multiple = config.size_multiple
    for name, size in (("height", bucket.height), ("width", bucket.width)):
        if size < multiple or size % multiple:
            near = max(multiple, round(size / multiple) * multiple)
            raise ConfigError(
                f"bucket {bucket}: this model takes multiples of {multiple} pixels; "
                f"change the {name} {size} to {near}."
            )
    if bucket.frames < 1 or (bucket.frames - 1) % TEMPORAL_COMPRESSION:
        near = pixel_frames(max(0, round((bucket.frames - 1) / TEMPORAL_COMPRESSION)) + 1)
        raise ConfigError(f"bucket {bucket}: frames must be 1 or 4k+1; change {bucket.frames} to {near}.")
    transformer = config.transformer
    if transformer.use_learned_positional_embeddings and bucket.frames > transformer.sample_frames:
        raise ConfigError(
            f"bucket {bucket}: this model's position embedding was learned for {transformer.sample_frames} "
            f"frames at most; change {bucket.frames} to {transformer.sample_frames} or less."
        )
