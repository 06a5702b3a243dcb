"""The levers on memory, as lines of YAML to write and as changes to a run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sat_ext.memory.run import Run, with_model
from sat_ext.models.config import GradientCheckpointing

Pull = Callable[[Run], Run]
CHUNKS = "configs/cogvideo/joint.yaml (ChunkedFirstStage)"
TEXT = "configs/cogvideo/offload-text.yaml"


@dataclass(frozen=True, kw_only=True)
class Lever:
    """A lever as YAML, and the run with it: the same run if it is pulled already or makes no sense."""

    yaml: str
    pull: Pull


def levers(run: Run) -> list[Lever]:
    """Those that change `run`, from the one that costs least time."""
    if run.is_cogvideo:
        checkpoints = "model.network_config.params.transformer_args.checkpoint_activations: true"
        known = {
            CHUNKS: _chunks,
            checkpoints: _recompute_all,
            "configs/cogvideo/cached.yaml, with what sat-ext cache made": _from_cache,
            TEXT: _text(device="cpu"),
        }
    else:
        blocks = run.model.transformer.num_layers
        swaps = sorted({blocks // 4, blocks // 2, 3 * blocks // 4, blocks - 2})
        known = {
            "model.first_stage.slicing: true": _first_stage(slicing=True),
            "model.sampling.number: 0": _no_samples,
            "model.first_stage.tiling: true": _first_stage(tiling=True),
            "model.gradient_checkpointing: true": _recompute_all,
            "model.first_stage.frames: 4": _first_stage(frames=4),
            "data.params.cache: {folder: ...}  # made once, by sat-ext cache": _from_cache,
            "model.text.device: cpu  # seconds a caption; a cache costs none": _text(device="cpu"),
            "deepspeed.optimizer.type: bitsandbytes.optim.AdamW8bit": _eight_bit,
            "model.gradient_checkpointing: {offload: true}": _checkpoints_on_host,
            "model.train.quantization: nf4": _nf4,
            **{f"model.block_swap: {n}": _swap(n) for n in swaps if n > 2},
        }
    return [Lever(yaml=yaml, pull=pull) for yaml, pull in known.items() if pull(run) != run]


def cache_levers(run: Run) -> dict[str, dict[str, Pull]]:
    """Those of `sat-ext cache`, by the encoder that they are for, from the one that costs least time."""
    if run.is_cogvideo:
        frames = "configs/cogvideo/joint.yaml, model.first_stage_config.params: {frames: 4, recompute: level}"
        return {
            "text": {TEXT: _text(device="cpu")},
            "first_stage": {
                CHUNKS: _chunks,
                frames: lambda r: replace(_first_stage(frames=4)(_chunks(r)), recompute="level"),
            },
        }
    return {
        "text": {
            "model.text.quantization: nf4": _text(device="gpu", quantization="nf4"),
            "model.text.device: cpu": _text(device="cpu"),
        },
        "first_stage": {
            "model.first_stage.frames: 4": _first_stage(frames=4),
            "model.first_stage.tiling: true": _first_stage(tiling=True),
        },
    }


def _first_stage(**values: Any) -> Pull:
    def pull(run: Run) -> Run:
        first = run.model.first_stage
        if run.cached or run.whole_clips or first.kind == "cosine":
            return run
        return with_model(run, first_stage=replace(first, **values))

    return pull


def _chunks(run: Run) -> Run:
    if run.cached or not run.whole_clips:
        return run
    return _first_stage(slicing=True)(replace(run, whole_clips=False))


def _text(*, device: str, quantization: str = "none") -> Pull:
    def pull(run: Run) -> Run:
        if run.cached_text:
            return run
        return with_model(run, text=replace(run.model.text, device=device, quantization=quantization))  # type: ignore[arg-type]

    return pull


def _no_samples(run: Run) -> Run:
    return with_model(run, sampling=replace(run.model.sampling, number=0))


def _from_cache(run: Run) -> Run:
    return replace(_no_samples(run), cached=True, cached_text=True)  # no samples, as no decoder is loaded


def _recompute_all(run: Run) -> Run:
    now = run.model.checkpointing
    return run if now and now.every == 1 else with_model(run, gradient_checkpointing=True)


def _checkpoints_on_host(run: Run) -> Run:
    now = run.model.checkpointing
    offload = GradientCheckpointing(offload=True)
    return run if now and now.offload else with_model(run, gradient_checkpointing=offload)


def _eight_bit(run: Run) -> Run:
    if run.has_eight_bit_optimizer:
        return run
    return replace(run, deepspeed={**run.deepspeed, "optimizer": {"type": "bitsandbytes.optim.AdamW8bit"}})


def _nf4(run: Run) -> Run:
    if not run.lora or run.model.train.quantization != "none":
        return run
    return with_model(run, train=replace(run.model.train, quantization="nf4"))


def _swap(blocks: int) -> Pull:
    def pull(run: Run) -> Run:
        if not run.lora or run.model.block_swap >= blocks:
            return run
        return with_model(_recompute_all(run), block_swap=blocks)  # which needs the blocks recomputed

    return pull
