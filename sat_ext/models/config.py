"""The `model:` section of the YAML, and the checks on it that need no weights.

Imports neither diffusers nor transformers, so that the data set and the command line can ask
what a model accepts without loading one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from sat_ext.cogvideox import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    PATCH,
    SCALE_FACTOR_2B,
    TEMPORAL_COMPRESSION,
    TEXT_TOKENS,
    pixel_frames,
)
from sat_ext.config import load
from sat_ext.errors import ConfigError
from sat_ext.models.levers import GradientCheckpointing, Quantization, check_levers
from sat_ext.types import Bucket

ABSENT = -100.0  # SAT's mark for a metric that a rank has no value of; SAT averages the others


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Architecture of diffusers' `CogVideoXTransformer3DModel`; the defaults are CogVideoX-2B's.

    Sizes `sample_height` and `sample_width` are in latent pixels, `sample_frames` in pixel frames.
    `in_channels` counts the condition's channels too where the model is image-to-video.
    """

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

    Levers on the autoencoder's memory, in the order in which to pull them:
    - `slicing`: encode one sample at a time, which is the default: batches take as many times the memory, and fail
      in diffusers from nine stills of 480x720 on.
    - `tiling`: encode in overlapping tiles of half the native height and width, which are blended; a quarter of
      the memory, for some 40 % more time. Latents differ a little from those of the whole frame.
    - `frames`: pixel frames that are encoded at a time, a multiple of 4. The published models saw latents of 8,
      which other values differ from.
    Samples are always decoded one at a time and in tiles.

    `condition_scale` multiplies the latents of the I2V condition frame, in training and in `sat-ext sample`. Null
    does as diffusers' pipeline: `scaling_factor`, or its inverse where the folder's vae/config.json says
    `invert_scale_latents`.
    """

    kind: Literal["autoencoder", "cosine"] = "autoencoder"
    tiling: bool = False
    slicing: bool = True
    frames: int = 8
    condition_scale: float | None = None
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)

    def __post_init__(self) -> None:
        if self.frames < 4 or self.frames % TEMPORAL_COMPRESSION:
            near = max(1, round(self.frames / TEMPORAL_COMPRESSION)) * TEMPORAL_COMPRESSION
            raise ConfigError(f"model.first_stage.frames: {self.frames} is no multiple of 4; write {near}.")
        if self.condition_scale is not None and (self.kind == "cosine" or not 0 < self.condition_scale < math.inf):
            raise ConfigError(
                f"model.first_stage.condition_scale: {self.condition_scale} is not a scale of an autoencoder's "
                "latents; give a number above 0, or null for the one of diffusers' pipeline."
            )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Captions to embeddings: `t5` is a folder's encoder; `byt5` is a small random one over bytes, for
    models without a folder.

    - `device`: "cpu" encodes on the CPU, which takes seconds a caption for a T5-XXL. "on_off" copies the encoder
      to the GPU for each call, before the transformer's activations are there; the copy is of 9.5 GB in bf16. Both
      keep it in the CPU memory of each rank.
    - `quantization` of a `t5` that stays on the GPU, by bitsandbytes: "int8" and "nf4" take 1 and 0.56 bytes a
      weight of the linear layers, but for `wo`, which transformers keeps as it is: 5.9 and 4.3 GB of a T5-XXL. The
      embeddings differ a little from those that the model was trained on.

    With cached embeddings (`sat-ext cache`) no step needs the encoder.
    """

    kind: Literal["t5", "byt5"] = "t5"
    device: Literal["gpu", "cpu", "on_off"] = "gpu"
    quantization: Literal["none", "int8", "nf4"] = "none"
    max_length: int | None = None  # tokens; null is the transformer's `max_text_seq_length`


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The noise schedule; see `sat_ext.models.diffusion`. A pretrained folder's scheduler/ wins over it."""

    snr_shift_scale: float = 1.0
    sampler: Literal["ddim", "dpm"] = "ddim"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What trains. Rank, alpha and targets default to those of CogVideo's diffusers trainer
    (finetune/schemas/args.py).

    `quantization` is of the frozen weights below a LoRA, those of the linear layers in the blocks: "fp8" takes 1
    byte each, with an error of some 3 % of a weight, "nf4" 0.53 bytes with some 9 %; bf16 takes 2. Each use makes
    them whole again, which takes time.
    """

    mode: Literal["full", "lora"] = "full"
    quantization: Quantization = "none"
    rank: int = 128
    alpha: int = 64
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Factors on the loss of the samples of each kind. The reported losses are without them."""

    image: float = 1.0
    video: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How samples are made, in an evaluation (`number` of each kind, 0 for none) and by `sat-ext sample`. Steps
    and guidance default to those of CogVideo's sampler (`num_steps`, DynamicCFG's `scale`, tag v1.0)."""

    number: int = 0
    steps: int = 50
    guidance_scale: float = 6.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The YAML's `model:`.

    With `pretrained`, a local folder in diffusers' layout, the architecture is the folder's, and a
    `transformer:` section is what the folder is expected to hold. Dropout rates default to CogVideo's
    `ucg_rate` and `noised_image_dropout` (sat/configs/cogvideox_5b_i2v_lora.yaml at tag v1.0).

    `gradient_checkpointing` is true for every block, or `GradientCheckpointing`. `block_swap` is how many blocks'
    frozen weights wait in page-locked CPU memory (that of each rank), fetched while the block before computes: all
    but two of them leave the GPU. It costs no time as long as a block computes longer than its weights take over
    PCIe (5B: 264 MB of bf16, some 10 ms), which small stills do not.
    """

    pretrained: str | None = None
    conditioning: Literal["none", "i2v"] = "none"
    transformer: TransformerConfig | None = None
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
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"model.{name}: {getattr(self, name)} is not a share; use 0.0 to 1.0.")
        if self.pretrained is None and self.text.kind == "t5":
            raise ConfigError("model.text.kind: t5 needs a folder; set model.pretrained, or kind: byt5.")


