"""The part of a recipe that its memory follows from: the built-in engine's model or CogVideo's."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sat_ext.cogvideo.network import PRETRAINED
from sat_ext.cogvideox import SequenceShape
from sat_ext.errors import ConfigError
from sat_ext.memory.options import Options, read_options
from sat_ext.models.config import ModelConfig
from sat_ext.recipe import TARGETS, Recipe
from sat_ext.types import Bucket


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of which nothing is built yet.

    `batches` are samples per rank and micro-step, by bucket; `itemsize` is the bytes of a number in the training
    dtype. `cached`: latents come from disk, `cached_text`: embeddings do. `whole_clips`: the first stage holds an
    activation of a clip at full resolution, as CogVideo's own does; `recompute` is `ChunkedFirstStage`'s.
    """

    model: ModelConfig
    batches: Mapping[Bucket, int]
    deepspeed: Mapping[str, Any]
    itemsize: int
    shape: SequenceShape = SequenceShape()
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
    def is_cogvideo(self) -> bool:
        """Whether CogVideo's script trains it, whose YAML has other levers."""
        return self.model.pretrained == PRETRAINED

    @property
    def has_eight_bit_optimizer(self) -> bool:
        """Whether bitsandbytes updates the weights, whose kernels need a GPU."""
        return "8bit" in str((self.deepspeed.get("optimizer") or {}).get("type", ""))

    @property
    def width(self) -> int:
        """The transformer's hidden size."""
        return self.model.transformer.num_attention_heads * self.model.transformer.attention_head_dim

    @property
    def options(self) -> Options:
        """The `deepspeed` section. Raises `ConfigError`."""
        return read_options(self.deepspeed, self.width)


def run_from(recipe: Recipe) -> Run:
    """The run of a recipe. Raises `ConfigError` if it has no model, or one that does not take its data."""
    engine = recipe.engine
    if not engine.model:
        raise ConfigError("--base: no 'model' section; add a file of configs/model/.")
    # CogVideo's files are planned before the overlays that make them fit our data, to show what those save
    if recipe.target in TARGETS and not engine.has_own_script:
        engine.check(recipe.buckets)
    cached = recipe.data.cache is not None
    return Run(
        model=engine.model_config(),
        batches=recipe.batch_sizes,
        deepspeed=recipe.deepspeed,
        itemsize=recipe.dtype.itemsize,
        shape=recipe.shape,
        accumulation=recipe.accumulation,
        workers=recipe.num_workers,
        cached=cached,
        cached_text=cached or engine.caches_text,
        whole_clips=engine.encodes_whole_clips,
        recompute=engine.recompute,
    )


def with_model(run: Run, **changes: Any) -> Run:
    """`run` with other values in its `model` section."""
    return replace(run, model=replace(run.model, **changes))
