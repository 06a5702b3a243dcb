"""What the YAML says of a run that its memory follows from: our engine's model or CogVideo's."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sat_ext.cogvideox import SequenceShape
from sat_ext.errors import ConfigError
from sat_ext.models.config import GradientCheckpointing, ModelConfig
from sat_ext.recipe import TARGETS, Recipe
from sat_ext.types import Bucket


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, before anything of it is built.

    `batches` are samples per rank and micro-step by bucket; `deepspeed` is the YAML's section. `itemsize` is the
    bytes of one number in the training dtype; `shape` is what the length of a sequence follows from. `cached`:
    latents come from disk, and `cached_text`: embeddings. `whole_clips`: the first stage holds an activation of a
    clip at full resolution, as CogVideo's do; `recompute` is that of `ChunkedFirstStage`.
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
    def checkpointing(self) -> GradientCheckpointing | None:
        """Which blocks are recomputed in the backward pass; None if none are."""
        given = self.model.gradient_checkpointing
        return (GradientCheckpointing() if given else None) if isinstance(given, bool) else given


def run_from(recipe: Recipe) -> Run:
    """The run of a recipe. Raises `ConfigError` where it names no model, or one that does not take its data."""
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


def with_levers(run: Run, **changes: Any) -> Run:
    """`run` with other values in its `model` section."""
    return replace(run, model=replace(run.model, **changes))
