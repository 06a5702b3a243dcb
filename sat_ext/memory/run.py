"""What memory follows from in a recipe, for the built-in model and CogVideo's, with the defaults of DeepSpeed."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from sat_ext.cogvideo.network import PRETRAINED
from sat_ext.cogvideox import SequenceShape
from sat_ext.config import load
from sat_ext.errors import ConfigError
from sat_ext.models.config import ModelConfig
from sat_ext.recipe import TARGETS, Recipe
from sat_ext.types import Bucket
from sat_ext.zero import fill_in_auto


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Bytes that an optimizer keeps for each trained number, and needs beside them while it steps."""

    states: float
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Offload:
    """`offload_optimizer` or `offload_param`; sizes are numbers, not bytes. Defaults:
    deepspeed/runtime/zero/offload_config.py (0.19)."""

    device: Literal["none", "cpu", "nvme"] = "none"
    pin_memory: bool = False
    buffer_count: int = 5
    buffer_size: int = 100_000_000
    max_in_cpu: int = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """`zero_optimization`; sizes are numbers, not bytes. Defaults: deepspeed/runtime/zero/config.py (0.19).

    `fp32_gradients`: gradients accumulate in fp32 (`data_types.grad_accum_dtype`)."""

    stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: Offload = Offload()
    offload_param: Offload = Offload()
    overlap_comm: bool
    contiguous_gradients: bool = True
    reduce_bucket_size: int = 500_000_000
    param_persistence_threshold: int = 100_000
    model_persistence_threshold: int = sys.maxsize
    max_live_parameters: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000
    sub_group_size: int = 1_000_000_000
    zero_hpz_partition_size: int = 1
    fp32_gradients: bool
    optimizer: Optimizer


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, before any of it is built.

    `steps` has a rank's largest micro-step with each bucket, as samples by bucket; `itemsize` is the bytes of a
    number in the training dtype. `cached`: latents come from disk, `cached_text`: embeddings do. `whole_clips`:
    the first stage holds an activation of a clip at full resolution, as CogVideo's own does; `recompute` is
    `ChunkedFirstStage`'s."""

    model: ModelConfig
    steps: Mapping[Bucket, Mapping[Bucket, int]]
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
    def averages_weights(self) -> bool:
        """Whether the optimizer keeps an average of the weights, for which these must not be on a disk."""
        return _averages(self.deepspeed.get("optimizer") or {})

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
    if recipe.target in TARGETS and not engine.is_cogvideo:
        engine.check(recipe.buckets)
    cached = recipe.data.cache is not None
    return Run(
        model=engine.model_config(),
        steps={bucket: recipe.step_size.fullest(bucket) for bucket in recipe.step_size.tokens},
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


def read_options(deepspeed: Mapping[str, Any], width: int) -> Options:
    """The options of a `deepspeed` section; "auto" sizes follow from the model's `width`. Raises `ConfigError`."""
    deepspeed = fill_in_auto(deepspeed, width)
    zero = {k.removeprefix("stage3_"): v for k, v in (deepspeed.get("zero_optimization") or {}).items()}
    stage = zero.get("stage", 0)
    optimizer = {
        "device": "cpu" if zero.get("cpu_offload") else "none", "buffer_count": 4,
        **(zero.pop("offload_optimizer", None) or {}),
    }  # fmt: skip
    param = zero.pop("offload_param", None) or {}
    if stage:  # without ZeRO, DeepSpeed ignores these
        zero["offload_optimizer"] = _known(Offload, optimizer)
    if stage == 3:
        zero["offload_param"] = _known(Offload, param)
    else:
        zero.pop("zero_hpz_partition_size", None)
    given = {
        "overlap_comm": stage == 3,
        **_known(Options, zero),
        "fp32_gradients": str((deepspeed.get("data_types") or {}).get("grad_accum_dtype")) == "fp32",
        "optimizer": _optimizer(deepspeed.get("optimizer") or {}, is_offloaded=optimizer["device"] != "none"),
    }
    return load(Options, given, "deepspeed.zero_optimization")


def _known(cls: type, section: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `section` that are fields of `cls`: DeepSpeed has many more options."""
    return {f.name: section[f.name] for f in fields(cls) if section.get(f.name) is not None}


def _averages(optimizer: Mapping[str, Any]) -> bool:
    return str(optimizer.get("type")).rpartition(".")[2] == "EmaAdamW"


def _optimizer(section: Mapping[str, Any], *, is_offloaded: bool) -> Optimizer:
    """Two fp32 moments, unless the type says otherwise."""
    name, params = str(section.get("type", "AdamW")), section.get("params") or {}
    last = name.rpartition(".")[2].lower()
    if "8bit" in last:  # moments of one byte, and an fp32 scale for each block of 256 (bitsandbytes)
        return Optimizer(states=(1 if "lion" in last else 2) * (1 + 4 / 256))
    if last == "fusedemaadam":
        return Optimizer(states=12)
    if last in ("lion", "fusedlion", "adagrad", "muon"):
        return Optimizer(states=4)
    if last == "sgd":
        return Optimizer(states=4 if params.get("momentum") else 0, step=4)
    averages = _averages(section)  # in fp32
    from_torch, is_fused = averages or params.get("torch_adam"), params.get("fused", averages)
    # torch's for-each kernel holds the square roots of all second moments at once
    step = 4 if from_torch and not is_fused and not is_offloaded else 0
    return Optimizer(states=12 if averages else 8, step=step)