def load_model_config(mapping: Mapping[str, Any], where: str = "model") -> ModelConfig:
    """The `model:` mapping as a `ModelConfig` whose `transformer` is complete and agrees with the folder.

    Raises `ConfigError` for unknown keys, for a folder that is missing or incomplete, for a folder that holds
    another architecture than the YAML says, and for channel counts that do not fit together.
    """
    config = load(ModelConfig, mapping, where)
    if config.pretrained is not None:
        config = _with_folder(config, where)
    elif config.transformer is None:
        config = replace(config, transformer=TransformerConfig())
    _check_channels(config, where)
    check_levers(config, transformer_of(config).num_layers)
    return config


def folder_config(pretrained: str, subfolder: str, name: str = "config.json") -> dict[str, Any]:
    """`<pretrained>/<subfolder>/<name>` as a dict; `ConfigError` where the folder or the file is missing."""
    root = Path(pretrained)
    if not root.is_dir():
        raise ConfigError(f"model.pretrained: no folder {pretrained}; give the path of a diffusers model.")
    file = root / subfolder / name
    if not file.is_file():
        raise ConfigError(
            f"model.pretrained: {pretrained} has no {subfolder}/{name}; "
            "a diffusers model has transformer/, vae/, text_encoder/, tokenizer/ and scheduler/."
        )
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return loaded


def _with_folder(config: ModelConfig, where: str) -> ModelConfig:
    assert config.pretrained is not None
    if config.first_stage.kind != "autoencoder" or config.text.kind != "t5":
        raise ConfigError(
            f"{where}.pretrained: the folder brings an autoencoder and a T5 encoder, but the YAML asks for "
            f"first_stage.kind '{config.first_stage.kind}' and text.kind '{config.text.kind}'; remove these."
        )
    found = _architecture(TransformerConfig, folder_config(config.pretrained, "transformer"))
    if config.transformer is not None:
        for key, expected in asdict(config.transformer).items():
            if not key.startswith("sample_") and getattr(found, key) != expected:
                raise ConfigError(
                    f"{where}.pretrained: {config.pretrained} has {key} {getattr(found, key)}, but "
                    f"{where}.transformer.{key} is {expected}; use the YAML of the model in that folder."
                )
    autoencoder = _architecture(AutoencoderConfig, folder_config(config.pretrained, "vae"))
    return replace(config, transformer=found, first_stage=replace(config.first_stage, autoencoder=autoencoder))


def _architecture(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """The dataclass `cls` of those of `values` (a config.json) that it has fields for."""
    kept = {f.name: values[f.name] for f in fields(cls) if f.name in values}
    return load(cls, kept, "config.json")


def _check_channels(config: ModelConfig, where: str) -> None:
    transformer = transformer_of(config)
    latent = latent_channels(config)
    expected = latent * (2 if config.conditioning == "i2v" else 1)
    if (transformer.in_channels, transformer.out_channels) != (expected, latent):
        raise ConfigError(
            f"{where}.transformer: in_channels {transformer.in_channels} and out_channels "
            f"{transformer.out_channels} do not fit conditioning '{config.conditioning}' with {latent} "
            f"latent channels; it takes {expected} and {latent}."
        )


def transformer_of(config: ModelConfig) -> TransformerConfig:
    """The transformer's architecture. `config` must come from `load_model_config`."""
    assert config.transformer is not None, "use load_model_config"
    return config.transformer


def latent_channels(config: ModelConfig) -> int:
    """Channels of one latent frame, without the condition's."""
    first = config.first_stage
    return LATENT_CHANNELS if first.kind == "cosine" else first.autoencoder.latent_channels


def spatial_compression(config: ModelConfig) -> int:
    """Pixels per latent pixel, each way."""
    first = config.first_stage
    return LATENT_SIDE if first.kind == "cosine" else 2 ** (len(first.autoencoder.block_out_channels) - 1)


def text_length(config: ModelConfig) -> int:
    """Tokens per caption."""
    return config.text.max_length or transformer_of(config).max_text_seq_length


def size_multiple(config: ModelConfig) -> int:
    """Heights and widths, in pixels, must be multiples of this: one patch of the transformer.

    >>> size_multiple(load_model_config({"text": {"kind": "byt5"}}))
    16
    """
    return spatial_compression(config) * transformer_of(config).patch_size


def check_bucket(config: ModelConfig, bucket: Bucket) -> None:
    """Raise `ConfigError` unless the model takes samples of this shape."""
    multiple = size_multiple(config)
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
    transformer = transformer_of(config)
    if transformer.use_learned_positional_embeddings and bucket.frames > transformer.sample_frames:
        raise ConfigError(
            f"bucket {bucket}: this model's position embedding was learned for {transformer.sample_frames} "
            f"frames at most; change {bucket.frames} to {transformer.sample_frames} or less."
        )
