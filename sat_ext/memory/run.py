"""What the YAML says of a run that its memory follows from: our engine's model or CogVideo's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sat_ext.cogvideo.network import CACHED_TEXT, CHUNKED_FIRST_STAGE, model_config, text_embedder
from sat_ext.cogvideox import latent_frames
from sat_ext.config import convert, load
from sat_ext.data.params import DataConfig
from sat_ext.engines import COGVIDEO, engine_of
from sat_ext.errors import ConfigError
from sat_ext.models.config import (
    GradientCheckpointing,
    ModelConfig,
    spatial_compression,
    text_length,
    transformer_of,
)
from sat_ext.models.folder import expected_config
from sat_ext.types import Bucket

BATCH_SIZE = 4  # SAT's default (sat/arguments.py, add_training_args, 0.4.12)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, before anything of it is built.

    `batches` are samples per rank and micro-step by bucket; `deepspeed` is the YAML's section. `itemsize` is the
    bytes of one number in the training dtype. `cached`: latents come from disk, and
    `cached_text`: embeddings. `whole_clips`: the
    first stage holds an activation of the whole clip at full resolution, as CogVideo's do; `recompute` is that of
    `ChunkedFirstStage`.
    """

    model: ModelConfig
    batches: Mapping[Bucket, int]
    deepspeed: Mapping[str, Any]
    itemsize: int
    accumulation: int = 1
    workers: int = 1
    cached: bool = False
    cached_text: bool = False
    whole_clips: bool = False
    recompute: str = "block"

    @property
    def lora(self) -> bool:
        """Whether adapters alone train."""
        return self.model.train.mode == "lora"

    @property
    def checkpointing(self) -> GradientCheckpointing | None:
        """Which blocks are computed anew in the backward pass; None where all keep what they need."""
        given = self.model.gradient_checkpointing
        return (GradientCheckpointing() if given else None) if isinstance(given, bool) else given


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A micro-batch of one bucket as the transformer sees it: `video` and `text` tokens of a sample."""

    samples: int
    video: int
    text: int
    latents: int  # numbers of a sample in latent space, without the condition

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return self.samples * (self.video + self.text)


def sizes(run: Run, bucket: Bucket) -> Sizes:
    """The micro-batch of `bucket`; 1.5's padding latents are counted."""
    transformer = transformer_of(run.model)
    patch_t, pixels = transformer.patch_size_t or 1, spatial_compression(run.model)
    rows, columns = bucket.height // pixels, bucket.width // pixels
    groups = -(-latent_frames(bucket.frames) // patch_t)
    patches = (rows // transformer.patch_size) * (columns // transformer.patch_size)
    return Sizes(
        samples=run.batches[bucket],
        video=groups * patches,
        text=text_length(run.model),
        latents=groups * patch_t * transformer.out_channels * rows * columns,
    )


def read_run(config: Mapping[str, Any]) -> Run:
    """The run that merged YAML sections describe. Folders that they name need not be on this machine.

    Raises `ConfigError` for a section that is missing, and for a value that none of them takes.
    """
    for name in ("model", "data"):
        if not config.get(name):
            raise ConfigError(f"--base: no '{name}' section; add a file of configs/{name}/.")
    section, args = dict(config["model"]), config.get("args") or {}
    deepspeed = dict(config.get("deepspeed") or {})
    engine = engine_of(section)
    original = engine.name == COGVIDEO
    model = model_config(section) if original else expected_config(section)
    params = config["data"].get("params") or {}
    # what a cache holds does not matter here, only that there is one
    data = load(DataConfig, {k: v for k, v in params.items() if k != "cache"}, "data.params")
    buckets = data.make_buckets()
    micro_batch = _count("train_micro_batch_size_per_gpu", deepspeed, "batch_size", args, BATCH_SIZE)
    if str(config["data"].get("target", "sat_ext.")).startswith("sat_ext."):
        if not original:
            engine.check(buckets)
        batches = data.batch_sizes(buckets, largest=micro_batch, shape=engine.sequence_shape())
    else:  # CogVideo's own pads every clip to the longest
        batches = {max(buckets, key=lambda b: b.frames): micro_batch}
    target = (section.get("first_stage_config") or {}).get("target")
    return Run(
        model=model,
        batches=batches,
        deepspeed=deepspeed,
        itemsize=_itemsize(deepspeed),
        accumulation=_count("gradient_accumulation_steps", deepspeed, "gradient_accumulation_steps", args, 1),
        workers=_count("num_workers", {}, "num_workers", args, 1, least=0),
        cached=bool(params.get("cache")),
        cached_text=bool(params.get("cache")) or original and text_embedder(section).get("target") == CACHED_TEXT,
        whole_clips=original and target != CHUNKED_FIRST_STAGE,
        recompute=((section.get("first_stage_config") or {}).get("params") or {}).get("recompute", "block"),
    )


def _count(
    key: str, deepspeed: Mapping[str, Any], name: str, args: Mapping[str, Any], default: int, least: int = 1
) -> int:
    where, value = (f"deepspeed.{key}", deepspeed[key]) if key in deepspeed else (f"args.{name}", args.get(name))
    count = default if value is None else convert(int, value, where)
    if count < least:
        raise ConfigError(f"{where}: {count}; give {least} or more.")
    return int(count)


def _itemsize(deepspeed: Mapping[str, Any]) -> int:
    enabled = any((deepspeed.get(name) or {}).get("enabled") for name in ("fp16", "bf16"))
    return 2 if enabled else 4


def with_levers(run: Run, **changes: Any) -> Run:
    """`run` with other values in its `model` section."""
    return replace(run, model=replace(run.model, **changes))
